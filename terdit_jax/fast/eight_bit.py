"""Matmuls with codes in 8 bits; equal to `ternary.linear.code_product` and `input_gradient` but for rounding.

Codes -1, 0 and 1 are exact in 8 bits, so the only numbers rounded are the activations, each token on a scale of its
own, and their gradients.
"""

from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.typing import DTypeLike

SAME = "same"  # matmul dtype: that of the activations
SCALE = "scale"  # name under which policies of rematerialisation know a product's scale
TINY = 1e-12  # keeps the scale of a row of zeros from being zero


def quantize(h: Array, dtype: DTypeLike, num_axes: int = 1) -> tuple[Array, Array | None]:
    """Rounds activations to the dtype of a matmul.

    Args:
      h: (..., in) float.
      dtype: float32 or bfloat16, which take no scale, float8_e4m3fn or int8.
      num_axes: how many of the last axes share a scale.

    Returns:
      (..., in) in `dtype`, and the scale (...) float32 without those axes, by which they are to be multiplied: the
      largest magnitude over the largest number of `dtype`; None without a scale.
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


def apply_scale(values: Array, scale: Array | None, dtype: DTypeLike) -> Array:
    """values (..., W) times scale (...,) float32, in `dtype`; the values alone without a scale."""
    return values.astype(dtype) if scale is None else (values.astype(jnp.float32) * scale[..., None]).astype(dtype)


def rounded_product(x: Array, codes: Array, matmul_dtype: str) -> Array:
    """x T^T with x rounded token by token: (..., in) times (n, out, in) -> (..., n, out) in x's dtype."""
    rounded, scale = quantize(x, matmul_dtype)
    scale = checkpoint_name(scale, SCALE)
    return apply_scale(multiply(rounded, codes, x.dtype), scale[..., None], x.dtype)


def rounded_input_gradient(dy: Array, codes: Array, matmul_dtype: str) -> Array:
    """dL/dx of `rounded_product`: (..., n, out) times (n, out, in) -> (..., in) in dy's dtype."""
    rounded, scale = quantize(dy, matmul_dtype, num_axes=2)
    return apply_scale(multiply_transposed(rounded, codes, dy.dtype), scale, dy.dtype)


def multiply(rows: Array, codes: Array, dtype: DTypeLike) -> Array:
    """rows (..., in) times codes (n, out, in), in the rows' dtype -> (..., n, out) in `dtype`, or int32 if they are
    whole numbers."""
    return _dot(rows, codes, (((rows.ndim - 1,), (2,)), ((), ())), dtype)


def multiply_transposed(rows: Array, codes: Array, dtype: DTypeLike) -> Array:
    """rows (..., n, out) times codes (n, out, in) -> (..., in); dtypes as of `multiply`."""
    return _dot(rows, codes, (((rows.ndim - 2, rows.ndim - 1), (0, 1)), ((), ())), dtype)


def _dot(rows: Array, codes: Array, dimension_numbers: tuple, dtype: DTypeLike) -> Array:
    accumulator = jnp.int32 if rows.dtype == jnp.int8 else dtype
    return lax.dot_general(rows, codes.astype(rows.dtype), dimension_numbers, preferred_element_type=accumulator)
