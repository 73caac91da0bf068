"""One linear map in three makes: full precision, ternary under training, packed for inference.

Each make is a pytree that is called on activations and computes n maps of the same input in one matmul; the
modules in `model/` own the parameters and say which maps share an input.
"""

from functools import partial

from flax import struct
import jax
from jax import Array, lax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from terdit_jax.ternary.activations import quantize
from terdit_jax.ternary.packing import unpack

SAME = "same"  # a matmul's operands are of the activations' dtype


@struct.dataclass
class FullLinear:
    """y = x W^T. weight: (n, out, in) in the dtype of the activations."""

    weight: Array

    def __call__(self, x: Array) -> Array:
        """(..., in) -> (..., n, out) in x's dtype."""
        return _matmul(x, self.weight)


@struct.dataclass
class TernaryLinear:
    """y = alpha x T^T under quantisation-aware training. codes: (n, out, in) int8, alpha: (n,) float32,
    sink: (n, out, in) zeros through which the gradient of alpha T leaves (see `quantize.ternarize`), operand: dtype in
    which the matmuls with T are done (see `scaled_matmul`)."""

    codes: Array
    alpha: Array
    sink: Array
    operand: str = struct.field(pytree_node=False, default=SAME)

    def __call__(self, x: Array) -> Array:
        """(..., in) -> (..., n, out) in x's dtype."""
        return ternary_matmul(self.operand, x, self.codes, self.alpha, self.sink)


@struct.dataclass
class PackedLinear:
    """y = alpha x T^T from 2-bit codes, without a gradient. packed: (n, out, in / 4) uint8, alpha: (n,) float32."""

    packed: Array
    alpha: Array

    def __call__(self, x: Array) -> Array:
        """(..., in) -> (..., n, out) in x's dtype; equals TerDiT's trained layer bit for bit."""
        return scaled_matmul(x, unpack(self.packed), self.alpha)


Linear = FullLinear | TernaryLinear | PackedLinear


def _matmul(x: Array, weight: Array) -> Array:
    """(..., in) times (n, out, in) -> (..., n, out)."""
    return lax.dot_general(x, weight, (((x.ndim - 1,), (2,)), ((), ())), preferred_element_type=x.dtype)


def scaled_matmul(x: Array, codes: Array, alpha: Array, operand: str = SAME) -> Array:
    """alpha * (x T^T).

    Args:
      x: (..., in) activations.
      codes: (n, out, in) of any dtype.
      alpha: (n,) float32.
      operand: dtype in which they are multiplied: x's, or one of 8 bits, in which codes are exact and each token of x
        is rounded on a scale of its own (`activations.quantize`).

    Returns:
      (..., n, out) in x's dtype.
    """
    if operand == SAME:
        # Codes are exact in every float dtype; alpha is applied in float32 behind the sum, so only activations round.
        y = _matmul(x, codes.astype(x.dtype))
        return (y.astype(jnp.float32) * alpha[:, None]).astype(x.dtype)
    rows, scale = quantize(x, operand)
    y = _in_8_bits(rows, codes, (((x.ndim - 1,), (2,)), ((), ())), x.dtype)
    return (y.astype(jnp.float32) * (scale[..., None, None] * alpha[:, None])).astype(x.dtype)


def input_gradient(dy: Array, codes: Array, alpha: Array, operand: str = SAME) -> Array:
    """dL/dx of `scaled_matmul`: (..., n, out), (n, out, in), (n,) -> (..., in) in dy's dtype."""
    scaled = dy.astype(jnp.float32) * alpha[:, None]
    maps = (((dy.ndim - 2, dy.ndim - 1), (0, 1)), ((), ()))
    if operand == SAME:
        return lax.dot_general(scaled.astype(dy.dtype), codes.astype(dy.dtype), maps, preferred_element_type=dy.dtype)
    rows, scale = quantize(scaled, operand, num_axes=2)
    dx = _in_8_bits(rows, codes, maps, dy.dtype)
    return (dx.astype(jnp.float32) * scale[..., None]).astype(dy.dtype)


def _in_8_bits(rows: Array, codes: Array, dimension_numbers: tuple, dtype: DTypeLike) -> Array:
    """The product of rows and codes in the rows' dtype; sums of whole numbers stay whole, others come in `dtype`."""
    kept = jnp.int32 if rows.dtype == jnp.int8 else dtype
    return lax.dot_general(rows, codes.astype(rows.dtype), dimension_numbers, preferred_element_type=kept)


def weight_gradient(x: Array, dy: Array, dtype: DTypeLike) -> Array:
    """dL/dw of the weight in use, w = alpha T: (..., in), (..., n, out) -> (n, out, in) in `dtype`."""
    tokens = tuple(range(x.ndim - 1))
    return lax.dot_general(dy, x, ((tokens, tokens), ((), ())), preferred_element_type=dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def ternary_matmul(operand: str, x: Array, codes: Array, alpha: Array, sink: Array) -> Array:
    """y = alpha * (x T^T), with dL/dsink = dL/dw for the weight in use, w = alpha T, and no gradient to alpha itself:
    `quantize.ternarize` makes those of W and alpha of it, once a step.

    Args:
      operand: dtype of the products y and dL/dx (`scaled_matmul`); dL/dw is formed of x as it is.
      x: (..., in) activations.
      codes: (n, out, in) int8.
      alpha: (n,) float32.
      sink: (n, out, in); not read, its dtype is the dtype in which the weight gradient is formed.

    Returns:
      (..., n, out) in x's dtype.
    """
    return scaled_matmul(x, codes, alpha, operand)


def _ternary_matmul_fwd(
    operand: str, x: Array, codes: Array, alpha: Array, sink: Array
) -> tuple[Array, tuple[Array, ...]]:
    return scaled_matmul(x, codes, alpha, operand), (x, codes, alpha, jnp.zeros((0,), sink.dtype))


def _ternary_matmul_bwd(
    operand: str, residuals: tuple[Array, ...], dy: Array
) -> tuple[Array, np.ndarray, Array, Array]:
    x, codes, alpha, sink = residuals
    dw = weight_gradient(x, dy, sink.dtype)
    dx = input_gradient(dy, codes, alpha, operand)
    return dx, np.zeros(codes.shape, jax.dtypes.float0), jnp.zeros_like(alpha), dw


ternary_matmul.defvjp(_ternary_matmul_fwd, _ternary_matmul_bwd)
