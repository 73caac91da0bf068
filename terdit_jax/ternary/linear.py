"""One linear map in three makes: full precision, ternary under training, packed for inference.

Each make is a pytree that is called on activations and computes n maps of the same input in one matmul; the
modules in `model/` own the parameters and say which maps share an input.
"""

from flax import struct
import jax
from jax import Array, lax
import jax.numpy as jnp
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
    sink: (n, out, in) zeros through which the straight-through gradient leaves (see `quantize.ternarize`)."""

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
        return _scaled_matmul(x, unpack(self.packed), self.alpha)


Linear = FullLinear | TernaryLinear | PackedLinear


def _matmul(x: Array, weight: Array) -> Array:
    """(..., in) times (n, out, in) -> (..., n, out)."""
    return lax.dot_general(x, weight, (((x.ndim - 1,), (2,)), ((), ())), preferred_element_type=x.dtype)


def _scaled_matmul(x: Array, codes: Array, alpha: Array) -> Array:
    # Codes are exact in every float dtype; alpha is applied in float32 behind the sum, so only activations round.
    y = _matmul(x, codes.astype(x.dtype))
    return (y.astype(jnp.float32) * alpha[:, None]).astype(x.dtype)


@jax.custom_vjp
def ternary_matmul(x: Array, codes: Array, alpha: Array, sink: Array) -> Array:
    """y = alpha * (x T^T), with dL/dsink = alpha * dL/dw and dL/dalpha = <dL/dw, T> for the used weight w = alpha T.

    Args:
      x: (..., in) activations.
      codes: (n, out, in) int8.
      alpha: (n,) float32.
      sink: (n, out, in); not read, its dtype is the dtype in which the weight gradient is formed.

    Returns:
      (..., n, out) in x's dtype.
    """
    return _scaled_matmul(x, codes, alpha)


def _ternary_matmul_fwd(x: Array, codes: Array, alpha: Array, sink: Array) -> tuple[Array, tuple[Array, ...]]:
    return _scaled_matmul(x, codes, alpha), (x, codes, alpha, jnp.zeros((0,), sink.dtype))


def _ternary_matmul_bwd(residuals: tuple[Array, ...], dy: Array) -> tuple[Array, np.ndarray, Array, Array]:
    x, codes, alpha, sink = residuals
    scaled_dy = (dy.astype(jnp.float32) * alpha[:, None]).astype(dy.dtype)
    dx = lax.dot_general(
        scaled_dy,
        codes.astype(dy.dtype),
        (((dy.ndim - 2, dy.ndim - 1), (0, 1)), ((), ())),
        preferred_element_type=x.dtype,
    )
    tokens = tuple(range(x.ndim - 1))
    dw = lax.dot_general(dy, x, ((tokens, tokens), ((), ())), preferred_element_type=sink.dtype)
    # Both sums run over millions of terms: in float32 whatever the gradient's dtype.
    dw32 = dw.astype(jnp.float32)
    dalpha = jnp.sum(dw32 * codes, axis=(1, 2))
    dsink = (dw32 * alpha[:, None, None]).astype(sink.dtype)
    return dx, np.zeros(codes.shape, jax.dtypes.float0), dalpha, dsink


ternary_matmul.defvjp(_ternary_matmul_fwd, _ternary_matmul_bwd)
