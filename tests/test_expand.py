"""Packed codes become the numbers of matmuls exactly, in every dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.fast.expand import expand
from terdit_jax.ternary.packing import pack, unpack

EVERY_BYTE = np.stack(np.meshgrid(*[[-1, 0, 1]] * 4, indexing="ij"), axis=-1).reshape(3, -1).astype(np.int8)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8", "bfloat16", "float32"])
def test_every_byte_is_expanded_exactly(dtype):
    numbers = jax.jit(expand, static_argnums=1)(pack(EVERY_BYTE), dtype)
    assert (numbers.shape, numbers.dtype) == (EVERY_BYTE.shape, jnp.dtype(dtype))
    np.testing.assert_array_equal(numbers.astype(jnp.float32), EVERY_BYTE)


def test_leading_axes_stay():
    codes = np.random.default_rng(0).integers(-1, 2, (2, 3, 5, 8)).astype(np.int8)
    np.testing.assert_array_equal(expand(pack(codes), "int8"), unpack(pack(codes)))
