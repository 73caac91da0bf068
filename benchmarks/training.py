"""Times the real training step on synthetic latents, against the device's own matmul rate measured in the same run.

python -m benchmarks.training --runs=configs/terdit_600m.py:64,configs/terdit_4b.py:16:remat=block --output=step.json
python -m benchmarks.training --runs=configs/terdit_600m.py:64 --peers=ternary,full     # beside PyTorch

Each run is config:batch[:NAME=VALUE...] with fields of `config.compute`. Prints a table: images/s, MFU (vendor's dense
bf16 peak), share of the measured matmul rate, and peak memory; with peers (`benchmarks.torch_training`), each at the
runs' configurations and batches, also how many times as fast as each. Every run starts in a process of its own, so that
peak memory is its own. With JAX_COMPILATION_CACHE_DIR set, all programs are compiled side by side first.
"""

from collections.abc import Sequence
import concurrent.futures
import datetime
import json
import os
import pathlib
import subprocess
import sys
import time

from absl import flags
import jax

from benchmarks.machine import kernel_times, measure_matmul_rate
from terdit_jax.config import freeze
from terdit_jax.config_file import load_config
from terdit_jax.errors import UserError, run_command
from terdit_jax.parallel.chips import peak_flops
from terdit_jax.paths import define_path
from terdit_jax.training.examples import device_batches
from terdit_jax.training.setup import set_up
from terdit_jax.training.state import abstract_state, make_state
from terdit_jax.training.step import make_train_step
from terdit_jax.versions import versions

_RUNS = flags.DEFINE_list("runs", None, "config:batch[:NAME=VALUE...] each, NAME of config.compute.")
_PEERS = flags.DEFINE_list("peers", "", "PyTorch's, of benchmarks.torch_training.")
_STEPS = flags.DEFINE_integer("steps", 20, "Timed steps a run, after warm-up.", lower_bound=1)
_WARM_UP = flags.DEFINE_integer("warm_up", 3, "Steps before them, the first of which compiles.", lower_bound=1)
_PROFILE = flags.DEFINE_bool("profile", False, "Also each kernel's time in a step.")
_OUTPUT = define_path("output", "training.json", "JSON file.")
_COMPILE = flags.DEFINE_bool("compile", False, "With --one: compiles only, into JAX's cache.")
_ONE = flags.DEFINE_string("one", None, "A single run in this process; prints JSON.")


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    if _ONE.value:
        print(json.dumps(measure_run(_ONE.value)))
        return
    if not _RUNS.value:
        raise UserError("--runs is missing, e.g. --runs=configs/terdit_600m.py:64:dots")
    rows = []
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        with concurrent.futures.ThreadPoolExecutor() as threads:
            list(threads.map(lambda run: _in_own_process("benchmarks.training", run, "--compile"), _RUNS.value))
    measured = [("benchmarks.training", run) for run in _RUNS.value]
    shapes = dict.fromkeys(":".join(run.split(":")[:2]) for run in _RUNS.value)
    measured += [("benchmarks.torch_training", f"{shape}:{peer}") for shape in shapes for peer in _PEERS.value]
    for module, run in measured:
        rows.append(_in_own_process(module, run))
        print(json.dumps({k: v for k, v in rows[-1].items() if k != "kernels"}), flush=True)
        pathlib.Path(_OUTPUT.value).write_text(json.dumps({**_provenance(), "rows": rows}, indent=1))
    print(_table(rows))


def measure_run(run: str) -> dict:
    """One row: the step of a config at a batch size, state and data as in training, saving and logging left out."""
    path, batch_size, *options = run.split(":")
    compute = {f"compute.{name}": value for name, value in (option.split("=") for option in options)}
    config = freeze(load_config(path)).with_fields(
        {"train.batch_size": int(batch_size), "data.synthetic": True, **compute}
    )
    setup = set_up(config, "/tmp/benchmarks_training")
    step = make_train_step(config, setup.model, setup.objective, setup.optimizer, setup.mesh, 1.0, setup.plan)
    batch = next(device_batches(setup, 0))
    if _COMPILE.value:
        with jax.set_mesh(setup.mesh):
            step.__wrapped__.lower(abstract_state(setup.model, setup.optimizer, setup.mesh), batch).compile()
        return {}
    matmul_rate = measure_matmul_rate(*(() if jax.default_backend() == "gpu" else (512, 2)))
    state = make_state(setup.model, setup.optimizer, setup.mesh, config.seed)
    begin = time.perf_counter()
    state = jax.block_until_ready(step(state, batch))
    compile_seconds = time.perf_counter() - begin
    for _ in range(_WARM_UP.value - 1):
        state = step(state, batch)
    jax.block_until_ready(state)
    begin = time.perf_counter()
    for _ in range(_STEPS.value):
        state = step(state, batch)
    sums = jax.device_get(jax.block_until_ready(state)["window"]["sums"])
    images = _STEPS.value * config.train.batch_size / (time.perf_counter() - begin)
    flops = 3 * setup.model.flops_per_image() * images / jax.device_count()
    peak = peak_flops(jax.devices()[0].device_kind)
    stats = jax.devices()[0].memory_stats() or {}
    row = {
        "config": config.name,
        "batch_size": config.train.batch_size,
        "remat": config.compute.remat,
        "compute": ", ".join([config.compute.remat, *(option for option in options if "remat" not in option)]),
        "devices": jax.device_count(),
        "images_per_second": images,
        "mfu": flops / peak if peak else None,
        "matmul_rate": matmul_rate,
        "share_of_matmul_rate": flops / matmul_rate,
        "peak_gb": stats.get("peak_bytes_in_use", 0) / 1e9,
        "compile_seconds": compile_seconds,
        "mean_loss": float(sums["loss"] / sums["steps"]),
        "finite_steps": int(sums["steps"]),
    }
    if _PROFILE.value:
        row["kernels"] = kernel_times(lambda: step(state, batch), 1, most=80)
    return row


def _in_own_process(module: str, run: str, *more: str) -> dict:
    command = [sys.executable, "-m", module, f"--one={run}"]
    command += [f"--steps={_STEPS.value}", f"--warm_up={_WARM_UP.value}"]
    command += [*more, *(["--profile"] if _PROFILE.value and module == "benchmarks.training" else [])]
    # Programs that are only compiled share the device.
    environment = os.environ | ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if "--compile" in more else {})
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"run": run, "failed": done.stderr.strip().splitlines()[-1][:300] if done.stderr else "no output"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def _provenance() -> dict:
    packages = ("jax", "jaxlib", "flax", "optax", "torch")
    return {
        "command": " ".join(["python -m benchmarks.training", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "python": sys.version.split()[0],
        "versions": versions(*packages),
    }


def _table(rows: list[dict]) -> str:
    rates = {(row["config"], row["batch_size"], row["peer"]): row["images_per_second"] for row in rows if "peer" in row}
    peers = sorted({peer for _, _, peer in rates})
    columns = ("config", "batch", "way", "images/s", "MFU", "of measured matmul rate", "peak GB")
    columns += tuple(f"times torch, {peer}" for peer in peers)
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['run']} | failed: {row['failed']} |")
            continue
        key = row["config"], row["batch_size"]
        cells = [row["config"], str(row["batch_size"]), f"torch, {row['peer']}" if "peer" in row else row["compute"]]
        cells += [f"{row['images_per_second']:.1f}", f"{row['mfu']:.1%}" if row.get("mfu") else ""]
        cells += [f"{row['share_of_matmul_rate']:.1%}" if "share_of_matmul_rate" in row else ""]
        cells += [f"{row['peak_gb']:.1f}" if row["peak_gb"] is not None else ""]
        for peer in peers if "peer" not in row else ():
            cells.append(f"{row['images_per_second'] / rates[*key, peer]:.2f}" if (*key, peer) in rates else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
