"""The loss against the public code's, and where its gradients may and may not flow."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.diffusion.loss import mean_variance, q_sample, training_losses
from terdit_jax.diffusion.schedule import linear_schedule

SCHEDULE = linear_schedule()


def _load_golden():
    """Golden arrays channels-last, with the linear stand-in's output beside them."""
    with np.load(pathlib.Path(__file__).parent / "golden" / "diffusion_losses.npz") as file:
        golden = {name: np.moveaxis(file[name], 1, -1) if file[name].ndim == 4 else file[name] for name in file}
    shift = 0.3 * np.sin(golden["t"] / 50).astype(np.float32)
    golden["model_output"] = golden["x_t"] @ golden["A"].T + shift[:, None, None, None]
    return golden


GOLDEN = _load_golden()


def _assert_close(actual, expected):
    """To 1e-5 of the largest value."""
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.max(np.abs(expected)))


def _losses(model_output, t=GOLDEN["t"]):
    return training_losses(SCHEDULE, model_output, GOLDEN["x0"], GOLDEN["x_t"], t, GOLDEN["noise"])


def test_q_sample_is_the_public_codes():
    _assert_close(q_sample(SCHEDULE, GOLDEN["x0"], GOLDEN["t"], GOLDEN["noise"]), GOLDEN["x_t"])


def test_mean_variance_is_the_public_codes():
    predicted = mean_variance(SCHEDULE, GOLDEN["model_output"], GOLDEN["x_t"], GOLDEN["t"])
    _assert_close(predicted.mean, GOLDEN["p_mean"])
    _assert_close(predicted.variance, GOLDEN["p_variance"])
    _assert_close(predicted.log_variance, GOLDEN["p_log_variance"])
    _assert_close(predicted.pred_x0, GOLDEN["p_pred_xstart"])


def test_losses_are_the_public_codes_at_every_golden_timestep():
    assert GOLDEN["t"][0] == 0 and GOLDEN["t"][-1] == 999  # both the decoder and the divergence are in the file
    losses = jax.jit(_losses)(GOLDEN["model_output"])
    for name in ("loss", "mse", "vb"):
        _assert_close(losses[name], GOLDEN[name])


def test_q_sample_moments():
    x_0 = np.full((4, 64, 64, 4), 1.5, np.float32)
    t = np.array([0, 200, 600, 999])
    x_t = q_sample(SCHEDULE, x_0, t, np.random.default_rng(0).standard_normal(x_0.shape, np.float32))
    std = np.sqrt(1 - SCHEDULE.alphas_cumprod[t])
    # 16,384 draws an example: 5 standard errors are 5/128 of the std for the mean, 5/181 for the std.
    assert np.all(np.abs(np.mean(x_t, (1, 2, 3)) - 1.5 * np.sqrt(SCHEDULE.alphas_cumprod[t])) < std * 5 / 128)
    assert np.all(np.abs(np.std(x_t, (1, 2, 3)) - std) < std * 5 / 181)


def test_variance_interpolates_between_the_posteriors_and_beta():
    x_t, t = GOLDEN["x_t"], GOLDEN["t"]
    for interpolation, log_variance in ((-1, SCHEDULE.posterior_log_variance_clipped), (1, np.log(SCHEDULE.betas))):
        model_output = np.concatenate([x_t, np.full_like(x_t, interpolation)], -1)
        actual = mean_variance(SCHEDULE, model_output, x_t, t).log_variance
        np.testing.assert_allclose(actual, np.broadcast_to(log_variance[t, None, None, None], x_t.shape), rtol=1e-6)


def test_the_true_noise_predicts_x_0_and_has_no_error():
    model_output = np.concatenate([GOLDEN["noise"], np.full_like(GOLDEN["noise"], -1)], -1)
    losses = _losses(model_output)
    np.testing.assert_array_equal(losses["mse"], 0)
    # The posterior itself is predicted, so nothing diverges; float32 cancels 157 x_t against 157 eps.
    np.testing.assert_allclose(losses["vb"][1:], 0, atol=1e-4)
    # Steps beyond 100 lose x_0's digits to that cancellation.
    early = GOLDEN["t"] <= 100
    predicted = mean_variance(SCHEDULE, model_output, GOLDEN["x_t"], GOLDEN["t"])
    np.testing.assert_allclose(predicted.pred_x0[early], GOLDEN["x0"][early], atol=1e-5)


def test_the_bound_trains_variances_only_and_the_error_noise_only():
    model_output = jnp.asarray(GOLDEN["model_output"])
    gradient = lambda name: jax.jit(jax.grad(lambda out: jnp.sum(_losses(out)[name])))(model_output)  # noqa: E731
    bound, error, loss = gradient("vb"), gradient("mse"), gradient("loss")
    np.testing.assert_array_equal(bound[..., :4], 0)
    np.testing.assert_array_equal(error[..., 4:], 0)
    assert np.all(np.any(bound[..., 4:] != 0, axis=(1, 2, 3)))  # at every timestep
    slope = 2 * (model_output[..., :4] - GOLDEN["noise"]) / GOLDEN["noise"][0].size
    np.testing.assert_allclose(error[..., :4], slope, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(loss, bound + error, rtol=1e-6, atol=1e-9)


def test_the_bounds_gradient_is_its_slope():
    early = GOLDEN["t"] <= 100  # later the two ends of the variance's range coincide, and the slope is rounding

    @jax.jit
    def bound(interpolation):
        level = jnp.full_like(GOLDEN["noise"], interpolation)
        return _losses(jnp.concatenate([0.9 * GOLDEN["noise"], level], -1))["vb"][early]

    slope = (bound(0.3) - bound(0.1)) / 0.2
    assert np.all(np.abs(slope) > 1e-5)
    np.testing.assert_allclose(jax.jit(jax.jacobian(bound))(0.2), slope, rtol=3e-2)


# At t = 0 and interpolation 0: the geometric mean of the two ends of the variance's range.
FIRST_STD = np.exp((SCHEDULE.posterior_log_variance_clipped[0] + np.log(SCHEDULE.betas[0])) / 4)


@pytest.mark.parametrize(
    "mean, bits",
    [
        # The outer bins are open and hold all of the mass; a middle bin holds what lies within 1/255 of its centre.
        ([-5.0, 5.0, 0.0], [0, 0, -math.log2(math.erf(1 / 255 / FIRST_STD / math.sqrt(2)))]),
        ([5.0, -5.0, 5.0], [math.log2(1e12)] * 3),  # no mass: the floor
    ],
)
def test_decoder_bins(mean, bits):
    x_0 = jnp.array([-1.0, 1.0, 0.0]).reshape(3, 1, 1, 1)
    # At t = 0 and eps = 0 the mean is x_t, but for a factor of 1.00005.
    x_t = jnp.array(mean).reshape(3, 1, 1, 1)

    @jax.jit
    def bound(model_output):
        return training_losses(SCHEDULE, model_output, x_0, x_t, jnp.zeros(3, jnp.int32), x_0)["vb"]

    model_output = jnp.zeros((3, 1, 1, 2))
    np.testing.assert_allclose(bound(model_output), bits, rtol=1e-3, atol=1e-6)  # the tanh is off by up to 3e-4
    assert np.all(np.isfinite(jax.jit(jax.jacobian(bound))(model_output)))


def test_decoder_masses_of_all_bins_sum_to_one():
    """Pixels on the 8-bit grid partition the line, whatever the mean."""
    x_0 = jnp.linspace(-1, 1, 256).reshape(256, 1, 1, 1)
    x_t = jnp.full_like(x_0, 0.3)
    t = jnp.zeros(256, jnp.int32)
    bits = jax.jit(lambda out: training_losses(SCHEDULE, out, x_0, x_t, t, x_0)["vb"])(jnp.zeros((256, 1, 1, 2)))
    np.testing.assert_allclose(np.sum(2.0 ** -np.asarray(bits)), 1, rtol=1e-5)


def test_arithmetic_is_float32_for_bfloat16_outputs():
    rounded = jnp.asarray(GOLDEN["model_output"]).astype(jnp.bfloat16)
    losses, exact = _losses(rounded), _losses(rounded.astype(jnp.float32))
    for name, values in losses.items():
        assert values.dtype == jnp.float32
        np.testing.assert_array_equal(values, exact[name])


def test_a_wrong_number_of_channels_is_refused():
    with pytest.raises(AssertionError, match="shape"):
        mean_variance(SCHEDULE, GOLDEN["x_t"], GOLDEN["x_t"], GOLDEN["t"])
