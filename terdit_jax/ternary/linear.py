"""One linear map in three makes: full precision, ternary under training, packed for inference.

Each make is a pytree that is called on activations and computes n maps of the same input in one matmul; the
modules in `model/` own the parameters and say which maps share an input.
"""

from flax import struct
import jax
from jax import Array, lax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from terdit_jax.ternary.packing import unpack


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
    sink: (n, out, in) zeros through which the gradient of alpha T leaves (see `quantize.ternarize`)."""

    codes: Array
    alpha: Array
    sink: Array

    def __call__(self, x: Array) -> Array:
        """(..., in) -> (..., n, out) in x's dtype."""
        return ternary_matmul(x, self.codes, self.alpha, self.sink)


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


def scaled_matmul(x: Array, codes: Array, alpha: Array) -> Array:
    """alpha * (x T^T): (..., in), (n, out, in) of any dtype, (n,) float32 -> (..., n, out) in x's dtype."""
    # Codes are exact in every float dtype; alpha is applied in float32 behind the sum, so only activations round.
    y = _matmul(x, codes.astype(x.dtype))
    return (y.astype(jnp.float32) * alpha[:, None]).astype(x.dtype)


def input_gradient(dy: Array, codes: Array, alpha: Array) -> Array:
    """dL/dx of `scaled_matmul`: (..., n, out), (n, out, in), (n,) -> (..., in) in dy's dtype."""
    scaled = (dy.astype(jnp.float32) * alpha[:, None]).astype(dy.dtype)
    maps = (((dy.ndim - 2, dy.ndim - 1), (0, 1)), ((), ()))
    return lax.dot_general(scaled, codes.astype(dy.dtype), maps, preferred_element_type=dy.dtype)


def weight_gradient(x: Array, dy: Array, dtype: DTypeLike) -> Array:
    """dL/dw of the weight in use, w = alpha T: (..., in), (..., n, out) -> (n, out, in) in `dtype`."""
    tokens = tuple(range(x.ndim - 1))
    return lax.dot_general(dy, x, ((tokens, tokens), ((), ())), preferred_element_type=dtype)


@jax.custom_vjp
def ternary_matmul(x: Array, codes: Array, alpha: Array, sink: Array) -> Array:
    """y = alpha * (x T^T), with dL/dsink = dL/dw for the weight in use, w = alpha T, and no gradient to alpha itself:
    `quantize.ternarize` makes those of W and alpha of it, once a step.

    Args:
      x: (..., in) activations.
      codes: (n, out, in) int8.
      alpha: (n,) float32.
      sink: (n, out, in); not read, its dtype is the dtype in which the weight gradient is formed.

    Returns:
      (..., n, out) in x's dtype.
    """
    return scaled_matmul(x, codes, alpha)


def _ternary_matmul_fwd(x: Array, codes: Array, alpha: Array, sink: Array) -> tuple[Array, tuple[Array, ...]]:
    return scaled_matmul(x, codes, alpha), (x, codes, alpha, jnp.zeros((0,), sink.dtype))


def _ternary_matmul_bwd(residuals: tuple[Array, ...], dy: Array) -> tuple[Array, np.ndarray, Array, Array]:
    x, codes, alpha, sink = residuals
    dw = weight_gradient(x, dy, sink.dtype)
    return input_gradient(dy, codes, alpha), np.zeros(codes.shape, jax.dtypes.float0), jnp.zeros_like(alpha), dw


ternary_matmul.defvjp(_ternary_matmul_fwd, _ternary_matmul_bwd)
