"""One linear map in three makes: full precision, ternary under training, packed for inference.

Each make is a pytree that is called on activations and computes n maps of the same input in one matmul; the
modules in `model/` own the parameters and say which maps share an input.
"""

from functools import partial

from flax import struct
import jax
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from terdit_jax.ternary.activations import Rows, quantize
from terdit_jax.ternary.packing import unpack

SAME = "same"  # a matmul's operands are of the activations' dtype
SCALE = "scale"  # name under which policies of rematerialisation know a product's scale


@struct.dataclass
class FullLinear:
    """y = x W^T. weight: (n, out, in) in the dtype of the activations."""

    weight: Array

    def __call__(self, x: Array) -> Array:
        """(..., in) -> (..., n, out) in x's dtype."""
        return _matmul(x, self.weight)

    def product(self, x: Rows) -> tuple[Rows, Array]:
        """As `TernaryLinear.product`."""
        return Rows(self(x.values)), jnp.ones(self.weight.shape[0], jnp.float32)


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
        return scale_product(*self.product(Rows(x)))

    def product(self, x: Rows) -> tuple[Rows, Array]:
        """x T^T, a product (..., n, out), and alpha (n,) float32, to whose gradient `quantize.ternarize` sees."""
        return ternary_matmul(self.operand, x, self.codes, self.sink), lax.stop_gradient(self.alpha)


@struct.dataclass
class PackedLinear:
    """y = alpha x T^T from 2-bit codes, without a gradient. packed: (n, out, in / 4) uint8, alpha: (n,) float32."""

    packed: Array
    alpha: Array

    def __call__(self, x: Array) -> Array:
        """(..., in) -> (..., n, out) in x's dtype; equals TerDiT's trained layer bit for bit."""
        return scale_product(Rows(_matmul(x, unpack(self.packed).astype(x.dtype))), self.alpha)


Linear = FullLinear | TernaryLinear | PackedLinear


def _matmul(x: Array, weight: Array) -> Array:
    """(..., in) times (n, out, in) -> (..., n, out)."""
    return lax.dot_general(x, weight, (((x.ndim - 1,), (2,)), ((), ())), preferred_element_type=x.dtype)


def scale_product(y: Rows, alpha: Array) -> Array:
    """alpha times a product (..., n, out), in its dtype. In float32, behind the sum: only activations round."""
    values = y.values if y.scale is None else _stands_for(y)
    return (values.astype(jnp.float32) * alpha[:, None]).astype(values.dtype)


@jax.custom_vjp
def _stands_for(y: Rows) -> Array:
    """What a product (..., n, out) stands for; its gradient passes to `values` as it is."""
    return scaled(y.values, y.scale[..., None], y.values.dtype)


def _stands_for_bwd(y: Rows, dy: Array) -> tuple[Rows]:
    return (as_operand(y, dy, *((None, None) if y.eight is None else quantize(dy, y.eight.dtype, num_axes=2))),)


_stands_for.defvjp(lambda y: (_stands_for(y), y.kept(y.scale)), _stands_for_bwd)


def scaled(values: Array, scale: Array, dtype: DTypeLike) -> Array:
    """(..., W) times (...,) float32, in `dtype`."""
    return (values.astype(jnp.float32) * scale[..., None]).astype(dtype)


def as_operand(y: Rows, dy: Array, eight: Array | None, scale: Array | None) -> Rows:
    """What is passed back to a product y (..., n, out): its gradient, and that in 8 bits if y has them."""
    dy = dy.reshape(y.values.shape)
    if y.eight is None:
        return Rows(dy, None, None if y.scale is None else jnp.zeros_like(y.scale))
    return Rows(dy, eight.reshape(dy.shape), scale)


def code_product(x: Rows, codes: Array, operand: str = SAME) -> Rows:
    """x T^T.

    Args:
      x: (..., in) operand.
      codes: (n, out, in) of any dtype; they are exact in every float dtype and in 8 bits.
      operand: dtype in which they are multiplied: x's, or one of 8 bits, in which each token of x is rounded on a scale
        of its own.

    Returns:
      A product (..., n, out) in x's dtype, in 8 bits with a scale.
    """
    dtype = x.values.dtype
    if operand == SAME:
        return Rows(_matmul(x.values, codes.astype(dtype)))
    eight, scale = x.in_8_bits(operand)
    y = _in_8_bits(eight, codes, (((eight.ndim - 1,), (2,)), ((), ())), dtype).astype(dtype)
    return Rows(y, None if x.eight is None else jnp.zeros(y.shape, x.eight.dtype), checkpoint_name(scale, SCALE))


def input_gradient(x: Rows, dy: Rows, codes: Array, operand: str = SAME) -> Rows:
    """dL/dx of `code_product`: of x its shape and dtypes, (..., n, out), (n, out, in) -> (..., in).

    The product has its scale beside it if x has a place for that, and is multiplied by it otherwise.
    """
    dtype = dy.values.dtype
    maps = (((dy.values.ndim - 2, dy.values.ndim - 1), (0, 1)), ((), ()))
    if operand == SAME:
        return Rows(lax.dot_general(dy.values, codes.astype(dtype), maps, preferred_element_type=dtype))
    eight, scale = dy.in_8_bits(operand, num_axes=2)
    dx = _in_8_bits(eight, codes, maps, dtype)
    if x.eight is None:
        return Rows(scaled(dx, scale, dtype))
    return Rows(dx, jnp.zeros(dx.shape, x.eight.dtype), scale)


def _in_8_bits(eight: Array, codes: Array, dimension_numbers: tuple, dtype: DTypeLike) -> Array:
    """Rows times codes in the rows' dtype; sums of whole numbers stay whole, others come in `dtype`."""
    kept = jnp.int32 if eight.dtype == jnp.int8 else dtype
    return lax.dot_general(eight, codes.astype(eight.dtype), dimension_numbers, preferred_element_type=kept)


def weight_gradient(x: Array, dy: Array, dtype: DTypeLike) -> Array:
    """dL/dT of `code_product`: (..., in), (..., n, out) -> (n, out, in) in `dtype`."""
    tokens = tuple(range(x.ndim - 1))
    return lax.dot_general(dy, x, ((tokens, tokens), ((), ())), preferred_element_type=dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def ternary_matmul(operand: str, x: Rows, codes: Array, sink: Array) -> Rows:
    """x T^T, with dL/dsink = dL/dT. As alpha is applied behind the product, that is alpha dL/dw of the weight in use,
    w = alpha T, which the straight-through estimator takes for dL/dW.

    Args:
      operand: dtype of the products y and dL/dx (`code_product`); dL/dT is formed of x and dL/dy as they are.
      x: (..., in) operand.
      codes: (n, out, in) int8.
      sink: (n, out, in); not read, its dtype is the dtype in which the weight gradient is formed.

    Returns:
      A product (..., n, out) in x's dtype.
    """
    return code_product(x, codes, operand)


def _ternary_matmul_fwd(operand: str, x: Rows, codes: Array, sink: Array) -> tuple[Rows, tuple]:
    return code_product(x, codes, operand), (x.kept(), codes, jnp.zeros((0,), sink.dtype))


def _ternary_matmul_bwd(operand: str, residuals: tuple, dy: Rows) -> tuple[Rows, np.ndarray, Array]:
    x, codes, sink = residuals
    dw = weight_gradient(x.values, dy.values, sink.dtype)
    return input_gradient(x, dy, codes, operand), np.zeros(codes.shape, jax.dtypes.float0), dw


ternary_matmul.defvjp(_ternary_matmul_fwd, _ternary_matmul_bwd)
