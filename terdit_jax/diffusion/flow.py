"""Flow matching: the paths from noise to data, and what the velocity along one says of noise and score.

After SiT (Ma et al. 2024, arXiv 2401.08740): t runs from 0, noise, to 1, data. Names follow this package: x_0 is the
data (SiT's x_1), `noise` its x_0. `flow_sampler` follows the velocity; all is float32, (B, H, W, C) with t (B,).
"""

import math
from typing import NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np

_Times = TypeVar("_Times", np.ndarray, jax.Array)


class PathAt(NamedTuple):
    """The weights of x_t = alpha x_0 + sigma noise and their derivatives by t, (B, 1, ..., 1) float32 each."""

    alpha: jax.Array
    sigma: jax.Array
    d_alpha: jax.Array
    d_sigma: jax.Array


def noise_level(path: str, t: _Times) -> tuple[_Times, _Times]:
    """alpha and sigma of a path at times t, in t's shape and dtype; NumPy arrays stay NumPy arrays."""
    if path == "linear":
        return t, 1 - t
    sin = jnp.sin if isinstance(t, jax.Array) else np.sin
    return sin(math.pi / 2 * t), sin(math.pi / 2 * (1 - t))  # no cosine, so that sigma falls to 0 and not below


def path_at(path: str, t: jax.Array, ndim: int = 4) -> PathAt:
    """A path at t (B,), to broadcast against `ndim` axes: "linear", or "gvp" of constant variance."""
    t = t.astype(jnp.float32).reshape(t.shape + (1,) * (ndim - 1))
    alpha, sigma = noise_level(path, t)
    if path == "linear":
        return PathAt(alpha, sigma, jnp.ones_like(t), -jnp.ones_like(t))
    return PathAt(alpha, sigma, math.pi / 2 * sigma, -math.pi / 2 * alpha)


def interpolate(path: str, x_0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """x_t, the point of a path at t between noise and data x_0."""
    chex.assert_equal_shape([x_0, noise])
    at = path_at(path, t, x_0.ndim)
    return at.alpha * x_0.astype(jnp.float32) + at.sigma * noise.astype(jnp.float32)


def velocity(path: str, x_0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """d x_t / dt of `interpolate`, which the network learns."""
    at = path_at(path, t, x_0.ndim)
    return at.d_alpha * x_0.astype(jnp.float32) + at.d_sigma * noise.astype(jnp.float32)


def noise_from_velocity(path: str, v: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """The noise in x_t that a velocity implies; its divisor is 1 (linear) or pi / 2 (gvp) at every t."""
    at = path_at(path, t, x_t.ndim)
    return (at.d_alpha * x_t - at.alpha * v) / (at.sigma * at.d_alpha - at.alpha * at.d_sigma)


def data_from_velocity(path: str, v: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """The x_0 in x_t that a velocity implies, by the same divisor."""
    at = path_at(path, t, x_t.ndim)
    return (at.sigma * v - at.d_sigma * x_t) / (at.sigma * at.d_alpha - at.alpha * at.d_sigma)


def score_from_velocity(path: str, v: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """The gradient of log p(x_t) that a velocity implies, -noise / sigma; infinite at t = 1."""
    return -noise_from_velocity(path, v, x_t, t) / path_at(path, t, x_t.ndim).sigma


def flow_losses(path: str, out: jax.Array, x_0: jax.Array, t: jax.Array, noise: jax.Array) -> dict[str, jax.Array]:
    """`loss`: squared error of the velocity, out[..., :C] in any float dtype, (B,) means over H, W and C."""
    error = out[..., : x_0.shape[-1]].astype(jnp.float32) - velocity(path, x_0, t, noise)
    return {"loss": jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))}


def shifted(t: _Times, shift: float) -> _Times:
    """t with the noise level u = 1 - t moved to s u / (1 + (s - 1) u) (Esser et al. 2024, arXiv 2403.03206, 5.3.2).

    Written so that 0 and 1 stay exactly, and every t at shift 1.
    """
    return t / (t + shift * (1 - t))
