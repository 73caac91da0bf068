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

    def product(self, x: Array) -> tuple[Array, Array]:
        """As `TernaryLinear.product`."""
        return self(x), jnp.ones(self.weight.shape[0])


@struct.dataclass
class TernaryLinear:
    """y = alpha x T^T under quantisation-aware training. codes: (n, out, in) int8, alpha: (n,) float32,
    sink: (n, out, in) zeros through which the gradient of W leaves (see `quantize.ternarize`), operand: dtype in which
    the matmuls with T are done (see `ternary_matmul`)."""

    codes: Array
    alpha: Array
    sink: Array
    operand: str = struct.field(pytree_node=False, default=SAME)

    def __call__(self, x: Array) -> Array:
        """(..., in) -> (..., n, out) in x's dtype."""
        return scale_product(*self.product(x))

    def product(self, x: Array) -> tuple[Array, Array]:
        """x T^T (..., n, out) in x's dtype, and alpha (n,) float32, whose gradient is `quantize.ternarize`'s affair."""
        return ternary_matmul(self.operand, x, self.codes, self.sink), lax.stop_gradient(self.alpha)


@struct.dataclass
class PackedLinear:
    """y = alpha x T^T from 2-bit codes, without a gradient. packed: (n, out, in / 4) uint8, alpha: (n,) float32."""

    packed: Array
    alpha: Array

    def __call__(self, x: Array) -> Array:
        """(..., in) -> (..., n, out) in x's dtype; equals TerDiT's trained layer bit for bit."""
        return scale_product(_matmul(x, unpack(self.packed).astype(x.dtype)), self.alpha)


Linear = FullLinear | TernaryLinear | PackedLinear


def _matmul(x: Array, weight: Array) -> Array:
    """(..., in) times (n, out, in) -> (..., n, out)."""
    return lax.dot_general(x, weight, (((x.ndim - 1,), (2,)), ((), ())), preferred_element_type=x.dtype)


def scale_product(y: Array, alpha: Array) -> Array:
    """alpha y: (..., n, out), (n,) -> (..., n, out). In float32, behind the sum: only activations round."""
    return (y.astype(jnp.float32) * alpha[:, None]).astype(y.dtype)


def code_product(x: Array, codes: Array, operand: str = SAME) -> Array:
    """x T^T.

    Args:
      x: (..., in) activations.
      codes: (n, out, in) of any dtype; they are exact in every float dtype and in 8 bits.
      operand: dtype in which they are multiplied: x's, or one of 8 bits, in which each token of x is rounded on a scale
        of its own (`activations.quantize`).

    Returns:
      (..., n, out) in x's dtype.
    """
    if operand == SAME:
        return _matmul(x, codes.astype(x.dtype))
    rows, scale = quantize(x, operand)
    y = _in_8_bits(rows, codes, (((x.ndim - 1,), (2,)), ((), ())), x.dtype)
    return (y.astype(jnp.float32) * scale[..., None, None]).astype(x.dtype)


def input_gradient(dy: Array, codes: Array, operand: str = SAME) -> Array:
    """dL/dx of `code_product`: (..., n, out), (n, out, in) -> (..., in) in dy's dtype."""
    maps = (((dy.ndim - 2, dy.ndim - 1), (0, 1)), ((), ()))
    if operand == SAME:
        return lax.dot_general(dy, codes.astype(dy.dtype), maps, preferred_element_type=dy.dtype)
    rows, scale = quantize(dy, operand, num_axes=2)
    dx = _in_8_bits(rows, codes, maps, dy.dtype)
    return (dx.astype(jnp.float32) * scale[..., None]).astype(dy.dtype)


def _in_8_bits(rows: Array, codes: Array, dimension_numbers: tuple, dtype: DTypeLike) -> Array:
    """The product of rows and codes in the rows' dtype; sums of whole numbers stay whole, others come in `dtype`."""
    kept = jnp.int32 if rows.dtype == jnp.int8 else dtype
    return lax.dot_general(rows, codes.astype(rows.dtype), dimension_numbers, preferred_element_type=kept)


def weight_gradient(x: Array, dy: Array, dtype: DTypeLike) -> Array:
    """dL/dT of `code_product`: (..., in), (..., n, out) -> (n, out, in) in `dtype`."""
    tokens = tuple(range(x.ndim - 1))
    return lax.dot_general(dy, x, ((tokens, tokens), ((), ())), preferred_element_type=dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def ternary_matmul(operand: str, x: Array, codes: Array, sink: Array) -> Array:
    """x T^T, with dL/dsink = dL/dT. As alpha is applied behind the product, that is alpha dL/dw of the weight in use,
    w = alpha T, which the straight-through estimator takes for dL/dW.

    Args:
      operand: dtype of the products y and dL/dx (`code_product`); dL/dT is formed of x as it is.
      x: (..., in) activations.
      codes: (n, out, in) int8.
      sink: (n, out, in); not read, its dtype is the dtype in which the weight gradient is formed.

    Returns:
      (..., n, out) in x's dtype.
    """
    return code_product(x, codes, operand)


def _ternary_matmul_fwd(operand: str, x: Array, codes: Array, sink: Array) -> tuple[Array, tuple[Array, ...]]:
    return code_product(x, codes, operand), (x, codes, jnp.zeros((0,), sink.dtype))


def _ternary_matmul_bwd(operand: str, residuals: tuple[Array, ...], dy: Array) -> tuple[Array, np.ndarray, Array]:
    x, codes, sink = residuals
    dw = weight_gradient(x, dy, sink.dtype)
    return input_gradient(dy, codes, operand), np.zeros(codes.shape, jax.dtypes.float0), dw


ternary_matmul.defvjp(_ternary_matmul_fwd, _ternary_matmul_bwd)
