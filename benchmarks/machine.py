"""What benchmarks share: a configuration from its file, versions, the device's matmul rate, a lock on the device."""

from collections.abc import Iterator
import contextlib
import fcntl
import importlib.metadata
import importlib.util
import time

from ml_collections import ConfigDict
import numpy as np


def load_config(path: str) -> ConfigDict:
    """The configuration in a file, as of configs/."""
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


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


@contextlib.contextmanager
def locked(path: str | None) -> Iterator[None]:
    """Holds an exclusive lock on a file, if there is one to hold: processes that take turns on a device."""
    if path is None:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
