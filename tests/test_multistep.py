"""The solvers' weights against the papers' formulas, and their order of convergence where the answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from terdit_jax.choices import SOLVERS
from terdit_jax.diffusion.multistep import solver_weights
from terdit_jax.diffusion.sampler import sample
from terdit_jax.diffusion.schedule import linear_schedule, respace
from terdit_jax.diffusion.spacing import choose_timesteps

FULL = linear_schedule()
TEN = respace(FULL, choose_timesteps(FULL, 10, "logsnr"))
# Three Gaussians on a line.
WEIGHTS, MEANS, STDS = np.array([0.3, 0.5, 0.2]), np.array([-1.2, 0.3, 1.5]), np.array([0.4, 0.3, 0.35])


def run_in_float64(expected_x0, x, alpha, sigma, method, weights=None):
    """A solver as `sampler` runs it, from x at the first of the noise levels, in NumPy."""
    w = weights or solver_weights_between(alpha, sigma, method)
    before = previous = second = np.zeros_like(x)
    for i in range(len(w.x)):
        x0 = expected_x0(x, alpha[i], sigma[i])
        if w.correct_x is not None and i:
            known = w.correct_x0[i] * previous + w.correct_previous[i] * second
            x = w.correct_x[i] * before + w.correct_new[i] * x0 + known
        before, previous, second, x = x, x0, previous, w.x[i] * x + w.x0[i] * x0 + w.previous_x0[i] * previous
    return x


def solver_weights_between(alpha, sigma, method):
    """Weights between noise levels, ascending in log-SNR; the last step, to no noise at all, is added."""
    return solver_weights(np.append(alpha, 1.0), np.append(sigma, 0.0), method)


def ten_weights(method):
    return solver_weights_between(TEN.sqrt_alphas_cumprod[::-1], TEN.sqrt_one_minus_alphas_cumprod[::-1], method)


def mixture_x0(x, alpha, sigma):
    """E[x_0 | x_t]."""
    x = x[..., None]
    variance = alpha**2 * STDS**2 + sigma**2
    logit = np.log(WEIGHTS) - 0.5 * np.log(variance) - 0.5 * (x - alpha * MEANS) ** 2 / variance
    share = np.exp(logit - logit.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    return (share * (MEANS + alpha * STDS**2 / variance * (x - alpha * MEANS))).sum(-1)


def levels(num_steps, first=-4.0, last=2.5):
    """alpha and sigma at equal steps of the log-SNR."""
    lambdas = np.linspace(first, last, num_steps + 1)
    return 1 / np.sqrt(1 + np.exp(-2 * lambdas)), 1 / np.sqrt(1 + np.exp(2 * lambdas))


@pytest.mark.parametrize(("method", "order"), [("first", 1), ("dpmpp_2m", 2), ("unipc", 3)])
def test_order_of_convergence_on_a_mixture(method, order):
    """Against the exact flow: it keeps the order of points, so quantiles of one marginal go to those of another."""
    share = np.linspace(0.02, 0.98, 49)
    alpha, sigma = levels(1)

    def quantiles(a, s):
        grid = np.linspace(-8, 8, 1_600_001)
        below = sum(
            w * norm.cdf(grid, a * m, np.hypot(a * std, s)) for w, m, std in zip(WEIGHTS, MEANS, STDS, strict=True)
        )
        return np.interp(share, below, grid)

    start = quantiles(alpha[0], sigma[0])
    # The last step of every solver is of first order: what it starts from, the level before it, is what counts here.
    end = mixture_x0(quantiles(alpha[-1], sigma[-1]), alpha[-1], sigma[-1])
    errors = []
    for num_steps in (40, 80, 160):
        alpha, sigma = levels(num_steps)
        weights = solver_weights_between(alpha, sigma, "dpmpp_2m" if method == "first" else method)
        if method == "first":
            weights = weights._replace(x0=weights.x0 + weights.previous_x0, previous_x0=0 * weights.x0)
        errors.append(np.abs(run_in_float64(mixture_x0, start, alpha, sigma, method, weights) - end).mean())
    measured = np.log2(np.array(errors[:-1]) / errors[1:])
    assert errors[-1] < 0.02
    np.testing.assert_allclose(measured[-1], order, atol=0.3)


def test_weights_of_a_constant_prediction_reach_it():
    """Whatever x is, if the network always names one x_0, every step moves along the straight line to it."""
    for method in SOLVERS:
        w = ten_weights(method)
        alpha = np.append(TEN.sqrt_alphas_cumprod[::-1], 1)
        np.testing.assert_allclose(w.x * alpha[:-1] + w.x0 + w.previous_x0, alpha[1:], atol=1e-12)
        if w.correct_x is not None:
            known = w.correct_new + w.correct_x0 + w.correct_previous
            np.testing.assert_allclose((w.correct_x * np.roll(alpha[:-1], 1) + known)[1:], alpha[1:-1], atol=1e-12)


def test_noise_keeps_the_variance_of_the_process():
    """The SDE's step leaves N(0, sigma_i^2) noise around a known x_0 as N(0, sigma_{i+1}^2)."""
    w = ten_weights("dpmpp_2m_sde")
    sigma = np.append(TEN.sqrt_one_minus_alphas_cumprod[::-1], 0)
    np.testing.assert_allclose((w.x * sigma[:-1]) ** 2 + w.noise**2, sigma[1:] ** 2, atol=1e-12)
    assert np.all(w.noise[:-1] > 0) and w.noise[-1] == 0


def test_the_first_and_the_last_step_are_of_first_order():
    for method in SOLVERS:
        w = ten_weights(method)
        assert w.previous_x0[0] == w.previous_x0[-1] == 0 and np.all(w.previous_x0[1:-1] != 0)
        assert (w.x[-1], w.x0[-1]) == (0, 1)


def test_first_step_is_ddims():
    """DPM-Solver++ of first order is DDIM (arXiv 2211.01095, section 4.1)."""
    w, t = ten_weights("dpmpp_2m"), TEN.num_timesteps - 1
    ratio = np.sqrt(1 - TEN.alphas_cumprod_prev[t]) / TEN.sqrt_one_minus_alphas_cumprod[t]
    np.testing.assert_allclose(w.x[0], ratio)
    np.testing.assert_allclose(
        w.x0[0], np.sqrt(TEN.alphas_cumprod_prev[t]) - ratio * TEN.sqrt_alphas_cumprod[t], rtol=1e-10
    )


@pytest.mark.parametrize("method", ["dpmpp_2m", "unipc"])
def test_the_scan_adds_up_what_the_weights_say(method):
    """The jitted loop in float32 against the one above in float64, on a denoiser that bends."""

    def denoise(x_t, t):
        return jnp.concatenate([x_t * 0.9 + 0.1 * jnp.sin(3 * x_t + t[0]), jnp.zeros_like(x_t)], -1)

    def expected_x0(x, alpha, sigma):
        (t,) = TEN.timestep_map[np.isclose(TEN.sqrt_alphas_cumprod, alpha, rtol=1e-12, atol=0)]
        return (x - sigma * (x * 0.9 + 0.1 * np.sin(3 * x + t))) / alpha

    x_T = np.random.default_rng(0).standard_normal((2, 4, 4, 1))
    actual = jax.jit(lambda x: sample(denoise, x, lambda i: 1 / 0, TEN, method))(x_T.astype(np.float32))
    alpha, sigma = TEN.sqrt_alphas_cumprod[::-1], TEN.sqrt_one_minus_alphas_cumprod[::-1]
    expected = run_in_float64(expected_x0, x_T, alpha, sigma, method, ten_weights(method))
    np.testing.assert_allclose(actual, expected, atol=2e-4 * np.abs(expected).max())


def test_the_sde_samples_gaussian_data():
    """N(0.7, 0.4^2) in 60 steps: 16,384 independent samples, four standard errors."""
    schedule = respace(FULL, choose_timesteps(FULL, 60, "power"))
    mean, std = 0.7, 0.4
    alpha, sigma = (jnp.asarray(schedule.sqrt_alphas_cumprod), jnp.asarray(schedule.sqrt_one_minus_alphas_cumprod))
    step_of = np.zeros(1000, np.int32)
    step_of[schedule.timestep_map] = np.arange(60)

    def denoise(x_t, t):
        a, s = (table[jnp.asarray(step_of)[t[0]]] for table in (alpha, sigma))
        eps = (x_t - a * mean) * s / (a**2 * std**2 + s**2)
        return jnp.concatenate([eps, jnp.zeros_like(eps)], -1)

    key = jax.random.key(0)
    noise = lambda i: jax.random.normal(jax.random.fold_in(key, i), (4, 64, 64, 1))  # noqa: E731
    x_0 = jax.jit(lambda: sample(denoise, noise(99), noise, schedule, "dpmpp_2m_sde"))()
    assert abs(np.mean(x_0) - mean) < 4 * std / 128
    assert abs(np.std(x_0) / std - 1) < 4 / 181 + 5e-3
    with pytest.raises(KeyError):
        ten_weights("euler")
