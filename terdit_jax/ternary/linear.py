"""One linear map in three makes: full precision, ternary under training, packed for inference.

Each make is a pytree that is called on activations and computes n maps of the same input in one matmul; the
modules in `model/` own the parameters and say which maps share an input.
"""

from collections.abc import Callable
from functools import partial

from flax import struct
import jax
from jax import Array, lax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from terdit_jax.ternary.activations import quantize
from terdit_jax.ternary.packing import unpack

Quantize = Callable[..., tuple[Array, Array | None]]  # as `activations.quantize`

SAME = "same"  # a matmul's operands are of the activations' dtype


@struct.dataclass
class FullLinear:
    """y = x W^T. weight: (n, out, in) in the dtype of the activations."""

    weight: Array

    def __call__(self, x: Array) -> Array:
        """(..., in) -> (..., n, out) in x's dtype."""
        return _matmul(x, self.weight)

    def product(self, x: Array, quantize: Quantize = quantize) -> tuple[Array, None, Array]:
        """As `TernaryLinear.product`."""
        return self(x), None, jnp.ones(self.weight.shape[0])


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

    def product(self, x: Array, quantize: Quantize = quantize) -> tuple[Array, Array | None, Array]:
        """y (..., n, out) in x's dtype, scale (...,) float32 or None, and alpha (n,) float32: scale y stands for x T^T.

        What is passed back to y has to be the gradient of scale y, and `quantize.ternarize` sees to alpha's.
        """
        y, scale = ternary_matmul(self.operand, quantize, x, self.codes, self.sink)
        return y, scale, lax.stop_gradient(self.alpha)


@struct.dataclass
class PackedLinear:
    """y = alpha x T^T from 2-bit codes, without a gradient. packed: (n, out, in / 4) uint8, alpha: (n,) float32."""

    packed: Array
    alpha: Array

    def __call__(self, x: Array) -> Array:
        """(..., in) -> (..., n, out) in x's dtype; equals TerDiT's trained layer bit for bit."""
        return scale_product(_matmul(x, unpack(self.packed).astype(x.dtype)), None, self.alpha)


Linear = FullLinear | TernaryLinear | PackedLinear


def _matmul(x: Array, weight: Array) -> Array:
    """(..., in) times (n, out, in) -> (..., n, out)."""
    return lax.dot_general(x, weight, (((x.ndim - 1,), (2,)), ((), ())), preferred_element_type=x.dtype)


def scale_product(y: Array, scale: Array | None, alpha: Array) -> Array:
    """alpha scale y of `TernaryLinear.product` in y's dtype. In float32, behind the sum: only activations round."""
    if scale is not None:
        y = _stands_for(y, scale)
    return (y.astype(jnp.float32) * alpha[:, None]).astype(y.dtype)


@jax.custom_vjp
def _stands_for(y: Array, scale: Array) -> Array:
    """scale y: (..., n, out), (...,) -> (..., n, out). Its gradient passes to y as it is, see `ternary_matmul`."""
    return (y.astype(jnp.float32) * scale[..., None, None]).astype(y.dtype)


_stands_for.defvjp(lambda y, scale: (_stands_for(y, scale), scale), lambda scale, dy: (dy, jnp.zeros_like(scale)))


def code_product(x: Array, codes: Array, operand: str = SAME, quantize: Quantize = quantize) -> tuple:
    """x T^T.

    Args:
      x: (..., in) activations.
      codes: (n, out, in) of any dtype; they are exact in every float dtype and in 8 bits.
      operand: dtype in which they are multiplied: x's, or one of 8 bits, in which each token of x is rounded on a scale
        of its own.
      quantize: who rounds them.

    Returns:
      (..., n, out) in x's dtype, and (...,) float32 that it is to be multiplied by, or None.
    """
    if operand == SAME:
        return _matmul(x, codes.astype(x.dtype)), None
    rows, scale = quantize(x, operand)
    return _in_8_bits(rows, codes, (((x.ndim - 1,), (2,)), ((), ())), x.dtype).astype(x.dtype), scale


def input_gradient(dy: Array, codes: Array, operand: str = SAME, quantize: Quantize = quantize) -> Array:
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


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def ternary_matmul(operand: str, quantize: Quantize, x: Array, codes: Array, sink: Array) -> tuple[Array, Array | None]:
    """x T^T as y and what it is to be multiplied by, with dL/dsink = dL/dT. As alpha is applied behind the product,
    that is alpha dL/dw of the weight in use, w = alpha T, which the straight-through estimator takes for dL/dW.

    The gradient of y is taken to be that of scale y: so it need not be scaled to and fro.

    Args:
      operand: dtype of the products y and dL/dx (`code_product`); dL/dT is formed of x as it is.
      quantize: who rounds to that dtype, as `activations.quantize` does.
      x: (..., in) activations.
      codes: (n, out, in) int8.
      sink: (n, out, in); not read, its dtype is the dtype in which the weight gradient is formed.

    Returns:
      (..., n, out) in x's dtype, and (...,) float32 or None.
    """
    return code_product(x, codes, operand, quantize)


def _ternary_matmul_fwd(operand: str, quantize: Quantize, x: Array, codes: Array, sink: Array) -> tuple[tuple, tuple]:
    return code_product(x, codes, operand, quantize), (x, codes, jnp.zeros((0,), sink.dtype))


def _ternary_matmul_bwd(
    operand: str, quantize: Quantize, residuals: tuple[Array, ...], gradients: tuple[Array, Array | None]
) -> tuple[Array, np.ndarray, Array]:
    x, codes, sink = residuals
    dy, _ = gradients
    dw = weight_gradient(x, dy, sink.dtype)
    return input_gradient(dy, codes, operand, quantize), np.zeros(codes.shape, jax.dtypes.float0), dw


ternary_matmul.defvjp(_ternary_matmul_fwd, _ternary_matmul_bwd)
