"""Paths, velocities and losses of flow matching against the public code's, and the identities that hold on any path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.diffusion.flow import (
    flow_losses,
    interpolate,
    noise_from_velocity,
    path_at,
    score_from_velocity,
    shifted,
    velocity,
)
from tests.golden_models import golden_arrays, nhwc

GOLDEN = {name: nhwc(array) if array.ndim == 4 else array for name, array in golden_arrays("flow_paths").items()}
DATA, NOISE, T = GOLDEN["x1_data"], GOLDEN["x0_noise"], GOLDEN["t"]
PATHS = ["linear", "gvp"]


def stand_in(x, t):
    """The network that the golden arrays were made with."""
    return x @ GOLDEN["A"].T + 0.3 * jnp.sin(3 * t)[:, None, None, None]


def error(actual, expected):
    """The largest error, relative to the largest value; by example where sizes differ by orders of magnitude."""
    axes = tuple(range(1, expected.ndim))
    return np.max(np.max(np.abs(actual - expected), axes) / np.max(np.abs(expected), axes))


@pytest.mark.parametrize("path", PATHS)
def test_paths_targets_and_losses_are_the_public_codes(path):
    x_t = interpolate(path, DATA, T, NOISE)
    assert x_t.dtype == jnp.float32
    np.testing.assert_allclose(x_t, GOLDEN[f"{path}_xt"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(velocity(path, DATA, T, NOISE), GOLDEN[f"{path}_ut"], rtol=0, atol=1e-6)
    losses = jax.jit(lambda out: flow_losses(path, out, DATA, T, NOISE)["loss"])(stand_in(x_t, T))
    np.testing.assert_allclose(losses, GOLDEN[f"{path}_velocity_loss"], rtol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_score_and_noise_of_a_velocity_are_the_public_codes(path):
    """The score grows as 1 / sigma: relative to its size at each t, up to t = 0.999."""
    x_t = interpolate(path, DATA, T, NOISE)
    v = stand_in(x_t, T)
    assert error(noise_from_velocity(path, v, x_t, T), GOLDEN[f"{path}_noise_from_velocity"]) < 1e-6
    assert error(score_from_velocity(path, v, x_t, T), GOLDEN[f"{path}_score_from_velocity"]) < 1e-6


@pytest.mark.parametrize("path", PATHS)
def test_the_true_velocity_implies_the_noise_that_was_mixed_in(path):
    x_t, v = interpolate(path, DATA, T, NOISE), velocity(path, DATA, T, NOISE)
    np.testing.assert_allclose(noise_from_velocity(path, v, x_t, T), NOISE, atol=2e-6)


@pytest.mark.parametrize("path", PATHS)
def test_a_path_leads_from_noise_to_data_and_its_velocity_is_its_derivative(path):
    ends = jnp.array([0.0, 1.0])
    x_0, noise = DATA[:2], NOISE[:2]
    at_ends = interpolate(path, x_0, ends, noise)
    np.testing.assert_allclose(at_ends[0], noise[0], atol=1e-6)
    np.testing.assert_allclose(at_ends[1], x_0[1], atol=1e-6)
    along = lambda t: interpolate(path, DATA, t, NOISE)  # noqa: E731
    derivative = jax.jvp(along, (jnp.asarray(T),), (jnp.ones_like(T),))[1]
    np.testing.assert_allclose(velocity(path, DATA, T, NOISE), derivative, atol=2e-6)


def test_sigma_falls_to_zero_and_not_below():
    t = 1 - jnp.float32(2.0) ** -jnp.arange(1, 25.0)
    sigma = np.ravel(path_at("gvp", t).sigma)
    np.testing.assert_allclose(sigma, np.cos(np.pi / 2 * np.asarray(t, np.float64)), rtol=1e-6)
    assert path_at("gvp", jnp.ones(1)).sigma == 0


def test_gvp_keeps_the_variance_of_data_that_has_that_of_noise():
    at = path_at("gvp", jnp.linspace(0, 1, 101))
    np.testing.assert_allclose(at.alpha**2 + at.sigma**2, 1, rtol=1e-6)


def test_the_loss_reads_the_first_channels_alone():
    """Whether a network also says something of the variance is its own affair."""
    v = velocity("linear", DATA, T, NOISE)
    loss = lambda out: flow_losses("linear", out, DATA, T, NOISE)["loss"]  # noqa: E731
    np.testing.assert_array_equal(loss(v), 0)
    np.testing.assert_array_equal(loss(jnp.concatenate([v, 7 * v], -1)), 0)
    np.testing.assert_allclose(loss(v + 0.5), 0.25, rtol=1e-5)
    rounded = jnp.asarray(v + 0.5).astype(jnp.bfloat16)
    np.testing.assert_array_equal(loss(rounded), loss(rounded.astype(jnp.float32)))


@pytest.mark.parametrize("shift", [1 / 3, 3.0])
def test_the_shift_is_stable_diffusion_3s(shift):
    u = np.linspace(0, 1, 101)
    np.testing.assert_allclose(1 - shifted(1 - u, shift), shift * u / (1 + (shift - 1) * u), atol=1e-15)
    np.testing.assert_allclose(shifted(shifted(u, shift), 1 / shift), u, atol=1e-15)


def test_the_shift_keeps_both_ends_and_without_one_every_t():
    t = np.random.default_rng(0).random(100_000, np.float32)
    np.testing.assert_array_equal(jax.jit(lambda t: shifted(t, 1.0))(t), t)
    for shift in (1e-30, 0.3, 7.0, 1e30):
        assert shifted(np.array([0.0, 1.0]), shift).tolist() == [0, 1]
        assert shifted(jnp.array([0.0, 1.0]), shift).tolist() == [0, 1]
