"""Activations as operands of matmuls in 8 bits: each token on a scale of its own.

Codes -1, 0 and 1 are exact in 8 bits, so these are the only numbers that a ternary matmul in 8 bits rounds.
"""

from flax import struct
from jax import Array
import jax.numpy as jnp
from jax.typing import DTypeLike

TINY = 1e-12  # keeps the scale of a row of zeros from being zero


@struct.dataclass
class Rows:
    """A row a token on its way into or out of a matmul under training. values: (..., W), eight: (..., W) of 8 bits or
    None, scale: (...,) float32 or None.

    An operand is `values`, and in 8 bits scale times `eight`; without `eight`, the matmul rounds it itself. A product
    is scale times `values`, or `values` without a scale; its `eight` are zeros that nobody reads.

    Derivatives turn one into the other: what is passed back to a product (of scale times `values`) is an operand of
    the backward matmuls, and what is passed back to an operand is their product. So the passes that make a gradient
    round it, and those that read one scale it, where otherwise both would take passes of their own. Neither form can
    be added to another: what is differentiated reads an operand or a product once.
    """

    values: Array
    eight: Array | None = None
    scale: Array | None = None

    def in_8_bits(self, dtype: DTypeLike, num_axes: int = 1) -> tuple[Array, Array]:
        """What an operand is in 8 bits, and its scale: as it comes with them, or else as `quantize` makes them."""
        return (self.eight, self.scale) if self.eight is not None else quantize(self.values, dtype, num_axes)

    def kept(self, scale: Array | None = None) -> "Rows":
        """What a backward pass keeps: `values`, of `eight` no more than that there are some, and `scale` if it reads
        that."""
        return Rows(self.values, None if self.eight is None else jnp.zeros((0,), self.eight.dtype), scale)


def quantize(h: Array, dtype: DTypeLike, num_axes: int = 1) -> tuple[Array, Array | None]:
    """Activations as matmul operands.

    Args:
      h: (..., in) float.
      dtype: of the operand: float32 or bfloat16, which take no scale, float8_e4m3fn or int8.
      num_axes: how many of the last axes share a scale.

    Returns:
      (..., in) in `dtype`, and (...) float32 without those axes, what an operand of one stands for there: the largest
      magnitude over the largest number of `dtype`; None without a scale.
    """
    dtype = jnp.dtype(dtype)
    if dtype.itemsize > 1:
        return h.astype(dtype), None
    axes = tuple(range(-num_axes, 0))
    h = h.astype(jnp.float32)
    largest = float(jnp.iinfo(dtype).max if dtype == jnp.int8 else jnp.finfo(dtype).max)
    scale = jnp.maximum(jnp.max(jnp.abs(h), axis=axes), TINY) * (1 / largest)
    h = h * jnp.expand_dims(1 / scale, axes)
    # The largest may round up past what the dtype holds.
    h = jnp.clip(jnp.round(h) if dtype == jnp.int8 else h, -largest, largest)
    return h.astype(dtype), scale
