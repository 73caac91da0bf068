r"""Seconds and memory of a guided network call on a CPU, ours beside the PyTorch module, from one and the same file.

python -m benchmarks.cpu_inference --models=models/cifar10.safetensors --output=cifar10_cpu.json
python -m benchmarks.cpu_inference --models=configs/terdit_600m.py --batches=1 --output=600m_cpu.json

A call is of two rows an image, its class and the null class, modulations included; a step of ours while it draws finds
them worked out before the loop. A configuration becomes a packed file of random codes first. Every way is a process of
its own; when all have compiled they take turns, two calls at a time of which the second is timed, so that what else the
machine does meets all alike.
Medians of wall and processor seconds; `peak_mb` is the most that the process ever held, loading and compiling included.
"""

from collections.abc import Callable, Iterator, Sequence
import datetime
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

from absl import flags
import numpy as np

from benchmarks.machine import load_changed, locked
from terdit_jax.errors import UserError, run_command
from terdit_jax.paths import define_path
from terdit_jax.versions import versions

_MODELS = flags.DEFINE_list("models", None, "Artifacts, or configurations of which one is made.")
_WAYS = flags.DEFINE_list(
    "ways",
    "ours float32,ours exact float32,torch float32,torch compiled float32,"
    "ours bfloat16,ours exact bfloat16,torch bfloat16,torch compiled bfloat16",
    "What is compared; `torch packed DTYPE` too.",
)
_BATCHES = flags.DEFINE_list("batches", "1,4", "Images at once.")
_TURNS = flags.DEFINE_integer("turns", 7, "Calls of each way that are timed.", lower_bound=1)
_OUTPUT = define_path("output", "cpu_inference.json", "JSON file.")
_LOCK = define_path("lock", None, "File that is locked while calls are timed.")
_ONE = flags.DEFINE_string("one", None, "Of one way, model and batch: a call for each line of the standard input.")


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    if not _MODELS.value:
        raise UserError("--models is missing, e.g. --models=models/cifar10.safetensors")
    if _ONE.value:
        return _serve(_ONE.value, _MODELS.value[0], int(_BATCHES.value[0]))
    with open("/proc/cpuinfo") as file:
        name = next((line.partition(": ")[2].strip() for line in file if line.startswith("model name")), "unknown")
    content = {
        "command": " ".join(["python -m benchmarks.cpu_inference", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "cpu": f"{len(os.sched_getaffinity(0))} cores of {name}",
        "python": sys.version.split()[0],
        "versions": versions("jax", "jaxlib", "numpy", "torch"),
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for model in _MODELS.value:
            path = model if model.endswith(".safetensors") else _make_artifact(model, folder)
            for batch in _BATCHES.value:
                for row in _compare(path, batch):
                    content["rows"].append({"model": pathlib.Path(model).stem, "images": int(batch), **row})
                    print({k: v for k, v in content["rows"][-1].items() if k != "turns"}, flush=True)
                    pathlib.Path(_OUTPUT.value).write_text(json.dumps(content, indent=1) + "\n")


def _make_artifact(config: str, folder: str) -> str:
    """Writes a packed model of random codes, in a process of its own: what it takes is no part of what is measured."""
    path = f"{folder}/{pathlib.Path(config).stem}.safetensors"
    code = f"from benchmarks import cpu_inference; cpu_inference.write_random({config!r}, {path!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    return path


def write_random(config: str, path: str) -> None:
    """Writes the artifact of a configuration, of random codes and of scales that keep the size of activations."""
    from terdit_jax.interop.description import Description, architecture
    from terdit_jax.interop.exports import export
    from terdit_jax.interop.published import model_leaves
    from terdit_jax.interop.weights import Weights
    from terdit_jax.ternary.packing import pack

    run = load_changed(config)
    model, rng = architecture(run.model), np.random.default_rng(0)

    def leaves() -> Iterator[tuple[str, np.ndarray]]:
        for leaf in model_leaves(model):
            if leaf.ternary:
                yield (
                    leaf.path,
                    np.stack([pack(rng.integers(-1, 2, shape, np.int8)) for shape in [leaf.shape[1:]] * leaf.shape[0]]),
                )
            elif leaf.path.endswith(("alpha", "scale")):
                yield leaf.path, np.full(leaf.shape, 0.02 if leaf.path.endswith("alpha") else 1, np.float32)
            else:
                yield leaf.path, 0.02 * rng.standard_normal(leaf.shape, np.float32)

    described = Description(run.name, model, True, 0, "none", 1.0, run.sample, {}, run.diffusion)
    export(Weights("random", described, leaves, masters=False), path, "packed")


def _compare(path: str, batch: str) -> Iterator[dict]:
    """A row for each way."""
    processes = []
    for way in _WAYS.value:
        command = [sys.executable, "-m", "benchmarks.cpu_inference", f"--one={way}", f"--models={path}"]
        command.append(f"--batches={batch}")
        with locked(_LOCK.value, shared=True):  # one compiles at a time
            processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            _answer(processes[-1])
    times: list[list[list[float]]] = [[] for _ in processes]
    with locked(_LOCK.value):
        for _ in range(_TURNS.value):
            for process, seconds in zip(processes, times, strict=True):
                print(file=process.stdin, flush=True)
                seconds.append(_answer(process))
    for way, process, seconds in zip(_WAYS.value, processes, times, strict=True):
        process.stdin.close()
        wall, processor = np.median(seconds, axis=0).tolist()
        yield {"way": way, "seconds": wall, "processor_seconds": processor, **_answer(process), "turns": seconds}
        process.wait()


def _answer(process: subprocess.Popen) -> list | dict:
    for line in process.stdout:
        if line.startswith("answer "):
            return json.loads(line[7:])
    raise UserError(f"{' '.join(process.args)} ended with status {process.wait()}")


def _serve(way: str, path: str, batch: int) -> None:
    begin = time.perf_counter()
    call = (_ours if way.startswith("ours") else _torch)(way.split(), path, batch)
    for _ in range(2):
        call()
    start = time.perf_counter() - begin
    print("answer []", flush=True)
    for _ in sys.stdin:
        call()  # what the others left in the caches is no part of it
        begin, processor = time.perf_counter(), time.process_time()
        call()
        print("answer", json.dumps([time.perf_counter() - begin, time.process_time() - processor]), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print("answer", json.dumps({"peak_mb": peak, "start_seconds": start}), flush=True)


def _ours(words: list[str], path: str, batch: int) -> Callable[[], object]:
    import jax

    from terdit_jax.inference.runtime import load_model

    model = load_model(path, dtype=words[-1], mode=words[1] if len(words) > 2 else "auto")
    x_t = jax.random.normal(jax.random.key(0), (2 * batch, *model.config.sample_shape))
    t, y = np.full(2 * batch, 500), np.repeat([0, model.config.num_classes], batch)
    return lambda: jax.block_until_ready(model(x_t, t, y))


def _torch(words: list[str], path: str, batch: int) -> Callable[[], object]:
    import torch

    from terdit_jax.interop.pytorch import load

    model = load(path, dtype=getattr(torch, words[-1]), packed="packed" in words)
    size, classes = model.fields["input_size"], model.fields["num_classes"]
    x = torch.randn(2 * batch, model.fields["in_channels"], size, size)
    t, y = torch.full((2 * batch,), 500), torch.tensor([0, classes]).repeat_interleave(batch)
    network = torch.compile(model, dynamic=False) if "compiled" in words else model

    def call() -> object:
        with torch.inference_mode():
            return network(x, t, y)

    return call


if __name__ == "__main__":
    run_command(main)
