"""2-bit codes straight to the numbers that matmuls read; equal to `ternary.packing.unpack` and a cast.

`packing` defines the packing. Each packed byte becomes a whole word by integer arithmetic: four bytes of fp8 or
int8, two halves of bf16, so that the compiler's loop reads and writes words.
"""

import jax
from jax import Array
import jax.numpy as jnp
from jax.typing import DTypeLike

from terdit_jax.ternary.packing import CODES_PER_BYTE, unpack

# 1.0 and the sign bit, in one byte each. The upper byte of bf16 has its own: 1.0 is 0x3f80.
_ONE = {jnp.dtype(jnp.float8_e4m3fn): 0x38, jnp.dtype(jnp.float8_e5m2): 0x3C, jnp.dtype(jnp.int8): 0x01}


def expand(packed: Array, dtype: DTypeLike) -> Array:
    """Unpacks (..., in / 4) uint8 of `packing.pack` to (..., in) numbers -1, 0 and 1 of `dtype`, all exact.

    Args:
      packed: 2-bit codes.
      dtype: float8_e4m3fn, float8_e5m2 or int8, expanded as words; any other by way of int8.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in _ONE:
        return unpack(packed).astype(dtype)
    word = packed.astype(jnp.uint32)
    pairs = (word | word << 6 | word << 12 | word << 18) & 0x03030303  # code + 1 in each byte
    nonzero = (pairs ^ 0x01010101) & 0x01010101
    negative = nonzero & ~(pairs >> 1)
    if dtype == jnp.int8:
        word = nonzero | negative * 0xFE  # two's complement: 0xff is -1
    else:
        word = nonzero * _ONE[dtype] | negative << 7
    quads = jax.lax.bitcast_convert_type(word, dtype)  # (..., in / 4, 4), the lowest byte first
    return quads.reshape(*packed.shape[:-1], packed.shape[-1] * CODES_PER_BYTE)
