"""Times the training step on one device and on all of this machine, data parallel and FSDP, and counts what they send.

python -m benchmarks.scaling --configs=configs/terdit_600m.py:64:dots,configs/terdit_4b.py:32 --output=scaling.json

Each config is path:batch a device[:remat]. Every one runs on one device, on all with copied parameters where they fit
(`data`), and on all with cut parameters (`fsdp`) for each --gather; the batch a device stays the same. Bytes are read
from the compiled program (`terdit_jax.parallel.collectives`): what one device sends, of weights gathered and of
gradients reduced. "Beyond one device" is the share of a step that one device with the same batch does not need: what
communication costs after all that is hidden, less what FSDP saves by updating a part of the parameters.
Rows run one after the other, each in a process of its own.
"""

from collections.abc import Sequence
import datetime
import json
import pathlib
import subprocess
import sys
import time

from absl import flags
import jax
import numpy as np

from benchmarks.machine import load_config, versions
from terdit_jax.diffusion.schedule import linear_schedule
from terdit_jax.errors import UserError, run_command
from terdit_jax.model.config import DiTConfig
from terdit_jax.parallel.collectives import Collective, read_collectives, sent_bytes
from terdit_jax.parallel.mesh import make_mesh
from terdit_jax.parallel.sharding import batch_sharding
from terdit_jax.training.optimizer import make_optimizer
from terdit_jax.training.state import make_state
from terdit_jax.training.step import make_train_step

_CONFIGS = flags.DEFINE_list("configs", None, "path:batch a device[:remat] each.")
_GATHER = flags.DEFINE_list("gather", ["codes", "bfloat16"], "Values of config.mesh.gather, for FSDP.")
_LAYOUTS = flags.DEFINE_list("layouts", ["data", "fsdp"], "Beside one device: mesh axes that take all of them.")
_STEPS = flags.DEFINE_integer("steps", 10, "Steps a round.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds, of which the median counts.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "scaling.json", "JSON file.")
_ONE = flags.DEFINE_string("one", None, "A single row in this process, as JSON; prints JSON.")

_WARM_UP = 5  # a process's first collectives run several times slower


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    if _ONE.value:
        print(json.dumps(measure(json.loads(_ONE.value), _STEPS.value, _ROUNDS.value)))
        return
    if not _CONFIGS.value:
        raise UserError("--configs is missing, e.g. --configs=configs/terdit_600m.py:64:dots")
    rows = [_in_own_process(run) for run in plan(_CONFIGS.value, _LAYOUTS.value, _GATHER.value)]
    compare(rows)
    result = {
        "command": " ".join(["python -m benchmarks.scaling", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "python": sys.version.split()[0],
        "versions": versions("jax", "jaxlib", "flax", "optax"),
        "rows": rows,
    }
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(result, indent=1))
    print(table(rows))


def plan(configs: list[str], layouts: list[str], gathers: list[str]) -> list[dict]:
    """The rows of each config: one device, then all of them in each layout."""
    rows = []
    for written in configs:
        path, *rest = written.split(":")
        if not rest or not rest[0].isdigit():
            raise UserError(f"--configs={written}: give path:batch a device[:remat]")
        common = {"path": path, "batch": int(rest[0]), "remat": (rest[1:] or [None])[0]}
        rows.append({**common, "layout": "one", "gather": "codes"})
        for layout in layouts:
            if layout not in ("data", "fsdp"):
                raise UserError(f"--layouts={layout}: choose of data, fsdp")
            rows += [{**common, "layout": layout, "gather": g} for g in (gathers if layout == "fsdp" else ["codes"])]
    return rows


def measure(run: dict, steps: int, rounds: int) -> dict:
    """One row of `plan`, timed: state and batch as in training; data, logging and saving left out."""
    config = load_config(run["path"])
    devices = jax.devices()[:1] if run["layout"] == "one" else jax.devices()
    config.train.batch_size = run["batch"] * len(devices)
    config.train.accumulation_steps = 1
    config.compute.remat = run["remat"] or config.compute.remat
    config.mesh.update(data=1, fsdp=1, tensor=1, slices=1, gather=run["gather"])
    config.mesh["data" if run["layout"] == "one" else run["layout"]] = len(devices)
    model, optimizer = DiTConfig.from_config(config), make_optimizer(config.optimizer)
    mesh = make_mesh(config.mesh, devices)
    state = make_state(model, optimizer, mesh, config.seed)
    batch = _random_batch(model, config.train.batch_size)
    batch = jax.device_put(batch, batch_sharding(mesh))
    step = make_train_step(config, model, linear_schedule(), optimizer, mesh, 1.0)
    begin = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = step.__wrapped__.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - begin
    for _ in range(_WARM_UP):
        state = compiled(state, batch)
    jax.block_until_ready(state)
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(steps):
            state = compiled(state, batch)
        jax.block_until_ready(state)
        seconds.append((time.perf_counter() - begin) / steps)
    sums = jax.device_get(state["window"]["sums"])
    return {
        **run,
        "config": config.name,
        "remat": config.compute.remat,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "seconds": float(np.median(seconds)),
        "seconds_of_rounds": seconds,
        "images_per_second": config.train.batch_size / float(np.median(seconds)),
        "sent": traffic(read_collectives(compiled.as_text())),
        "peak_gb": (devices[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9,
        "compile_seconds": compile_seconds,
        "mean_loss": float(sums["loss"] / sums["steps"]),
        "finite_steps": int(sums["steps"]),
    }


def _random_batch(model: DiTConfig, size: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shape = (size, *model.sample_shape)
    return {
        "mean": random.standard_normal(shape, np.float32).astype(np.float16),
        "std": np.zeros(shape, np.float16),
        "label": random.integers(0, model.num_classes, size).astype(np.int32),
    }


def traffic(collectives: list[Collective]) -> dict[str, float]:
    """Bytes that one device sends in a step: of gathers, of reductions, of anything else."""
    kinds = {"gathered": ("all-gather",), "reduced": ("all-reduce", "reduce-scatter")}
    sent = {name: sent_bytes(c for c in collectives if c.kind in among) for name, among in kinds.items()}
    return sent | {"other": sent_bytes(collectives) - sum(sent.values())}


def compare(rows: list[dict]) -> None:
    """Adds to each row what it is against one device with the same config and batch: times as fast, share beyond it."""
    one = {(row["path"], row["batch"]): row for row in rows if row["layout"] == "one" and "failed" not in row}
    for row in rows:
        base = one.get((row["path"], row["batch"]))
        if base and "failed" not in row:
            row["scaling"] = row["images_per_second"] / base["images_per_second"]
            row["beyond_one_device"] = 1 - base["seconds"] / row["seconds"]


def _in_own_process(run: dict) -> dict:
    command = [sys.executable, "-m", "benchmarks.scaling", f"--one={json.dumps(run)}"]
    command += [f"--steps={_STEPS.value}", f"--rounds={_ROUNDS.value}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {**run, "failed": done.stderr.strip().splitlines()[-1][:300] if done.stderr else "no output"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(rows: list[dict]) -> str:
    """The rows for people."""
    columns = (
        "config", "batch a device", "devices", "layout", "gather", "images/s", "x one device", "beyond one device",
        "MB gathered", "MB reduced", "peak GB",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        gather = row["gather"] if row["layout"] == "fsdp" else ""
        if "failed" in row:
            lines.append(f"| {row['path']} | {row['batch']} | | {row['layout']} | {gather} | failed: {row['failed']} |")
            continue
        against = f"{row['scaling']:.2f} | {row['beyond_one_device']:.1%}" if "scaling" in row else " | "
        lines.append(
            f"| {row['config']} | {row['batch']} | {row['devices']} | {row['layout']} | {gather} "
            f"| {row['images_per_second']:.1f} | {against} | {row['sent']['gathered'] / 1e6:,.1f} "
            f"| {row['sent']['reduced'] / 1e6:,.1f} | {row['peak_gb']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
