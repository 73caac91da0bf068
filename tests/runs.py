"""Small training runs for tests that need one: a shrunken digits configuration, and commands as a user starts them."""

import atexit
from collections.abc import Mapping
import concurrent.futures
import contextlib
import functools
import json
import os
from pathlib import Path
import shutil
import socket
import subprocess
import tempfile

import jax
import numpy as np

from terdit_jax.checkpoints.manifest import MANIFEST
from terdit_jax.checkpoints.reader import Checkpoints
from terdit_jax.config import freeze
from terdit_jax.data.builder import build
from terdit_jax.data.codec import PixelCodec
from terdit_jax.data.sources import make_digits_source
from terdit_jax.model.config import DiTConfig
from terdit_jax.parallel.mesh import make_mesh
from terdit_jax.training.optimizer import make_optimizer
from terdit_jax.training.state import abstract_state
from tests.forked import Command, programs, python_on_path

ROOT = Path(__file__).parents[1]
# Runs of a few steps spend their time compiling: LLVM need not optimise. JAX 0.11 knows fusion emitters alone.
FAST_COMPILATION = "--xla_backend_optimization_level=0"
if jax.__version__.startswith("0.10."):
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
# configs/digits.py, made small enough that a step takes milliseconds.
SHRUNKEN = {
    "model.hidden_size": 32,
    "model.depth": 2,
    "model.ffn_multiple_of": 32,
    "train.num_steps": 40,
    "train.batch_size": 16,
    "optimizer.drop_step": 30,
    "optimizer.spike_sigma": 0.7,  # so that some steps are skipped, and runs that resume must skip the same
    "optimizer.spike_window": 6,
    "checkpoint.every": 6,
    "log.every": 4,
    "log.heldout_every": 20,
    "log.heldout_batches": 1,
    "log.samples_every": 0,
    "log.writers": "",
    "sample.num_steps": 5,
    "sample.num_images": 4,
}


def prepare_digits(path: Path) -> Path:
    build(make_digits_source(), path, codec=PixelCodec())
    return path


def start(module: str, *arguments: str, cache: Path, environment: Mapping[str, str] | None = None) -> Command:
    """A command in a process of its own, on one CPU device, with compiled programs kept in `cache`."""
    return Command(
        quick_python() / "server", ["-m", f"terdit_jax.{module}", *arguments],
        folder=ROOT, environment=command_environment(cache) | (environment or {}),
    )  # fmt: skip


def execute(
    module: str, *arguments: str, status: int = 0, environment: Mapping[str, str] | None = None
) -> tuple[str, str]:
    """Runs a command to its end with the programs of those before it; as `finish`."""
    return finish(start(module, *arguments, cache=programs(), environment=environment), status)


def completed(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Like `execute`, whatever the status."""
    process = start(module, *arguments, cache=programs())
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.arguments, process.returncode, out, err)


def command_environment(cache: Path) -> dict[str, str]:
    """The environment of commands: one CPU device, programs compiled quickly and kept in `cache`."""
    # With VENV, launch scripts would install their checkout into the environment that the tests run in.
    inherited = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "VENV")}
    return inherited | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": FAST_COMPILATION,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }


@functools.cache
def quick_python() -> Path:
    """A folder for the PATH whose `python` forks commands from one process, for as long as this one lives."""
    folder, ending = Path(tempfile.mkdtemp(prefix="commands_")), contextlib.ExitStack()
    atexit.register(ending.close)
    ending.callback(shutil.rmtree, folder, ignore_errors=True)
    return ending.enter_context(python_on_path(folder, command_environment(programs())))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start_together(
    module: str, arguments: list[str], *, processes: int, cache: Path, devices: int = 2
) -> list[Command]:
    """The same command in processes that jax.distributed joins on loopback, each with `devices` CPU devices.

    One process is started alone, as a user starts one.
    """
    flags = f"{FAST_COMPILATION} --xla_force_host_platform_device_count={devices}"
    if processes == 1:
        return [start(module, *arguments, cache=cache, environment={"XLA_FLAGS": flags})]
    address = f"localhost:{free_port()}"
    common = {"XLA_FLAGS": flags, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    return [
        start(module, *arguments, cache=cache, environment=common | {"JAX_PROCESS_ID": str(process)})
        for process in range(processes)
    ]


def finish_together(processes: list[Command]) -> list[tuple[str, str]]:
    """Waits for all, checks that each ended with status 0, and returns what each printed."""
    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(finish, processes))


def finish(process: Command, status: int = 0) -> tuple[str, str]:
    """Waits for a command, checks its exit status, and returns what it printed on stdout and stderr."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
    return out, err


def train_arguments(data: Path, workdir: Path, **overrides) -> list[str]:
    """Flags of terdit_jax.main for the shrunken run; overrides use __ for a dot."""
    fields = {**SHRUNKEN, "data.dir": data, **{name.replace("__", "."): value for name, value in overrides.items()}}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["--config=configs/digits.py", f"--workdir={workdir}", *flags]


def saved_run(workdir: Path) -> tuple[dict, dict]:
    """The newest state of a workdir, as host arrays, and its JSON."""
    checkpoints = Checkpoints(workdir)
    run = checkpoints.newest_run()
    config = freeze(run["config"])
    model, optimizer, mesh = DiTConfig.from_config(config), make_optimizer(config.optimizer), make_mesh(config.mesh)
    target = abstract_state(model, optimizer, mesh, taught=bool(config.train.teacher))
    state, run = checkpoints.restore(target)
    return jax.tree.map(np.asarray, state), run


def metrics_without_timing(workdir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "timing"} for line in lines]


def logged_steps(workdir: Path) -> list[int]:
    """The steps that a run has logged so far; none where a line is being written."""
    try:
        return [line["step"] for line in metrics_without_timing(workdir)]
    except (FileNotFoundError, ValueError):
        return []


def signed_steps(workdir: Path) -> list[int]:
    """The steps whose saves are complete: the manifest is written last, after the asynchronous save."""
    return sorted(int(manifest.parent.name) for manifest in workdir.glob(f"checkpoints/[0-9]*/{MANIFEST}"))


def assert_same_run(workdir: Path, expected: Path) -> None:
    """Parameters, EMA, moments, counters and metrics (timings aside) equal bit for bit."""
    (state, run), (expected_state, expected_run) = saved_run(workdir), saved_run(expected)
    assert run["step"] == expected_run["step"]
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)
    assert metrics_without_timing(workdir) == metrics_without_timing(expected)
