"""Whole sampling loops against the public code's with its recorded noise, and against Gaussian data in closed form."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.diffusion.sampler import sample
from terdit_jax.diffusion.schedule import gather, linear_schedule, respace, space_timesteps
from terdit_jax.errors import UserError

FULL = linear_schedule()
TEN = respace(FULL, space_timesteps(1000, 10))
MEAN, STD = 0.7, 0.4  # of the Gaussian data


def _channels_last(array):
    return np.moveaxis(array, -3, -1)


def _load_golden(name):
    with np.load(pathlib.Path(__file__).parent / "golden" / name) as file:
        golden = dict(file)
    eps_matrix, var_matrix = golden["eps_matrix"], golden["var_matrix"]

    def denoise(x_t, t):
        return jnp.concatenate([x_t @ eps_matrix.T, jnp.tanh(x_t @ var_matrix.T)], -1)

    return denoise, *(jnp.asarray(_channels_last(golden[key])) for key in ("x_T", "noise", "out"))


def _no_noise(i):
    raise AssertionError("noise was drawn")


def _normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


@pytest.mark.parametrize("method, section_counts", [("ddpm", "10"), ("ddim", "ddim10")])
def test_loop_is_the_public_codes(method, section_counts):
    denoise, x_T, noise, expected = _load_golden(f"sample_{method}10.npz")
    schedule = respace(FULL, space_timesteps(1000, section_counts))
    run = jax.jit(lambda x_T: sample(denoise, x_T, lambda i: noise[i], schedule, method))
    np.testing.assert_allclose(run(x_T), expected, rtol=0, atol=1e-4)


def test_the_golden_noise_matters():
    denoise, x_T, noise, expected = _load_golden("sample_ddpm10.npz")
    assert np.max(np.abs(sample(denoise, x_T, lambda i: noise[9 - i], TEN) - expected)) > 0.1


def _exact_denoise(schedule):
    """For data N(MEAN, STD^2): the least-squares noise prediction, and the true reverse variance as interpolation.

    x_t is N(signal MEAN, signal^2 STD^2 + 1 - signal^2), and q(x_{t-1} | x_t) a Gaussian whose variance is the
    posterior's plus what is left unknown of x_0: with this output DDPM is exact in any number of steps.
    """
    alpha_bar = schedule.alphas_cumprod
    marginal_variance = alpha_bar * STD**2 + 1 - alpha_bar
    x_0_variance = STD**2 * (1 - alpha_bar) / marginal_variance
    reverse_variance = schedule.posterior_variance + schedule.posterior_mean_coef1**2 * x_0_variance
    min_log, max_log = schedule.posterior_log_variance_clipped, np.log(schedule.betas)
    interpolation = 2 * (np.log(reverse_variance) - min_log) / (max_log - min_log) - 1
    step_of = np.zeros(1000, np.int32)
    step_of[schedule.timestep_map] = np.arange(schedule.num_timesteps)

    def denoise(x_t, timesteps):
        t = jnp.asarray(step_of)[timesteps]
        centred = x_t - MEAN * gather(schedule.sqrt_alphas_cumprod, t)
        eps = centred * gather(schedule.sqrt_one_minus_alphas_cumprod / marginal_variance, t)
        return jnp.concatenate([eps, jnp.broadcast_to(gather(interpolation, t), x_t.shape)], -1)

    return denoise


def _start(z, schedule):
    """x_T as the data's own process ends, at standard normal z: pure noise is only its limit."""
    alpha_bar = schedule.alphas_cumprod[-1]
    return np.sqrt(alpha_bar) * MEAN + np.sqrt(alpha_bar * STD**2 + 1 - alpha_bar) * z


@pytest.mark.parametrize("num_steps", [10, 50])
def test_ddpm_samples_gaussian_data(num_steps):
    schedule = respace(FULL, space_timesteps(1000, num_steps))
    z, noise = _normal(0, 8, 32, 32, 4), _normal(1, num_steps, 8, 32, 32, 4)
    run = jax.jit(lambda x_T: sample(_exact_denoise(schedule), x_T, lambda i: noise[i], schedule))
    x_0 = run(_start(z, schedule))
    # 32,768 independent samples: a standard error is STD/181 for the mean and STD/256 for the std; 4 of them. The
    # noise that the last step leaves out, a variance of 1e-4, takes 3e-4 of the std.
    assert abs(np.mean(x_0) - MEAN) < 4 * STD / 181
    assert abs(np.std(x_0) / STD - 1) < 4 / 256 + 3e-4


def test_ddim_follows_the_probability_flow_of_gaussian_data():
    """That flow is affine, x_0 = MEAN + STD z: no Monte-Carlo error, only that of first-order steps."""
    z = jnp.linspace(-3, 3, 61).reshape(1, 1, 61, 1)
    error = {}
    for num_steps in (125, 500):
        schedule = respace(FULL, space_timesteps(1000, num_steps))
        run = jax.jit(lambda x_T, s=schedule: sample(_exact_denoise(s), x_T, _no_noise, s, "ddim"))
        error[num_steps] = np.max(np.abs(run(_start(z, schedule)) - (MEAN + STD * z)))
    assert error[500] < 0.01
    assert 3 < error[125] / error[500] < 5  # four times the steps


def test_ddim_at_eta_one_is_ddpm_with_the_posterior_variance():
    x_T, noise = _normal(0, 2, 4, 4, 3), _normal(1, 10, 2, 4, 4, 3)
    denoise = lambda x_t, t: jnp.concatenate([0.9 * jnp.sin(x_t), -jnp.ones_like(x_t)], -1)  # noqa: E731
    ddpm = sample(denoise, x_T, lambda i: noise[i], TEN, "ddpm")
    ddim = sample(denoise, x_T, lambda i: noise[i], TEN, "ddim", eta=1.0)
    np.testing.assert_allclose(ddim, ddpm, rtol=1e-3, atol=1e-3)


def test_model_sees_its_own_timesteps_in_descending_order():
    seen = []

    def denoise(x_t, t):
        assert t.shape == (2,) and t.dtype == jnp.int32
        assert x_t.dtype == jnp.float32
        jax.debug.callback(lambda t: seen.append(t.tolist()), t, ordered=True)
        return jnp.zeros((*x_t.shape[:-1], 2 * x_t.shape[-1]), jnp.bfloat16)

    x_0 = sample(denoise, jnp.ones((2, 2, 2, 1), jnp.bfloat16), _no_noise, TEN, "ddim")
    jax.effects_barrier()
    assert x_0.dtype == jnp.float32
    assert seen == [[t, t] for t in reversed(space_timesteps(1000, 10))]


@pytest.mark.parametrize("method, eta", [("ddpm", 0.0), ("ddim", 1.0)])
def test_noise_comes_in_loop_order_and_the_last_step_adds_none(method, eta):
    x_T = jnp.ones((1, 2, 2, 1))

    @jax.jit
    def with_noise_at(step):
        denoise = lambda x_t, t: jnp.zeros((*x_t.shape[:-1], 2 * x_t.shape[-1]))  # noqa: E731
        return sample(denoise, x_T, lambda i: (i == step) * x_T, TEN, method, eta)

    without = with_noise_at(-1)
    assert np.all(np.abs(with_noise_at(0) - without) > 1)
    assert np.all(np.abs(with_noise_at(8) - without) > 1e-3)
    np.testing.assert_array_equal(with_noise_at(9), without)


def test_unknown_method_and_eta_are_named():
    denoise, x_T, *_ = _load_golden("sample_ddpm10.npz")
    with pytest.raises(UserError, match="'euler' is no sampling method: give one of ddpm, ddim, dpmpp_2m"):
        sample(denoise, x_T, _no_noise, TEN, "euler")
    with pytest.raises(UserError, match="eta is 1.5"):
        sample(denoise, x_T, _no_noise, TEN, "ddim", eta=1.5)
