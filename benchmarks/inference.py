r"""Time and memory of a guided denoising step in every mode, beside PyTorch on the same GPU in the same run.

python -m benchmarks.inference --output=inference.json \
  --configs=configs/terdit_4b.py,configs/terdit_600m.py,configs/terdit_4b_512.py@1/8,configs/terdit_600m.py:input_size=64@1/8
python -m benchmarks.inference --output=inference.json --plot=docs/images/inference.png   # of rows measured before

Ours is the product's own sampling loop (`inference.sampling.make_draw`) over random codes, modulations of the schedule
included; PyTorch's ways are `benchmarks.torch_inference`'s. The two sides are processes of their own that take turns on
the device by a file lock, except that PyTorch compiles while ours runs. Numbers are printed and written as soon as they
are known, the table last. `error` is the relative error of the output against float32, of this random network.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

from absl import flags
import numpy as np

from benchmarks.charts import chart, label_ends, styles
from benchmarks.machine import kernel_times, locked, measure_matmul_rate, parse_run
from benchmarks.random_codes import random_operands
from terdit_jax.config_sections import SampleConfig
from terdit_jax.errors import UserError, run_command
from terdit_jax.paths import define_path
from terdit_jax.versions import versions

_CONFIGS = flags.DEFINE_list("configs", None, "Models: PATH[:input_size=N][@BATCH/BATCH...], in this order.")
_MODES = flags.DEFINE_list("modes", "exact,fast,small,small_exact", "Ours; MODE:xla leaves the kernels out.")
_BATCHES = flags.DEFINE_list("batches", "1,32", "Images drawn at once.")
_PEERS = flags.DEFINE_list("peers", "compiled,compiled_fp8,public", "PyTorch's, of benchmarks.torch_inference.")
_PROFILES = flags.DEFINE_list("profiles", "", "CONFIG_NAME/MODE/BATCH of which each kernel's time is written too.")
_MINUTES = flags.DEFINE_float("minutes", None, "No row is begun after as long; what runs a minute later is ended.")
_SECONDS = flags.DEFINE_float("seconds", 0.4, "Length of one run of steps, of which there are five.")
_ERRORS = flags.DEFINE_bool("errors", True, "Also the error against float32.")
_OUTPUT = define_path("output", "inference.json", "JSON file; without --configs, its rows are shown.")
_PLOT = define_path("plot", None, "Chart to draw of all rows, a PNG.")
_ONE = flags.DEFINE_string("one", None, "Our side for one configuration, in this process; prints a line for each row.")
_UNTIL = flags.DEFINE_float("until", float("inf"), "Seconds since 1970 after which no row is begun.")
_LOCK = define_path("lock", None, "File that is locked while the device is in use.")

PEER = "torch compiled"  # what ours is compared with
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "triton", "nvidia-cudnn-cu13")


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    if _ONE.value:
        for row in measure_ours(_ONE.value):
            print("row " + json.dumps(row), flush=True)
        return
    output = pathlib.Path(_OUTPUT.value)
    if _CONFIGS.value:
        rows = _measure()
    elif output.exists():
        rows = json.loads(output.read_text())["rows"]
    else:
        raise UserError("--configs is missing, e.g. --configs=configs/terdit_600m.py")
    print(table(rows), flush=True)
    if _PLOT.value:
        _plot(rows, _PLOT.value)


def _measure() -> list[dict]:
    """Both sides' rows, which the output has as they come."""
    content = {
        "command": " ".join(["python -m benchmarks.inference", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "python": sys.version.split()[0],
        "versions": versions(*_PACKAGES),
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        lock = f"--lock={scratch}/lock"
        shared = [f"--batches={','.join(_BATCHES.value)}", f"--seconds={_SECONDS.value}", lock]
        until = time.time() + 60 * _MINUTES.value if _MINUTES.value else float("inf")
        shared.append(f"--until={until}")
        peers = [
            ["benchmarks.torch_inference", f"--configs={path}", f"--peers={','.join(_PEERS.value)}", *shared]
            for path in _CONFIGS.value
        ]
        ours = [
            ["benchmarks.inference", f"--one={path}", f"--modes={','.join(_MODES.value)}", *shared]
            + [f"--profiles={','.join(_PROFILES.value)}", f"--errors={_ERRORS.value}"]
            for path in _CONFIGS.value
        ]
        commands = (peers if _PEERS.value else [], ours)
        sides = [threading.Thread(target=_collect, args=(side, content, until)) for side in commands]
        for side in sides:
            side.start()
        for side in sides:
            side.join()
    return content["rows"]


def _collect(commands: list[list[str]], content: dict, until: float) -> None:
    for module, *arguments in commands:
        if time.time() > until:
            return
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, "-m", module, *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            ender = threading.Timer(min(until - time.time() + 60, threading.TIMEOUT_MAX), process.kill)
            ender.daemon = True
            ender.start()
            for line in process.stdout:
                if line.startswith("row "):
                    content["rows"].append(json.loads(line[4:]))
                    print({k: v for k, v in content["rows"][-1].items() if k != "kernels"}, flush=True)
                    pathlib.Path(_OUTPUT.value).write_text(json.dumps(content, indent=1) + "\n")
            ender.cancel()


def measure_ours(text: str) -> Iterator[dict]:
    """A row for each mode and batch."""
    import jax

    from terdit_jax.model.config import DiTConfig
    from terdit_jax.parallel.mesh import single_device_mesh

    config, batches = parse_run(text)
    model = dataclasses.replace(DiTConfig.from_config(config), dtype="bfloat16", remat="none")
    settings = dataclasses.replace(config.sample, cfg_scale=4.0)
    gpu = jax.default_backend() == "gpu"
    with locked(_LOCK.value):
        rate = measure_matmul_rate(*(() if gpu else (256, 2)))
        packed = random_operands(model)
        reference = _outputs(model, None, packed) if _ERRORS.value else None
    for mode in _MODES.value:
        if not model.ternary and mode.partition(":")[0] != "exact":
            continue
        with locked(_LOCK.value):
            numerics = _numerics(mode, model, single_device_mesh())
            operands = _resident(model, numerics, packed)
            error = _relative(_outputs(model, numerics, operands), reference) if _ERRORS.value else None
        for batch in batches or map(int, _BATCHES.value):
            if time.time() > _UNTIL.value:
                return
            row = {"who": mode, "model": config.name, "pixels": 8 * model.input_size, "batch": batch}
            row["device"] = jax.devices()[0].device_kind
            row |= {"held_gb": _bytes(operands) / 1e9, "error": error, "matmul_tflops": rate / 1e12}
            name = f"{config.name}/{mode}/{batch}"
            try:
                with locked(_LOCK.value):
                    row |= _time(model, settings, numerics, operands, batch, name in _PROFILES.value)
                row["floor_ms"] = 1e3 * 2 * batch * model.flops_per_image() / rate
            except Exception as error_of_run:
                row["failed"] = f"{type(error_of_run).__name__}: {error_of_run}".splitlines()[0][:200]
            yield row


def _numerics(mode: str, model, mesh):
    from terdit_jax.fast.modes import choose_numerics

    name, _, without = mode.partition(":")
    numerics = choose_numerics(name, model, mesh)
    return dataclasses.replace(numerics, kernels=False) if without else numerics


def _resident(model, numerics, packed: dict) -> dict:
    import jax

    from terdit_jax.fast.inference_pass import make_inference_operands

    return jax.block_until_ready(make_inference_operands(model, numerics, packed))


def _outputs(model, numerics, operands: dict) -> np.ndarray:
    """Outputs for two noisy latents; without numerics, in float32 by the forward pass of training."""
    import jax

    from terdit_jax.fast.inference_pass import inference_forward
    from terdit_jax.fast.modes import compiler_options
    from terdit_jax.model.transformer import forward

    x_t = jax.random.normal(jax.random.key(1), (2, *model.sample_shape))
    t, y = np.array([900, 300]), np.array([7, model.num_classes])
    if numerics is None:
        with jax.default_matmul_precision("highest"):
            exact = dataclasses.replace(model, dtype="float32")
            return np.asarray(jax.jit(functools.partial(forward, exact))(operands, x_t, t, y))
    lean = jax.jit(functools.partial(inference_forward, model, numerics), compiler_options=compiler_options(numerics))
    return np.asarray(lean(operands, x_t, t, y))


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    """The relative error of the noise, which is the first half of the channels."""
    a, b = (np.split(array.astype(np.float64), 2, axis=-1)[0] for array in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _time(model, settings: SampleConfig, numerics, operands: dict, batch: int, profiled: bool) -> dict:
    import jax

    from terdit_jax.diffusion.objective import Ddpm
    from terdit_jax.fast.inference_pass import bind_schedule
    from terdit_jax.fast.modes import compiler_options
    from terdit_jax.inference.sampling import make_draw
    from terdit_jax.reproducible import key_bits

    settings = dataclasses.replace(settings, num_steps=50 if batch <= 8 else 10)
    bind = functools.partial(bind_schedule, model, numerics)
    draw = make_draw(model, Ddpm(), settings, bind, compiler_options(numerics))
    indices = np.arange(batch, dtype=np.int32)
    arguments = operands, indices % model.num_classes, indices, key_bits(0)
    begin = time.perf_counter()
    compiled = draw.lower(*arguments).compile()
    compile_seconds = time.perf_counter() - begin

    def run(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            last = compiled(*arguments)
        jax.block_until_ready(last)
        return (time.perf_counter() - begin) / count / settings.num_steps

    run(1)
    count = max(1, round(_SECONDS.value / run(1) / settings.num_steps))
    seconds = float(np.median([run(count) for _ in range(5)]))
    row = {
        "ms": 1e3 * seconds,
        "images_per_second_250_steps": batch / (250 * seconds),
        "peak_gb": (_bytes(operands) + compiled.memory_analysis().temp_size_in_bytes) / 1e9,
        "compile_seconds": compile_seconds,
    }
    if profiled:
        row["kernels"] = kernel_times(lambda: compiled(*arguments), settings.num_steps)
    return row


def _bytes(operands: dict) -> int:
    import jax

    return sum(leaf.nbytes for leaf in jax.tree.leaves(operands))


def table(rows: list[dict]) -> str:
    """The tables of docs/benchmarks.md: milliseconds a step of every way beside how many times as fast as torch.compile
    in bfloat16 it is; then what each holds and returns, at the largest batch that it ran."""
    found = {(row["model"], row["pixels"], row["batch"], row["who"]): row for row in rows if "ms" in row}
    ways = sorted({key[-1] for key in found}, key=_rank)
    lines = _head("Model", "px", "Images", *map(_title, ways))
    for run in sorted({key[:3] for key in found}):
        peer = found.get((*run, PEER))
        cells = [_milliseconds(found.get((*run, way)), peer) for way in ways]
        lines.append(_line(*run, *cells))
    lines += [
        "",
        *_head("Model", "px", "Way", "Images", "Held GB", "Peak GB", "Images/s, 250 steps", "Of the floor", "Error"),
    ]
    for model, pixels in sorted({key[:2] for key in found}):
        for way in ways:
            if mine := [row for key, row in found.items() if (key[:2], key[-1]) == ((model, pixels), way)]:
                row = max(mine, key=lambda row: row["batch"])
                rate = row["batch"] / (250 * row["ms"] / 1e3)
                floor = f"{row['floor_ms'] / row['ms']:.0%}" if "floor_ms" in row else ""
                error = f"{row['error']:.2g}" if row.get("error") is not None else ""
                held = (f"{row[name]:.2f}" for name in ("held_gb", "peak_gb"))
                lines.append(_line(model, pixels, _title(way), row["batch"], *held, f"{rate:.3g}", floor, error))
    failed = (row for row in rows if "failed" in row)
    lines += [f"{row['who']}, {row['model']}, {row['batch']}: failed: {row['failed']}" for row in failed]
    return "\n".join(lines)


def _rank(way: str) -> tuple[bool, int, str]:
    """Ours as modes are listed, then PyTorch's."""
    modes = ("exact", "fast", "small", "small_exact")
    mode = way.partition(":")[0]
    return way.startswith("torch"), modes.index(mode) if mode in modes else len(modes), way


def _title(way: str) -> str:
    titles = {
        PEER: "torch.compile, bf16",
        "torch compiled_fp8": "torch.compile, fp8",
        "torch public": "TerDiT's public code",
    }
    return titles.get(way, f"`{way}`")


def _milliseconds(row: dict | None, peer: dict | None) -> str:
    if row is None:
        return ""
    ratio = f" ({peer['ms'] / row['ms']:.2f})" if peer and peer is not row else ""
    return f"{row['ms']:.2f}{ratio}"


def _head(*columns: str) -> list[str]:
    return [_line(*columns), "|---" * len(columns) + "|"]


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _plot(rows: list[dict], path: str) -> None:
    """How many times as fast as torch.compile in bfloat16 each way is, by the number of images."""
    found = {(row["model"], row["pixels"], row["batch"], row["who"]): row["ms"] for row in rows if "ms" in row}
    runs = {f"{model}, {px} px": (model, px) for model, px in sorted({key[:2] for key in found if key[-1] == PEER})}
    if not runs:
        raise UserError("--plot needs rows of --peers=compiled to compare with")
    looks = styles(sorted({key[-1] for key in found}, key=_rank))
    layout = [[*runs, "."][i : i + 2] for i in range(0, len(runs), 2)]
    devices = ", ".join(sorted({row["device"] for row in rows if "device" in row}))
    title = "Speedup of a guided denoising step over torch.compile in bf16" + f" ({devices})" * bool(devices)
    with chart(path, title, layout, 0.5 + 2.4 * len(layout), sharey=True) as panels:
        ends: dict[str, dict] = {name: {} for name in runs}
        for name, run in runs.items():
            panel = panels[name]
            peers = {key[2]: ms for key, ms in sorted(found.items()) if (*key[:2], key[3]) == (*run, PEER)}
            for way, look in looks.items():
                points = [(n, ms / found[*run, n, way]) for n, ms in peers.items() if (*run, n, way) in found]
                if points:
                    dashes = {"linestyle": "--"} if way.startswith("torch") else {}
                    panel.plot(*zip(*points, strict=True), marker="o", **(look | dashes))
                    ends[name][way] = points[-1:]
            panel.set(title=name, xscale="log", yscale="log")
            panel.set_xticks([*peers], map(str, peers))
            panel.set_yticks([2.0**power for power in range(-3, 4)], [f"{tick}×" for tick in "⅛¼½1248"])
            panel.tick_params(labelleft=True)
            panel.minorticks_off()
            if name in [*runs][-2:]:
                panel.set_xlabel("batch size (images)")
        for name in runs:  # the common limits are final now
            texts = {way: f"{_title(way).strip('`')}  {ratio:.2f}×" for way, [(_, ratio)] in ends[name].items()}
            label_ends(panels[name], ends[name], texts)


if __name__ == "__main__":
    run_command(main)
