"""The absmean ternary quantiser with its straight-through gradient, and the starting values of its scale.

It turns master weights into int8 codes in {-1, 0, 1}; `packing` stores them and `linear` multiplies by them.
"""

from functools import partial

import jax
from jax import Array
import jax.numpy as jnp
from jax.typing import DTypeLike

# Keeps round(W / gamma) finite for an all-zero matrix (TerDiT's quantiser uses the same value).
ABSMEAN_EPS = 1e-6

# alpha = 0 would zero the gradients of its matrix and of itself for good; a power of two divides exactly.
_LEAST_ALPHA = 2.0**-60

# Larger parameters are refused: squares of what they make overflow float32 in the norms. Trained ones stay far below.
LARGEST = 2.0**40


def absmean_codes(weight: Array) -> Array:
    """The codes T = clip(round(W / (mean|W| + 1e-6)), -1, 1), rounding half to even.

    Args:
      weight: (..., out, in) float32; the mean is taken over the last two axes, so stacked layers keep theirs apart.

    Returns:
      (..., out, in) int8 in {-1, 0, 1}. Source: TerDiT (arXiv 2405.14854) section 3.2, after BitNet b1.58.
    """
    return jnp.clip(jnp.round(weight / (_absmean(weight) + ABSMEAN_EPS)), -1, 1).astype(jnp.int8)


def sound_alpha(weight: Array, alpha: Array) -> Array:
    """The scale, or NaN where the weight or the scale holds a number that is not finite or beyond `LARGEST`.

    One such number makes gamma infinite or NaN and all codes of its matrix 0. Codes cannot say so: their scale does,
    and with it the loss and the images. It costs a comparison a matrix, since gamma is computed for the codes anyway.

    Args:
      weight: (..., out, in) float32.
      alpha: (...,) float32.
    """
    sound = (_absmean(weight)[..., 0, 0] <= LARGEST) & (jnp.abs(alpha) <= LARGEST)
    return jnp.where(sound, alpha, jnp.nan)


def _absmean(weight: Array) -> Array:
    return jnp.mean(jnp.abs(weight), axis=(-2, -1), keepdims=True)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def ternarize(weight: Array, alpha: Array, grad_dtype: DTypeLike = jnp.float32) -> tuple[Array, Array, Array]:
    """Codes of a master weight, its scale, and the sink through which its straight-through gradient returns.

    Codes are integers and carry no gradient. dL/dW = alpha dL/dw, with w = alpha T the weight in use, therefore returns
    through `sink`: an array of zeros that a matmul accepts beside the codes and never reads, so XLA removes it.
    `straight_through` is the backward pass.

    Args:
      weight: (..., out, in) float32.
      alpha: (...,) float32.
      grad_dtype: dtype in which the gradient is produced and crosses the mesh.

    Returns:
      codes (..., out, in) int8, alpha (...,) of `sound_alpha`, kept off zero so that it can be divided by, and sink
      (..., out, in) of `grad_dtype`.
    """
    alpha = sound_alpha(weight, alpha)
    alpha = jnp.where(jnp.abs(alpha) < _LEAST_ALPHA, _LEAST_ALPHA, alpha)
    return absmean_codes(weight), alpha, jnp.zeros(weight.shape, grad_dtype)


def straight_through(codes: Array, alpha: Array, dalpha: Array, dsink: Array) -> tuple[Array, Array]:
    """The gradients of a master weight and its scale, from the cotangents of what `ternarize` returned.

    dL/dW is the sink's, without a mask where W was clipped and without a term through gamma. dL/dalpha = <dL/dw, T> is
    made of it once a step, where matmuls run once a microbatch.

    Args:
      codes: (..., out, in) int8.
      alpha: (...,) float32.
      dalpha: (...,) float32, what reached alpha itself.
      dsink: (..., out, in), alpha dL/dw.

    Returns:
      dL/dW (..., out, in) and dL/dalpha (...,), float32: Adam's moments need its range, and the sum has millions of
      terms.
    """
    dweight = dsink.astype(jnp.float32)
    return dweight, dalpha + jnp.sum(dweight * codes, axis=(-2, -1)) / alpha


def _ternarize_fwd(
    weight: Array, alpha: Array, grad_dtype: DTypeLike
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
    codes, alpha, sink = ternarize(weight, alpha, grad_dtype)
    return (codes, alpha, sink), (codes, alpha)


def _ternarize_bwd(_, residuals: tuple[Array, Array], cotangents: tuple[Array, ...]) -> tuple[Array, Array]:
    return straight_through(*residuals, *cotangents[1:])


ternarize.defvjp(_ternarize_fwd, _ternarize_bwd)


def least_squares_alpha(weight: Array) -> Array:
    """The scale that brings alpha * T closest to W, alpha = <W, T> / <T, T>.

    A matrix that starts at zero (the block's adaLN) has T = 0, and with alpha = 0 neither could ever move; it gets
    the value that a xavier-uniform draw of its shape would give, 0.625 * sqrt(6 / (in + out)).

    Args:
      weight: (..., out, in) float32.

    Returns:
      (...,) float32.
    """
    codes = absmean_codes(weight).astype(weight.dtype)
    dot = jnp.sum(weight * codes, axis=(-2, -1))
    count = jnp.sum(jnp.abs(codes), axis=(-2, -1))
    out_features, in_features = weight.shape[-2:]
    fallback = 0.625 * (6 / (in_features + out_features)) ** 0.5
    return jnp.where(count > 0, dot / jnp.maximum(count, 1), fallback)
