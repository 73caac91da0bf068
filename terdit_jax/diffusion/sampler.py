"""Sampling: from noise to x_0 over a (respaced) schedule, by any method, as one scan.

The denoiser, guided or not, and the source of the noise come in as functions; decoding the latents is left to others.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import numpy as np

from terdit_jax.choices import METHODS, SOLVERS
from terdit_jax.diffusion.guidance import Denoise
from terdit_jax.diffusion.loss import mean_variance
from terdit_jax.diffusion.multistep import solve, solver_weights
from terdit_jax.diffusion.schedule import Schedule, gather
from terdit_jax.errors import UserError


def sample(
    denoise: Denoise,
    x_T: jax.Array,
    draw_noise: Callable[[jax.Array], jax.Array],
    schedule: Schedule,
    method: str = "ddpm",
    eta: float = 0.0,
) -> jax.Array:
    """Runs the reverse process from the last step of the schedule to the first. Traceable under jit.

    Args:
      denoise: called with x_t (B, H, W, C) float32 and the model timesteps t (B,) int32; returns (B, H, W, 2C), noise
        then variance interpolation, in any float dtype.
      x_T: (B, H, W, C) standard normal.
      draw_noise: called with the loop index i (int32 scalar, 0 for the first and noisiest step); returns (B, H, W, C)
        standard normal. Deterministic methods never call it; the last step adds none of it.
      schedule: the steps to take, usually from `respace`; each is one call of `denoise`.
      method: "ddpm", ancestral sampling with the learned variance (Ho et al. 2020, algorithm 2), "ddim" (Song et al.
        2021, equation 12), which like all the others ignores it, or one of `multistep.solver_weights`.
      eta: of DDIM: 0 is deterministic, 1 as noisy as the posterior. Unused by the other methods.

    Returns:
      x_0, (B, H, W, C) float32: x is carried in float32, for a step moves it by less than bfloat16 resolves.

    Raises:
      UserError: an unknown method, or eta outside 0..1.
    """
    if method not in METHODS:
        raise UserError(f"{method!r} is no sampling method: give one of {', '.join(METHODS)}")
    if not 0 <= eta <= 1:
        raise UserError(f"eta is {eta}: give a number from 0 to 1")
    batch = x_T.shape[0]
    num_steps = schedule.num_timesteps

    def predict(x_t: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        t = jnp.full((batch,), num_steps - 1 - i, jnp.int32)
        return denoise(x_t, jnp.asarray(schedule.timestep_map)[t]), t

    if method in SOLVERS:
        alpha = np.append(schedule.sqrt_alphas_cumprod[::-1], 1.0)
        sigma = np.append(schedule.sqrt_one_minus_alphas_cumprod[::-1], 0.0)

        def predict_x0(x_t: jax.Array, i: jax.Array) -> jax.Array:
            model_output, t = predict(x_t, i)
            return mean_variance(schedule, model_output, x_t, t).pred_x0

        return solve(predict_x0, x_T, draw_noise, solver_weights(alpha, sigma, method))
    advance = _ddpm_step if method == "ddpm" else functools.partial(_ddim_step, eta=eta)

    def step(x_t: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        model_output, t = predict(x_t, i)
        return advance(schedule, model_output, x_t, t, lambda: draw_noise(i).astype(jnp.float32)), None

    x_0, _ = jax.lax.scan(step, x_T.astype(jnp.float32), jnp.arange(num_steps, dtype=jnp.int32))
    return x_0


def _ddpm_step(
    schedule: Schedule, model_output: jax.Array, x_t: jax.Array, t: jax.Array, draw: Callable[[], jax.Array]
) -> jax.Array:
    predicted = mean_variance(schedule, model_output, x_t, t)
    # The first step of the process has no posterior variance (its log-table is clipped there): the mean is the sample.
    std = gather(schedule.posterior_variance > 0, t, x_t.ndim) * jnp.exp(0.5 * predicted.log_variance)
    return predicted.mean + std * draw()


def _ddim_step(
    schedule: Schedule,
    model_output: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    draw: Callable[[], jax.Array],
    eta: float,
) -> jax.Array:
    # Formed in float64: at eta 1 the weight of eps is a difference of nearly equal numbers.
    sigma = eta * np.sqrt(schedule.posterior_variance)
    eps_weight = np.sqrt(1 - schedule.alphas_cumprod_prev - sigma**2)
    eps = model_output[..., : x_t.shape[-1]].astype(jnp.float32)
    pred_x0 = mean_variance(schedule, model_output, x_t, t).pred_x0
    x = gather(np.sqrt(schedule.alphas_cumprod_prev), t, x_t.ndim) * pred_x0
    x += gather(eps_weight, t, x_t.ndim) * eps
    return x + gather(sigma, t, x_t.ndim) * draw() if eta else x
