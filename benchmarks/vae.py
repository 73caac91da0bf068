"""Speed of the autoencoder on one accelerator: encoding beside the same network under torch.compile, and decoding.

python -m benchmarks.vae --output=vae.json            # everything
python -m benchmarks.vae --quick --output=vae.json    # bfloat16 beside torch.compile at one batch size

Every run is a process of its own, all with the same random full-size weights and pictures; encoding starts from
float32 pictures on the device and ends with mean and standard deviation there. Numbers are printed and written as soon
as they are known, the table last. Outputs for two pictures are compared with PyTorch's in float32, and the command
fails if they differ. TFLOP are counted from shapes and read against bfloat16 matmuls, measured as well.
"""

from collections.abc import Callable, Iterator, Sequence
import datetime
from functools import partial
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import flags
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from terdit_jax.errors import UserError, run_command
from terdit_jax.model.vae import (
    VAEConfig,
    abstract_params,
    decode,
    decoder_params,
    encode,
    encode_flops,
    encoder_params,
)
from terdit_jax.paths import define_path
from terdit_jax.versions import versions

_ALL = "jax:bfloat16,torch:default,jax:float32,decode:bfloat16,decode:float32,torch:max-autotune-no-cudagraphs"
_RUNS = flags.DEFINE_list("runs", _ALL, "jax:DTYPE, torch:MODE (of torch.compile, or eager) and decode:DTYPE.")
_BATCHES = flags.DEFINE_list("batches", "16,32,64,128", "Pictures encoded at once.")
_CALLS = flags.DEFINE_integer("calls", 10, "Calls a timing, of which there are three.", lower_bound=1)
_QUICK = flags.DEFINE_bool("quick", False, "One batch size, jax:bfloat16 and torch:default only, half the calls.")
_TINY = flags.DEFINE_bool("tiny", False, "A tiny network on small pictures, to try this script anywhere.")
_PROFILE = flags.DEFINE_bool("profile", False, "Also the time of each kernel, of encoding.")
_OUTPUT = define_path("output", "vae.json", "JSON file.")
_ONE = flags.DEFINE_string("one", None, "A single run in this process; prints a line of JSON for each row.")
_SCRATCH = define_path("scratch", None, "Folder of the outputs that a single run leaves for comparison.")

_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # of the largest value; another network is off by more than 1
_PACKAGES = ("jax", "jaxlib", "numpy", "torch", "nvidia-cudnn-cu13")


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    if _ONE.value:
        for row in measure(_ONE.value):
            print("row " + json.dumps(row), flush=True)
        return
    content = {
        "command": " ".join(["python -m benchmarks.vae", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "python": sys.version.split()[0],
        "versions": versions(*_PACKAGES),
        "tflop_a_picture": encode_flops(_config(), _side(), _side()) / 1e12,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        for run in _runs():
            for row in _in_own_process(run, scratch):
                content["rows"].append(row)
                if "kernels" not in row:
                    print(json.dumps(row), flush=True)
                pathlib.Path(_OUTPUT.value).write_text(json.dumps(content, indent=1) + "\n")
        content["differences"] = compare(pathlib.Path(scratch))
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(content, indent=1) + "\n")
    print(table(content), flush=True)
    for run, difference in content["differences"].items():
        if not difference < _TOLERANCE["float32" if "float32" in run else "bfloat16"]:
            raise UserError(f"{run} is off by {difference:.2g} of the largest value: not the same network")
    if any("failed" in row for row in content["rows"]):
        raise UserError("a run failed: see the lines above")


def measure(run: str) -> Iterator[dict]:
    """The rows of one run."""
    kind, _, what = run.partition(":")
    for row in {"jax": measure_jax, "torch": measure_torch, "decode": measure_decode}[kind](what):
        yield {"run": run, **row}


def measure_jax(dtype: str) -> Iterator[dict]:
    """Encoding by `terdit_jax.model.vae`, each batch size; first the device's matmul rate."""
    yield {"device": jax.devices()[0].device_kind, "matmul_tflops": measure_matmul_rate() / 1e12}
    config = _config()
    params = jax.device_put(encoder_params(random_params(config), dtype))
    for batch in _batches():
        pictures = jax.device_put(random_pictures(batch))
        compiled, row = _compile(encode, config, params, pictures, dtype)
        _save(f"jax:{dtype}", *(np.asarray(output[:2]) for output in compiled(params, pictures)))
        yield row | _rate(partial(compiled, params, pictures), batch)
        if _PROFILE.value:
            yield {"batch": batch, "kernels": profile(compiled, params, pictures)}


def measure_decode(dtype: str) -> Iterator[dict]:
    """Decoding, with the batch sizes that `decode_all` takes."""
    config = _config()
    params = jax.device_put(decoder_params(random_params(config), dtype))
    for side, batch in ((_side(), 8), (2 * _side(), 2)):
        latent_side = side // config.downsampling
        latents = jax.device_put(_normal((batch, latent_side, latent_side, config.latent_channels), 2))
        compiled, row = _compile(decode, config, params, latents, dtype)
        yield row | {"side": side} | _rate(partial(compiled, params, latents), batch)


def measure_torch(mode: str) -> Iterator[dict]:
    """Encoding by the same network in PyTorch: bfloat16, channels last, torch.compile in this mode."""
    import torch

    from benchmarks.torch_vae import make_encoder, to_torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # of the float32 that others are compared with
    config = _config()
    params = random_params(config)
    with torch.inference_mode():
        exact = make_encoder(config, params, torch.float32, device)(to_torch(random_pictures(2), device))
        _save("reference", *(output.permute(0, 2, 3, 1).cpu().numpy() for output in exact))
        torch.backends.cudnn.benchmark = True
        encoder = make_encoder(config, params, torch.bfloat16, device)
        for batch in _batches():
            torch.compiler.reset()
            run = encoder if mode == "eager" else torch.compile(encoder, mode=mode, dynamic=False, fullgraph=True)
            pictures = to_torch(random_pictures(batch), device)
            begin = time.perf_counter()
            outputs = run(pictures)
            _save(f"torch:{mode}", *(output[:2].permute(0, 2, 3, 1).cpu().numpy() for output in outputs))
            row = {"batch": batch, "compile_seconds": time.perf_counter() - begin, "memory_gb": None}
            wait = torch.cuda.synchronize if device == "cuda" else None
            if wait:
                torch.cuda.reset_peak_memory_stats()
            row |= _rate(partial(run, pictures), batch, wait)
            if wait:
                row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            yield row
            if _PROFILE.value and wait:
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
                    for _ in range(3):
                        run(pictures)
                    wait()
                times = {event.key: event.self_device_time_total / 3e3 for event in trace.key_averages()}
                yield {"batch": batch, "kernels": _longest(times)}


def measure_matmul_rate() -> float:
    """FLOP/s of dense bfloat16 matmuls of random data."""
    size, repeats = (8192, 30) if jax.default_backend() != "cpu" else (512, 2)
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    matmul = jax.jit(lambda a, b: a @ b)
    return _rate(lambda: [matmul(a, b) for _ in range(repeats)], 2 * repeats * size**3)["images_per_second"]


def profile(compiled: Callable, params: dict, pictures: Array) -> dict[str, float]:
    """Milliseconds a call of the kernels that take longest; empty where the profiler says nothing of a device."""
    times: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([compiled(params, pictures) for _ in range(3)])
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
            for line in plane.lines if plane.name.startswith("/device:") else ():
                for event in line.events if line.name.startswith("Stream") else ():
                    times[event.name] = times.get(event.name, 0) + event.duration_ns / 3e6
    return _longest(times)


def random_params(config: VAEConfig) -> dict:
    """Weights that keep the size of activations; the same for all."""
    generator = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = generator.standard_normal(leaf.shape, np.float32)
        if leaf.ndim == 1:
            return 0.1 * noise + np.float32("norm" in path[-2].key and path[-1].key == "weight")
        return noise / np.float32(np.sqrt(leaf.size / leaf.shape[0]))

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def random_pictures(batch: int) -> np.ndarray:
    """(batch, H, W, 3) float32 about [-1, 1], the first two the same for every batch size."""
    return np.concatenate([_normal((2, _side(), _side(), 3), 1), _normal((batch, _side(), _side(), 3), 2)])[:batch] / 2


def compare(scratch: pathlib.Path) -> dict[str, float]:
    """The largest difference of each run's outputs from the reference's, of the reference's largest value.

    A run of one picture at a time has one to compare.
    """
    if not (scratch / "reference.npz").exists():
        return {}
    outputs = {path.stem: dict(np.load(path)) for path in scratch.glob("*.npz")}
    reference = outputs.pop("reference")

    def difference(given: np.ndarray, exact: np.ndarray) -> float:
        return float(np.abs(given - exact[: len(given)]).max() / np.abs(exact).max())

    return {
        run: max(difference(given[name], exact) for name, exact in reference.items())
        for run, given in sorted(outputs.items())
    }


def table(content: dict) -> str:
    """The rows as Markdown, with the ratio to the fastest torch run of the same batch size."""
    rows = content["rows"]
    rate = next((row["matmul_tflops"] for row in rows if "matmul_tflops" in row), None)
    peers: dict[int, float] = {}
    for row in rows:
        if row["run"].startswith("torch:") and "images_per_second" in row:
            peers[row["batch"]] = max(row["images_per_second"], peers.get(row["batch"], 0))
    lines = [
        "| run | px | batch | images/s | TFLOP/s | of matmuls | of fastest torch | memory GB | compile s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['run']} | failed: {row['failed']} |")
        elif "images_per_second" in row:
            images, encodes = row["images_per_second"], "side" not in row
            tflops = content["tflop_a_picture"] * images if encodes else None
            share = tflops / rate if tflops and rate else None
            peer = images / peers[row["batch"]] if encodes and row["batch"] in peers else None
            cells = [row["run"], row.get("side", _side()), row["batch"], f"{images:.1f}"]
            cells += [_cell(tflops, ".1f"), _cell(share, ".1%"), _cell(peer, ".2f"), _cell(row["memory_gb"], ".2f")]
            lines.append("| " + " | ".join(map(str, [*cells, f"{row['compile_seconds']:.0f}"])) + " |")
    lines.append(f"{content['tflop_a_picture']:.3f} TFLOP a picture; bfloat16 matmuls: {_cell(rate, '.0f')} TFLOP/s")
    lines += [f"{run}: off by {value:.1e} of the largest value" for run, value in content["differences"].items()]
    return "\n".join(lines)


def _compile(function: Callable, config: VAEConfig, params: dict, x: Array, dtype: str) -> tuple[Callable, dict]:
    """The compiled function of (params, x), and what is known before it runs: memory is arguments, results, scratch."""
    begin = time.perf_counter()
    compiled = jax.jit(lambda params, x: function(config, params, x, jnp.dtype(dtype))).lower(params, x).compile()
    seconds, plan = time.perf_counter() - begin, compiled.memory_analysis()
    planned = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return compiled, {"batch": len(x), "compile_seconds": seconds, "memory_gb": planned / 1e9}


def _rate(call: Callable[[], object], count: float, wait: Callable[[], None] | None = None) -> dict[str, float]:
    """Median of three timings, each of some calls in a row, after two calls."""
    calls = max(1, _CALLS.value // (2 if _QUICK.value else 1))

    def timed(calls: int) -> float:
        begin = time.perf_counter()
        outputs = [call() for _ in range(calls)]
        wait() if wait else jax.block_until_ready(outputs)
        return (time.perf_counter() - begin) / calls

    timed(2)
    return {"images_per_second": count / float(np.median([timed(calls) for _ in range(3)]))}


def _in_own_process(run: str, scratch: str) -> Iterator[dict]:
    command = [sys.executable, "-m", "benchmarks.vae", f"--one={run}", f"--scratch={scratch}"]
    command += [f"--batches={','.join(map(str, _batches()))}", f"--calls={_CALLS.value}"]
    command += [f"--quick={_QUICK.value}", f"--tiny={_TINY.value}", f"--profile={_PROFILE.value}"]
    environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if run.startswith("torch") else {})
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("row "):
                yield json.loads(line[4:])
    if process.returncode:
        yield {"run": run, "failed": f"status {process.returncode}"}


def _runs() -> list[str]:
    for run in _RUNS.value:
        kind, _, what = run.partition(":")
        if not (what in _TOLERANCE if kind in ("jax", "decode") else kind == "torch" and what):
            raise UserError(f"--runs: {run!r} is none of jax:DTYPE, torch:MODE, decode:DTYPE (float32 or bfloat16)")
    return _RUNS.value[:2] if _QUICK.value else _RUNS.value


def _batches() -> list[int]:
    if not all(batch.isdecimal() and int(batch) for batch in _BATCHES.value):
        raise UserError(f"--batches={','.join(_BATCHES.value)}: must be positive integers")
    return [64] if _QUICK.value and not _BATCHES.present else [int(batch) for batch in _BATCHES.value]


def _config() -> VAEConfig:
    return VAEConfig(block_out_channels=(32, 64), norm_num_groups=8) if _TINY.value else VAEConfig()


def _side() -> int:
    return 16 if _TINY.value else 256


def _normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _save(name: str, mean: np.ndarray, std: np.ndarray) -> None:
    if _SCRATCH.value:
        np.savez(pathlib.Path(_SCRATCH.value) / f"{name}.npz", mean=mean, std=std)


def _longest(times: dict[str, float]) -> dict[str, float]:
    return dict(sorted(times.items(), key=lambda item: -item[1])[:30]) | {"all": sum(times.values())}


def _cell(value: float | None, format_spec: str) -> str:
    return "" if value is None else format(value, format_spec)


if __name__ == "__main__":
    run_command(main)
