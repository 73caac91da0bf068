"""Sampling a flow model: from noise at t = 0 to data at t = 1 along its velocity, as one scan.

What `sampler` is to DDPM models. The velocity, guided or not, and the source of the noise come in as functions.
"""

import jax
import jax.numpy as jnp
import numpy as np

from terdit_jax.choices import SOLVERS
from terdit_jax.diffusion.flow import data_from_velocity, noise_level, path_at, score_from_velocity, shifted
from terdit_jax.diffusion.guidance import Denoise, DrawNoise
from terdit_jax.diffusion.multistep import solve, solver_weights

LAST_STEP = 0.04  # of the SDE, in t, whatever the shift: without noise, as SiT's


def flow_times(method: str, num_steps: int, shift: float = 1.0) -> np.ndarray:
    """The t at which steps begin, and 1, where the last ends: (num_steps + 1,) float64, ascending from 0.

    Equal steps moved by `flow.shifted`. Those of "sde" end at 1 - `LAST_STEP`, and one of that size follows.
    """
    if method == "sde":
        return np.append((1 - LAST_STEP) * shifted(np.linspace(0, 1, num_steps), shift), 1.0)
    return shifted(np.linspace(0, 1, num_steps + 1), shift)


def flow_sample(
    denoise: Denoise, noise: jax.Array, draw_noise: DrawNoise, path: str, times: np.ndarray, method: str
) -> jax.Array:
    """Follows the velocity from the first time to the last. Traceable under jit.

    Args:
      denoise: called with x (B, H, W, C) and t (B,), both float32; the first C channels it returns are the velocity.
      noise: (B, H, W, C) standard normal, where it starts.
      draw_noise: called by "sde" alone, whose last step adds none of it.
      path, times: of `flow.path_at` and of `flow_times`.
      method: "euler"; "heun", of second order at two calls of `denoise` a step; "sde", Euler-Maruyama steps of
        dx = (v + sigma score) dt + sqrt(2 sigma) dw, which has the ODE's marginals (SiT with w = sigma); or one of
        `multistep.solver_weights`, which take the x_0 that the velocity implies.

    Returns:
      x_0, (B, H, W, C) float32.
    """
    grid, step_sizes = jnp.asarray(times, jnp.float32), jnp.asarray(np.diff(times), jnp.float32)
    batch, channels = noise.shape[0], noise.shape[-1]

    def velocity(x: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        t = jnp.full((batch,), grid[i])
        return denoise(x, t)[..., :channels].astype(jnp.float32), t

    if method in SOLVERS:
        predict_x0 = lambda x, i: data_from_velocity(path, velocity(x, i)[0], x, jnp.full((batch,), grid[i]))  # noqa: E731
        return solve(predict_x0, noise, draw_noise, solver_weights(*noise_level(path, times), method))

    def step(x: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        dt = step_sizes[i]
        v, t = velocity(x, i)
        if method == "heun":
            v = (v + velocity(x + dt * v, i + 1)[0]) / 2
        if method != "sde":
            return x + dt * v, None
        sigma = path_at(path, t, x.ndim).sigma
        spread = jnp.where(i < len(step_sizes) - 1, jnp.sqrt(2 * sigma * dt), 0)
        x += dt * (v + sigma * score_from_velocity(path, v, x, t))
        return x + spread * draw_noise(i).astype(jnp.float32), None

    return jax.lax.scan(step, noise.astype(jnp.float32), jnp.arange(len(step_sizes), dtype=jnp.int32))[0]
