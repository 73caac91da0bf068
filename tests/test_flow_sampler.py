"""Samplers of flow models against the public code's loops, and against Gaussian data in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.choices import FLOW_METHODS
from terdit_jax.diffusion.flow import path_at
from terdit_jax.diffusion.flow_sampler import LAST_STEP, flow_sample, flow_times
from tests.golden_models import golden_arrays, nhwc
from tests.test_multistep import run_in_float64

GOLDEN = golden_arrays("flow_samplers")
PATHS = ["linear", "gvp"]
MEAN, STD = 0.7, 0.4  # of the Gaussian data


def no_noise(i):
    raise AssertionError("noise was drawn")


def stand_in(x, t):
    """The network that the golden arrays were made with, with 2C channels as a model of both kinds may have."""
    v = x @ GOLDEN["A"].T + 0.3 * jnp.sin(3 * t)[:, None, None, None]
    return jnp.concatenate([v, 100 * v], -1)


def run(denoise, noise, draw_noise, path, method, num_steps, shift=1.0):
    times = flow_times(method, num_steps, shift)
    return jax.jit(lambda noise: flow_sample(denoise, noise, draw_noise, path, times, method))(noise)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("method", "name"), [("euler", "ode_euler_11"), ("heun", "ode_heun2_11")])
def test_ode_loops_are_the_public_codes(path, method, name):
    """Eleven points of the grid are ten steps."""
    x_0 = run(stand_in, nhwc(GOLDEN["z"]), no_noise, path, method, 10)
    np.testing.assert_allclose(x_0, nhwc(GOLDEN[f"{path}_{name}"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_sde_loop_is_the_public_codes(path):
    """Twelve points of the grid are eleven noisy steps and the last."""
    noise = jnp.asarray(nhwc(GOLDEN[f"{path}_sde_euler_12_noise"]))
    expected = nhwc(GOLDEN[f"{path}_sde_euler_12"])
    sample = lambda draw: run(stand_in, nhwc(GOLDEN["z"]), draw, path, "sde", 12)  # noqa: E731
    np.testing.assert_allclose(sample(lambda i: noise[i]), expected, rtol=0, atol=1e-5)
    assert np.max(np.abs(sample(lambda i: noise[10 - i]) - expected)) > 0.1, "the order of the noise matters"


def exact_velocity(path):
    """E[dx_t / dt | x_t] for data N(MEAN, STD^2), a Gaussian conditional: the best that a network can learn."""

    def denoise(x, t):
        at = path_at(path, t, x.ndim)
        slope = (at.alpha * at.d_alpha * STD**2 + at.sigma * at.d_sigma) / (at.alpha**2 * STD**2 + at.sigma**2)
        return at.d_alpha * MEAN + slope * (x - at.alpha * MEAN)

    return denoise


def ode_error(path, method, num_steps, shift=1.0):
    """The flow of Gaussian data is affine, x_0 = MEAN + STD z: there is no error but that of the steps."""
    z = jnp.linspace(-3, 3, 61).reshape(1, 1, 61, 1)
    x_0 = run(exact_velocity(path), z, no_noise, path, method, num_steps, shift)
    return float(np.max(np.abs(x_0 - (MEAN + STD * z))))


# float32 adds up to a few 1e-6 over a hundred steps: the orders are read where the steps' own error is far above that.
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("method", "order", "steps", "bound"), [("euler", 1, 64, 0.04), ("heun", 2, 16, 0.01)])
def test_ode_solvers_converge_to_the_flow_of_gaussian_data_at_their_order(path, method, order, steps, bound):
    coarse, fine = ode_error(path, method, steps), ode_error(path, method, 2 * steps)
    assert fine < coarse < bound
    assert order - 0.25 < np.log2(coarse / fine) < order + 0.35


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["dpmpp_2m", "unipc"])
def test_solvers_follow_the_same_flow(path, method):
    assert ode_error(path, method, 100) < ode_error(path, method, 25) / 1.8 < 0.01


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["dpmpp_2m", "unipc"])
def test_solvers_take_the_steps_of_their_papers_on_the_x_0_of_a_velocity(path, method):
    """The jitted loop in float32 against `multistep`'s weights in float64, from pure noise, where the SNR is 0."""
    times = flow_times(method, 8, 2.0)
    angle = np.pi / 2 * times
    alpha, sigma = (times, 1 - times) if path == "linear" else (np.sin(angle), np.cos(angle))

    def denoise(x, t):
        at = path_at(path, t, x.ndim)
        x_0 = jnp.sin(3 * x + at.alpha)
        return at.d_alpha * x_0 + at.d_sigma * (x - at.alpha * x_0) / at.sigma

    z = np.random.default_rng(0).standard_normal((2, 4, 4, 1))
    expected_x0 = lambda x, alpha, sigma: np.sin(3 * x + alpha)  # noqa: E731
    expected = run_in_float64(expected_x0, z, alpha[:-1], sigma[:-1], method)
    actual = jax.jit(lambda z: flow_sample(denoise, z, no_noise, path, times, method))(z.astype(np.float32))
    np.testing.assert_allclose(actual, expected, atol=5e-4)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_a_shifted_grid_follows_the_same_flow(method):
    for shift in (0.5, 3.0):
        assert ode_error("linear", method, 400, shift) < {"euler": 0.02, "heun": 5e-4}[method]


def moments(x):
    return float(np.mean(x)), float(np.std(x))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("method", FLOW_METHODS)
def test_samples_have_the_mean_and_deviation_of_gaussian_data(path, method, shift):
    num_steps = 250
    x = normal(0, 4, 32, 32, 4)
    key = jax.random.key(1)
    noise = lambda i: jax.random.normal(jax.random.fold_in(key, i), x.shape)  # noqa: E731
    mean, std = moments(run(exact_velocity(path), x, noise, path, method, num_steps, shift))
    # 16,384 independent samples: a standard error is STD / 128 for the mean and STD / 181 for the deviation; 4 of them,
    # and the error of 250 first-order steps, of which the SDE's last one of 0.04 leaves a little noise.
    assert abs(mean - MEAN) < 4 * STD / 128 + 0.002
    assert abs(std / STD - 1) < 4 / 181 + 0.01


@pytest.mark.parametrize("path", PATHS)
def test_the_sde_passes_through_the_marginals_of_the_path(path):
    """Half-way, x_t has mean alpha MEAN and variance alpha^2 STD^2 + sigma^2, as by the ODE."""
    times = np.linspace(0, 0.5, 201)
    x, key = normal(2, 4, 32, 32, 4), jax.random.key(3)
    noise = lambda i: jax.random.normal(jax.random.fold_in(key, i), x.shape)  # noqa: E731
    denoise = exact_velocity(path)
    x_t = jax.jit(lambda x: flow_sample(denoise, x, noise, path, times, "sde"))(x)
    at = path_at(path, jnp.array([0.5]))
    alpha, sigma = float(at.alpha[0, 0, 0, 0]), float(at.sigma[0, 0, 0, 0])
    mean, std = moments(x_t)
    expected = np.sqrt(alpha**2 * STD**2 + sigma**2)
    assert abs(mean - alpha * MEAN) < 4 * expected / 128 + 0.002
    assert abs(std / expected - 1) < 4 / 181 + 0.01
    still = jax.jit(lambda x: flow_sample(denoise, x, no_noise, path, times, "euler"))(x)
    assert np.corrcoef(np.ravel(x_t), np.ravel(x))[0, 1] < 0.9, "the SDE forgets its start"
    assert np.corrcoef(np.ravel(still), np.ravel(x))[0, 1] > 0.999, "the ODE does not"


def test_the_sde_adds_no_noise_in_its_last_step():
    x = jnp.ones((1, 2, 2, 1))
    denoise = lambda x, t: jnp.zeros_like(x)  # noqa: E731
    at = jax.jit(
        lambda step: flow_sample(denoise, x, lambda i: (i == step) * x, "linear", flow_times("sde", 10), "sde")
    )
    without = at(-1)
    assert np.all(np.abs(at(0) - without) > 0.1) and np.all(np.abs(at(8) - without) > 0.01)
    np.testing.assert_array_equal(at(9), without)


@pytest.mark.parametrize(("method", "calls"), [("euler", 5), ("heun", 10), ("sde", 5), ("unipc", 5)])
def test_a_network_sees_the_times_of_its_steps(method, calls):
    seen = []

    def denoise(x, t):
        assert t.shape == (2,) and x.dtype == t.dtype == jnp.float32
        jax.debug.callback(lambda t: seen.append(t.tolist()), t, ordered=True)
        return jnp.zeros((*x.shape[:-1], 2 * x.shape[-1]), jnp.bfloat16)

    x = jnp.ones((2, 2, 2, 1), jnp.bfloat16)
    times = flow_times(method, 5, 2.0)
    x_0 = flow_sample(denoise, x, lambda i: x, "linear", times, method)
    jax.effects_barrier()
    assert x_0.dtype == jnp.float32 and len(seen) == calls
    begins = times.astype(np.float32).tolist()
    order = [t for pair in zip(begins, begins[1:], strict=False) for t in pair] if method == "heun" else begins[:-1]
    assert seen == [[t, t] for t in order]


def test_grids():
    np.testing.assert_allclose(flow_times("euler", 4), [0, 0.25, 0.5, 0.75, 1])
    grid = flow_times("sde", 250)
    assert len(grid) == 251 and grid[-1] == 1
    np.testing.assert_allclose(grid[:-1], np.linspace(0, 1 - LAST_STEP, 250))
    np.testing.assert_allclose(1 - flow_times("heun", 4, 3.0), [1, 0.9, 0.75, 0.5, 0])
    for method in FLOW_METHODS:
        for num_steps in (1, 2, 1000):
            grid = flow_times(method, num_steps, 0.2)
            assert len(grid) == num_steps + 1 and (grid[0], grid[-1]) == (0, 1) and np.all(np.diff(grid) > 0)
