"""The training objective: noising, the distribution a network's output stands for, and the hybrid loss on it.

Drawing t and the noise, reducing over the batch and running the network are left to `training`.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from terdit_jax.diffusion.schedule import Schedule, gather

# Everything here is float32, whatever dtype the network computes in. Late x_0 = 157 x_t - 157 eps cancels, the two
# log-variances of the bound differ by less than bfloat16 can resolve near -9, and 8 bits of mantissa cannot place an
# x_0 in the decoder's bins of 1/127.5.
_FLOAT = jnp.float32


class MeanVariance(NamedTuple):
    """The Gaussian p(x_{t-1} | x_t) of a network's output, and the x_0 it implies; all (B, H, W, C) float32."""

    mean: jax.Array
    variance: jax.Array
    log_variance: jax.Array
    pred_x0: jax.Array


def q_sample(schedule: Schedule, x_0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """Draws x_t from q(x_t | x_0) (Ho et al. 2020, equation 4).

    Args:
      schedule: the process.
      x_0: (B, H, W, C) scaled latents, any float dtype.
      t: (B,) int steps of the schedule.
      noise: (B, H, W, C) standard normal.

    Returns:
      (B, H, W, C) float32.
    """
    chex.assert_equal_shape([x_0, noise])
    chex.assert_shape(t, x_0.shape[:1])
    signal = gather(schedule.sqrt_alphas_cumprod, t, x_0.ndim) * x_0.astype(_FLOAT)
    return signal + gather(schedule.sqrt_one_minus_alphas_cumprod, t, x_0.ndim) * noise.astype(_FLOAT)


def mean_variance(schedule: Schedule, model_output: jax.Array, x_t: jax.Array, t: jax.Array) -> MeanVariance:
    """Reads a network's output as p(x_{t-1} | x_t), with the learned-range variance of Nichol & Dhariwal 2021.

    Channels [:C] of the output predict the noise; channels [C:] place the log-variance between the posterior's (-1)
    and log beta (1), unclipped (arXiv 2102.09672, equation 15). The predicted x_0 is not clipped either: latents have
    no range.

    Args:
      schedule: the process.
      model_output: (B, H, W, 2C), any float dtype.
      x_t: (B, H, W, C).
      t: (B,) int steps of the schedule.
    """
    channels = x_t.shape[-1]
    chex.assert_shape(model_output, (*x_t.shape[:-1], 2 * channels))
    chex.assert_shape(t, x_t.shape[:1])
    x_t = x_t.astype(_FLOAT)
    eps, interpolation = jnp.split(model_output.astype(_FLOAT), 2, axis=-1)

    min_log = gather(schedule.posterior_log_variance_clipped, t, x_t.ndim)
    max_log = gather(np.log(schedule.betas), t, x_t.ndim)
    fraction = (interpolation + 1) / 2
    log_variance = fraction * max_log + (1 - fraction) * min_log

    pred_x0 = gather(schedule.sqrt_recip_alphas_cumprod, t, x_t.ndim) * x_t
    pred_x0 -= gather(schedule.sqrt_recipm1_alphas_cumprod, t, x_t.ndim) * eps
    mean = _posterior_mean(schedule, pred_x0, x_t, t)
    return MeanVariance(mean, jnp.exp(log_variance), log_variance, pred_x0)


def training_losses(
    schedule: Schedule,
    model_output: jax.Array,
    x_0: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    noise: jax.Array,
) -> dict[str, jax.Array]:
    """The hybrid loss of each example: squared error of the noise plus the variational bound (arXiv 2102.09672, 3.1).

    The bound trains the variances alone: its gradient is stopped at the predicted noise. It is neither rescaled nor
    weighted: at t = 0 it is the negative log-likelihood of x_0 under the discretised decoder, elsewhere the
    Kullback-Leibler divergence from the posterior.

    Args:
      schedule: the process.
      model_output: (B, H, W, 2C) of the network at (x_t, t), any float dtype.
      x_0: (B, H, W, C) scaled latents.
      x_t: (B, H, W, C) from `q_sample`.
      t: (B,) int steps of the schedule.
      noise: (B, H, W, C) used in x_t.

    Returns:
      `loss` = `mse` + `vb`, each (B,) float32, averaged over H, W and C; `vb` in bits per dimension.
    """
    chex.assert_equal_shape([x_0, x_t, noise])
    x_0, x_t, noise = (array.astype(_FLOAT) for array in (x_0, x_t, noise))
    eps, interpolation = jnp.split(model_output.astype(_FLOAT), 2, axis=-1)
    frozen_eps = jnp.concatenate([jax.lax.stop_gradient(eps), interpolation], axis=-1)

    mse = _mean_per_example(jnp.square(noise - eps))
    vb = _bits_per_dim(schedule, frozen_eps, x_0, x_t, t)
    return {"loss": mse + vb, "mse": mse, "vb": vb}


def _bits_per_dim(
    schedule: Schedule, model_output: jax.Array, x_0: jax.Array, x_t: jax.Array, t: jax.Array
) -> jax.Array:
    predicted = mean_variance(schedule, model_output, x_t, t)
    true_mean = _posterior_mean(schedule, x_0, x_t, t)
    true_log_variance = gather(schedule.posterior_log_variance_clipped, t, x_t.ndim)
    divergence = _gaussian_kl(true_mean, true_log_variance, predicted.mean, predicted.log_variance)
    decoder = _decoder_nll(x_0, predicted.mean, predicted.log_variance)
    nats = jnp.where(t == 0, _mean_per_example(decoder), _mean_per_example(divergence))
    return nats / math.log(2)


def _posterior_mean(schedule: Schedule, x_0: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, equation 7)."""
    coef1 = gather(schedule.posterior_mean_coef1, t, x_t.ndim)
    return coef1 * x_0 + gather(schedule.posterior_mean_coef2, t, x_t.ndim) * x_t


def _gaussian_kl(mean: jax.Array, log_variance: jax.Array, other_mean: jax.Array, other_log: jax.Array) -> jax.Array:
    """Divergence in nats of N(other) from N(mean), elementwise."""
    squared_distance = jnp.square(mean - other_mean) * jnp.exp(-other_log)
    return 0.5 * (other_log - log_variance - 1 + jnp.exp(log_variance - other_log) + squared_distance)


def _decoder_nll(x_0: jax.Array, mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """-log of the Gaussian's mass in the bin of 1/127.5 around x_0, open at the ends (Ho et al. 2020, equation 13).

    The bins are those of 8-bit pixels in [-1, 1]; published models apply them to latents as they stand.
    """
    inverse_std = jnp.exp(-0.5 * log_variance)
    upper = _normal_cdf(inverse_std * (x_0 - mean + 1 / 255))
    lower = _normal_cdf(inverse_std * (x_0 - mean - 1 / 255))
    mass = jnp.where(x_0 < -0.999, upper, jnp.where(x_0 > 0.999, 1 - lower, upper - lower))
    return -jnp.log(jnp.maximum(mass, 1e-12))


def _normal_cdf(x: jax.Array) -> jax.Array:
    """The tanh approximation of the normal distribution function, which published losses were computed with."""
    return 0.5 * (1 + _tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@jax.custom_jvp
def _tanh(x: jax.Array) -> jax.Array:
    """tanh correctly rounded nearly everywhere, where XLA's is off by up to 5 units in the last place.

    A bin far in the Gaussian's tail is the difference of two values near 1: five units there changed the whole
    network's gradient by 7e-5 against PyTorch's.
    """
    grown = jnp.expm1(jnp.minimum(2 * jnp.abs(x), 40.0))
    return jnp.sign(x) * grown / (grown + 2)


@_tanh.defjvp
def _tanh_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    y = _tanh(*primals)
    return y, tangents[0] * (1 - y * y)  # zero where y has rounded to 1, as in the published losses


def _mean_per_example(x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))
