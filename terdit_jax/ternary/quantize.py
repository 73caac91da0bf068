"""The absmean ternary quantiser with its straight-through gradient, and the starting values of its scale.

It turns master weights into int8 codes in {-1, 0, 1}; `packing` stores them and `linear` multiplies by them.
"""

from functools import partial
from typing import NamedTuple

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


class Rounding(NamedTuple):
    """How weights become codes. Attributes:

    gamma_per: "matrix" or "channel", the weights that share a mean: all of a matrix, or those of one output.
    threshold: the least |W| / gamma of a code that is not 0, itself left out.
    """

    gamma_per: str = "matrix"
    threshold: float = 0.5


PUBLISHED = Rounding()


def absmean_codes(weight: Array, rounding: Rounding = PUBLISHED) -> Array:
    """The codes T = sign(W) where |W| / (gamma + 1e-6) exceeds the threshold, else 0, with gamma = mean|W|.

    At 0.5 that is clip(round(W / (gamma + 1e-6)), -1, 1), rounding half to even.

    Args:
      weight: (..., out, in) float32; the mean is taken over at most the last two axes, so stacked layers keep theirs
        apart.
      rounding: as published, or another.

    Returns:
      (..., out, in) int8 in {-1, 0, 1}. Source: TerDiT (arXiv 2405.14854) section 3.2, after BitNet b1.58; other
      thresholds after ternary weight networks (arXiv 1605.04711) section 2.2.
    """
    scaled = weight / (_absmean(weight, rounding) + ABSMEAN_EPS)
    if rounding.threshold == PUBLISHED.threshold:
        return jnp.clip(jnp.round(scaled), -1, 1).astype(jnp.int8)
    return jnp.where(jnp.abs(scaled) > rounding.threshold, jnp.sign(scaled), 0).astype(jnp.int8)


def sound_alpha(weight: Array, alpha: Array, rounding: Rounding = PUBLISHED) -> Array:
    """The scale, or NaN where the weight or the scale holds a number that is not finite or beyond `LARGEST`.

    One such number makes gamma infinite or NaN and all codes that share it 0. Codes cannot say so: their scale does,
    and with it the loss and the images. It costs a comparison a gamma, which is computed for the codes anyway.

    Args:
      weight: (..., out, in) float32.
      alpha: (...,) or (..., out) float32.
      rounding: that of the codes.
    """
    sound = jnp.all(_absmean(weight, rounding) <= LARGEST, axis=_shared_axes(weight, alpha))
    return jnp.where(sound & (jnp.abs(alpha) <= LARGEST), alpha, jnp.nan)


def _absmean(weight: Array, rounding: Rounding) -> Array:
    return jnp.mean(jnp.abs(weight), axis=_SHARING[rounding.gamma_per], keepdims=True)


# Axes of (..., out, in) whose weights share a gamma or an alpha, by the field's word.
_SHARING: dict[str, tuple[int, ...]] = {"matrix": (-2, -1), "channel": (-1,)}


def _shared_axes(weight: Array, alpha: Array) -> tuple[int, ...]:
    """The axes of a weight over which a scale is shared, by its shape: those that it lacks."""
    return tuple(range(alpha.ndim, weight.ndim))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def ternarize(
    weight: Array, alpha: Array, grad_dtype: DTypeLike = jnp.float32, rounding: Rounding = PUBLISHED
) -> tuple[Array, Array, Array]:
    """Codes of a master weight, its scale, and the sink through which its straight-through gradient returns.

    Codes are integers and carry no gradient. dL/dW = alpha dL/dw, with w = alpha T the weight in use, therefore returns
    through `sink`: an array of zeros that a matmul accepts beside the codes and never reads, so XLA removes it.
    `straight_through` is the backward pass.

    Args:
      weight: (..., out, in) float32.
      alpha: (...,) or (..., out) float32, one a matrix or one an output.
      grad_dtype: dtype in which the gradient is produced and crosses the mesh.
      rounding: how the codes are made.

    Returns:
      codes (..., out, in) int8, alpha in its shape of `sound_alpha`, kept off zero so that it can be divided by, and
      sink (..., out, in) of `grad_dtype`.
    """
    alpha = sound_alpha(weight, alpha, rounding)
    alpha = jnp.where(jnp.abs(alpha) < _LEAST_ALPHA, _LEAST_ALPHA, alpha)
    return absmean_codes(weight, rounding), alpha, jnp.zeros(weight.shape, grad_dtype)


def straight_through(codes: Array, alpha: Array, dalpha: Array, dsink: Array) -> tuple[Array, Array]:
    """The gradients of a master weight and its scale, from the cotangents of what `ternarize` returned.

    dL/dW equals dsink, without a mask where W was clipped and without a term through gamma. dL/dalpha = <dL/dw, T>,
    over the matrix or the row that shares alpha, is made of it once a step, where matmuls run once a microbatch.

    Args:
      codes: (..., out, in) int8.
      alpha: (...,) or (..., out) float32.
      dalpha: of alpha's shape, float32, what reached alpha itself.
      dsink: (..., out, in), alpha dL/dw.

    Returns:
      dL/dW (..., out, in) and dL/dalpha of alpha's shape, float32: Adam's moments need its range, and the sum has up
      to millions of terms.
    """
    dweight = dsink.astype(jnp.float32)
    return dweight, dalpha + jnp.sum(dweight * codes, axis=_shared_axes(codes, alpha)) / alpha


def _ternarize_fwd(
    weight: Array, alpha: Array, grad_dtype: DTypeLike, rounding: Rounding
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
    codes, alpha, sink = ternarize(weight, alpha, grad_dtype, rounding)
    return (codes, alpha, sink), (codes, alpha)


def _ternarize_bwd(_, __, residuals: tuple[Array, Array], cotangents: tuple[Array, ...]) -> tuple[Array, Array]:
    return straight_through(*residuals, *cotangents[1:])


ternarize.defvjp(_ternarize_fwd, _ternarize_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def soften(weight: Array, alpha: Array, share: Array, rounding: Rounding = PUBLISHED) -> Array:
    """The weight in use of a soft start, w = (1 - s) W + s alpha T: the master weight at s = 0, the ternary one at 1.

    The gradient is straight-through, and at s = 1 that of `ternarize`: dL/dalpha = s <dL/dw, T>, and
    dL/dW = ((1 - s) |alpha| + s alpha) dL/dw, which for alpha > 0 is alpha dL/dw at every s. With the factor 1 - s + s
    alpha of the blend itself W's gradient would shrink by the order of alpha, about a twentieth, on the way, and Adam's
    second moments, which remember the larger ones for thousands of steps, would hold W still. A constant
    factor on a matrix's gradient cancels in Adam.

    Args:
      weight: (..., out, in) float32.
      alpha: (...,) or (..., out) float32.
      share: () s in [0, 1]; it has no gradient.
      rounding: how the codes are made.

    Returns:
      (..., out, in) float32. Source: the lambda warm-up of "Fine-tuning LLMs to 1.58bit: extreme quantization made
      easy" (M. Mekkouri and others, Hugging Face, 2024-09-18), which has no alpha in its gradient.
    """
    return _soften_fwd(weight, alpha, share, rounding)[0]


def _soften_fwd(weight: Array, alpha: Array, share: Array, rounding: Rounding) -> tuple[Array, tuple[Array, ...]]:
    codes, alpha, _ = ternarize(weight, alpha, jnp.float32, rounding)
    return (1 - share) * weight + share * spread(alpha, weight) * codes, (codes, alpha, share)


def _soften_bwd(_, residuals: tuple[Array, ...], dw: Array) -> tuple[Array, Array, Array]:
    codes, alpha, share = residuals
    factor = (1 - share) * jnp.abs(alpha) + share * alpha
    dalpha = share * jnp.sum(dw * codes, axis=_shared_axes(dw, alpha))
    return spread(factor, dw) * dw, dalpha, jnp.zeros_like(share)


def spread(alpha: Array, weight: Array) -> Array:
    """The scale with an axis of one for each axis of the weight that shares it."""
    return jnp.expand_dims(alpha, _shared_axes(weight, alpha))


soften.defvjp(_soften_fwd, _soften_bwd)


def least_squares_alpha(weight: Array, alpha_per: str = "matrix", rounding: Rounding = PUBLISHED) -> Array:
    """The scale that brings alpha * T closest to W, alpha = <W, T> / <T, T>, over each matrix or each of its rows.

    A matrix that starts at zero (the block's adaLN) has T = 0, and with alpha = 0 neither could ever move; it gets
    the value that a xavier-uniform draw of its shape would give: with the threshold at 0.5,
    0.625 * sqrt(6 / (in + out)). So does a row without codes.

    Args:
      weight: (..., out, in) float32.
      alpha_per: "matrix" or "channel", the codes that share a scale.
      rounding: how the codes are made.

    Returns:
      (...,) or (..., out) float32.
    """
    codes = absmean_codes(weight, rounding).astype(weight.dtype)
    dot = jnp.sum(weight * codes, axis=_SHARING[alpha_per])
    count = jnp.sum(jnp.abs(codes), axis=_SHARING[alpha_per])
    out_features, in_features = weight.shape[-2:]
    # The mean of what a uniform draw over [-a, a], whose gamma is a / 2, has beyond the threshold.
    fallback = (2 + rounding.threshold) / 4 * (6 / (in_features + out_features)) ** 0.5
    return jnp.where(count > 0, dot / jnp.maximum(count, 1), fallback)
