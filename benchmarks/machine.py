"""Parts that benchmarks share: configurations, turns on devices, their matmul rate and their kernels' times."""

import ast
from collections.abc import Callable, Iterator, Sequence
import contextlib
import fcntl
import os
import pathlib
import tempfile
import time

import numpy as np

from terdit_jax.config import RunConfig, freeze
from terdit_jax.config_file import load_config
from terdit_jax.errors import UserError


def load_changed(text: str) -> RunConfig:
    """The configuration of "PATH[@FIELD=VALUE...]", named by its changes too."""
    path, *changes = text.split("@")
    config = freeze(load_config(path))
    for change in changes:
        field, _, value = change.partition("=")
        try:
            name = f"{config.name}, {field.rpartition('.')[2]}={value}"
            config = config.with_fields({field: ast.literal_eval(value), "name": name})
        except (UserError, ValueError, SyntaxError) as error:
            raise UserError(f"{text}: {change!r} is no FIELD=VALUE of the configuration") from error
    return config


def parse_run(text: str) -> tuple[RunConfig, list[int] | None]:
    """A configuration and batches from "PATH[:input_size=N][@BATCH/BATCH...]".

    Another input size makes another name: latents of 64 are pictures of 512 px.
    """
    path, _, batches = text.partition("@")
    path, _, override = path.partition(":")
    config = freeze(load_config(path))
    if override:
        field, _, size = override.partition("=")
        if field != "input_size" or not size.isdigit():
            raise UserError(f"--configs={text}: only :input_size=N can be set, a latent's height")
        config = config.with_fields({"model.input_size": int(size), "name": f"{config.name}_{8 * int(size)}"})
    return config, [int(batch) for batch in batches.split("/")] if batches else None


def measure_matmul_rate(size: int = 8192, repeats: int = 30) -> float:
    """FLOP/s a device of dense bf16 matmuls of random data, in JAX."""
    import jax
    import jax.numpy as jnp

    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    matmul = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(matmul(a, b))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready([matmul(a, b) for _ in range(repeats)])
        times.append((time.perf_counter() - begin) / repeats)
    return 2 * size**3 / float(np.median(times))


def kernel_times(run: Callable[[], object], num_steps: int, most: int = 40) -> dict[str, list[float]]:
    """Microseconds and launches a step of the GPU kernels that take longest, over one traced call of `run`."""
    import jax

    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
            for line in plane.lines if plane.name.startswith("/device:") else ():
                for event in line.events if line.name.startswith("Stream") else ():
                    entry = times.setdefault(event.name, [0.0, 0.0])
                    entry[0] += event.duration_ns / 1e3 / num_steps
                    entry[1] += 1 / num_steps
    return dict(sorted(times.items(), key=lambda item: -item[1][0])[:most])


@contextlib.contextmanager
def locked(path: str | None, shared: bool = False) -> Iterator[None]:
    """Holds a lock on a file, if there is one to hold, alone or with others: processes that take turns on a device."""
    if path is None:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


def on_devices(numbers: Sequence[int]) -> dict[str, str]:
    """The environment of a process that sees only these of the GPUs that this one sees, and takes memory as it needs
    it; where there are no GPUs, nothing comes of it."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = [visible[number] if visible else str(number) for number in numbers]
    memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    return memory | dict(os.environ) | {"CUDA_VISIBLE_DEVICES": ",".join(names)}


def share_devices(folder: str, numbers: Sequence[int]) -> list[int]:
    """Waits until nobody has one of the devices to himself, and keeps it so.

    Returns:
      Open files, to be handed to the process that will call `take_turn`, and closed here.
    """
    files = [os.open(f"{folder}/device{number}", os.O_RDWR | os.O_CREAT) for number in sorted(numbers)]
    for file in files:
        fcntl.flock(file, fcntl.LOCK_SH)
    return files


def take_turn(files: Sequence[int]) -> None:
    """Waits for devices that are shared until this process, up to its end, has them to itself.

    Args:
      files: of `share_devices`.
    """
    for file in files:  # all are given up before the first is waited for: two processes never wait for each other
        fcntl.flock(file, fcntl.LOCK_UN)
    for file in files:
        fcntl.flock(file, fcntl.LOCK_EX)
