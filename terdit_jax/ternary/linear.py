"""The linear map in three forms: full precision, ternary under training, packed for inference.

Each form is a pytree called on activations, and computes n maps of one input in one matmul. `model` owns the
parameters and says which maps share an input.
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
        return code_product(x, self.weight)


@struct.dataclass
class TernaryLinear:
    """y = alpha x T^T under quantisation-aware training. codes: (n, out, in) int8, alpha: (n,) or (n, out) float32,
    sink: (n, out, in) zeros through which the gradient of W leaves (see `quantize.ternarize`)."""

    codes: Array
    alpha: Array
    sink: Array

    def __call__(self, x: Array) -> Array:
        """(..., in) -> (..., n, out) in x's dtype. alpha is detached: `ternarize` computes its gradient."""
        return scale_product(ternary_matmul(x, self.codes, self.sink), lax.stop_gradient(self.alpha))


@struct.dataclass
class PackedLinear:
    """y = alpha x T^T from 2-bit codes, without a gradient. packed: (n, out, in / 4) uint8, alpha: (n,) or (n, out)
    float32."""

    packed: Array
    alpha: Array

    def __call__(self, x: Array) -> Array:
        """(..., in) -> (..., n, out) in x's dtype; equals TerDiT's trained layer bit for bit."""
        return scale_product(code_product(x, unpack(self.packed)), self.alpha)


Linear = FullLinear | TernaryLinear | PackedLinear


def code_product(x: Array, codes: Array) -> Array:
    """x T^T: (..., in) times (n, out, in) -> (..., n, out) in x's dtype, in which codes are exact."""
    numbers = (((x.ndim - 1,), (2,)), ((), ()))
    return lax.dot_general(x, codes.astype(x.dtype), numbers, preferred_element_type=x.dtype)


def scale_product(y: Array, alpha: Array) -> Array:
    """alpha, (n,) a scale a map or (n, out) one an output, times y (..., n, out), in y's dtype. In float32, after the
    sum: only activations round."""
    return (y.astype(jnp.float32) * (alpha[:, None] if alpha.ndim == 1 else alpha)).astype(y.dtype)


@jax.custom_vjp
def ternary_matmul(x: Array, codes: Array, sink: Array) -> Array:
    """x T^T, with dL/dsink = dL/dT. As alpha is applied to the product, that is alpha dL/dw of the weight in use,
    w = alpha T, which the straight-through estimator takes for dL/dW.

    Args:
      x: (..., in) float.
      codes: (n, out, in) int8.
      sink: (n, out, in); not read, its dtype is the dtype in which the weight gradient is formed.

    Returns:
      (..., n, out) in x's dtype.
    """
    return code_product(x, codes)


def _ternary_matmul_fwd(x: Array, codes: Array, sink: Array) -> tuple[Array, tuple[Array, ...]]:
    return code_product(x, codes), (x, codes, jnp.zeros((0,), sink.dtype))


def _ternary_matmul_bwd(residuals: tuple[Array, ...], dy: Array) -> tuple[Array, np.ndarray, Array]:
    x, codes, sink = residuals
    return input_gradient(dy, codes), no_gradient(codes), weight_gradient(x, dy, sink.dtype)


ternary_matmul.defvjp(_ternary_matmul_fwd, _ternary_matmul_bwd)


def input_gradient(dy: Array, codes: Array) -> Array:
    """dL/dx of `code_product`: (..., n, out) times (n, out, in) -> (..., in) in dy's dtype."""
    numbers = (((dy.ndim - 2, dy.ndim - 1), (0, 1)), ((), ()))
    return lax.dot_general(dy, codes.astype(dy.dtype), numbers, preferred_element_type=dy.dtype)


def weight_gradient(x: Array, dy: Array, dtype: DTypeLike) -> Array:
    """dL/dT of `code_product`: (..., in), (..., n, out) -> (n, out, in) in `dtype`."""
    tokens = tuple(range(x.ndim - 1))
    return lax.dot_general(dy, x, ((tokens, tokens), ((), ())), preferred_element_type=dtype)


def no_gradient(codes: Array) -> np.ndarray:
    """float0 zeros, the cotangent type that JAX has for integers."""
    return np.zeros(codes.shape, jax.dtypes.float0)
