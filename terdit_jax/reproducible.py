"""Pins the settings of JAX that change what a seed draws or in which dtype it is computed, and makes the keys of draws.

Commands pin them for the whole process, the library's entry points while they run; whatever JAX_* variables or
`jax.config` say, the same seed gives the same numbers. Settings that only round otherwise (matmul precision, compiler
flags) are left to the user.
"""

from collections.abc import Iterator
import contextlib
import sys

import jax
from jax import Array
import numpy as np

PRNG = "threefry2x32"
# Those with a context manager of this name in `jax`, and its value.
_SCOPED = {
    "enable_x64": False,  # draws, tables and sums would be of 64 bits
    "default_prng_impl": PRNG,
    "threefry_partitionable": True,  # another order of the bits
    "numpy_dtype_promotion": "standard",
    "numpy_rank_promotion": "allow",
}
_SETTINGS = {f"jax_{name}": value for name, value in _SCOPED.items()} | {"jax_random_seed_offset": 0}


def pin_settings() -> None:
    """Pins the settings for this process, and says which ones were others."""
    for name, value in _SETTINGS.items():
        if (given := getattr(jax.config, name)) != value:
            line = f"{name.upper()}={given} has no effect: numbers are drawn and computed with {value}"
            print(line, file=sys.stderr, flush=True)
            jax.config.update(name, value)


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Pins the settings in its body, or as `@pinned()` in a function's, in this thread alone."""
    with contextlib.ExitStack() as stack:
        for name, value in _SCOPED.items():
            if getattr(jax.config, f"jax_{name}") != value:  # entering it regardless would compile again
                stack.enter_context(getattr(jax, name)(value))
        yield


def make_key(seed: int | Array) -> Array:
    """The key () of a seed."""
    return jax.random.key(seed, impl=PRNG)


def key_bits(seed: int) -> np.ndarray:
    """The key of a seed as (2,) uint32, for programs that take it as an argument: one for all seeds."""
    return np.asarray(jax.random.key_data(make_key(seed)))
