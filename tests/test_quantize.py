"""The quantiser: codes, the straight-through gradient, and starts of alpha that can learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.fast.linear import ternarize_by_layer
from terdit_jax.ternary.linear import TernaryLinear
from terdit_jax.ternary.quantize import (
    PUBLISHED,
    Rounding,
    absmean_codes,
    least_squares_alpha,
    soften,
    sound_alpha,
    straight_through,
    ternarize,
)


def test_codes_round_half_to_even_and_clip():
    # gamma = 2 (up to 1e-6): W / gamma = 0.5 rounds to 0, 1.5 clips to 1.
    weight = jnp.array([[1.0, -1.0, 3.0, -3.0]]) * (1 - 1e-9)
    assert absmean_codes(weight).tolist() == [[0, 0, 1, -1]]
    assert absmean_codes(jnp.zeros((2, 4))).tolist() == [[0] * 4] * 2


def test_codes_of_stacked_layers_use_their_own_gamma():
    weight = jax.random.normal(jax.random.key(0), (3, 8, 16)) * jnp.array([1.0, 10.0, 0.01])[:, None, None]
    stacked = absmean_codes(weight)
    assert stacked.dtype == jnp.int8
    for layer in range(3):
        np.testing.assert_array_equal(stacked[layer], absmean_codes(weight[layer]))
    assert {-1, 0, 1} == set(np.unique(stacked))


@pytest.mark.parametrize("ternarize", [ternarize, ternarize_by_layer])
@pytest.mark.parametrize("grad_dtype", [jnp.float32, jnp.bfloat16])
def test_the_straight_through_gradient_is_the_weights_and_gives_alphas(grad_dtype, ternarize):
    weight = jax.random.normal(jax.random.key(1), (2, 8, 16)) * 5  # far beyond the clip for many entries
    alpha = jnp.array([0.5, -3.0])
    cotangent = jax.random.normal(jax.random.key(2), weight.shape).astype(grad_dtype)
    (codes, same, sink), pullback = jax.vjp(lambda w, a: ternarize(w, a, grad_dtype), weight, alpha)
    assert sink.dtype == grad_dtype and not sink.any()
    np.testing.assert_array_equal(same, alpha)
    to_weight, to_alpha = pullback((np.zeros(codes.shape, jax.dtypes.float0), jnp.ones(2), cotangent))
    assert to_weight.dtype == to_alpha.dtype == jnp.float32
    np.testing.assert_array_equal(to_weight, cotangent.astype(jnp.float32))
    dot = (np.asarray(cotangent, np.float64) * codes).sum((1, 2)) / np.asarray(alpha)
    np.testing.assert_allclose(to_alpha, 1 + dot, rtol=1e-5)  # what reached alpha itself is kept


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_soft_weight_lies_between_and_has_the_ternary_ones_gradient_at_the_end(share):
    weight = np.random.default_rng(1).standard_normal((3, 8, 16)).astype(np.float32)
    alpha, dw = jnp.array([0.05, 2.0, -3.0]), np.random.default_rng(2).standard_normal((3, 8, 16)).astype(np.float32)
    w, pullback = jax.vjp(soften, jnp.asarray(weight), alpha, jnp.float32(share))
    codes, a = np.float64(absmean_codes(weight)), np.float64(alpha)[:, None, None]
    np.testing.assert_allclose(w, (1 - share) * np.float64(weight) + share * a * codes, rtol=1e-6, atol=1e-7)
    to_weight, to_alpha, to_share = pullback(dw)
    np.testing.assert_allclose(to_weight, ((1 - share) * np.abs(a) + share * a) * np.float64(dw), rtol=1e-6)
    np.testing.assert_allclose(to_alpha, share * (np.float64(dw) * codes).sum((1, 2)), rtol=1e-5, atol=1e-6)
    assert to_share == 0
    if share == 0:
        np.testing.assert_array_equal(w, weight)
    if share == 1:
        np.testing.assert_array_equal(w, np.float32(alpha)[:, None, None] * np.float32(codes))
        expected = straight_through(absmean_codes(weight), alpha, jnp.zeros(3), jnp.float32(a) * dw)
        for ours, theirs in zip((to_weight, to_alpha), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_soft_weight_knows_no_number_that_is_not_finite():
    weight = jnp.ones((2, 8, 16)).at[1, 2, 3].set(jnp.nan)
    assert np.isnan(soften(weight, jnp.ones(2), jnp.float32(0.5))).all((1, 2)).tolist() == [False, True]


def test_a_scale_of_zero_has_a_gradient():
    weight, x = jax.random.normal(jax.random.key(1), (1, 8, 16)), jax.random.normal(jax.random.key(2), (3, 16))
    run = lambda alpha: TernaryLinear(*ternarize(weight, alpha))(x).sum()  # noqa: E731
    expected = (x @ absmean_codes(weight)[0].T.astype(jnp.float32)).sum()
    np.testing.assert_allclose(jax.grad(run)(jnp.zeros(1))[0], expected, rtol=1e-5)


def test_least_squares_alpha_minimises_the_error():
    weight = jax.random.normal(jax.random.key(3), (32, 24))
    codes = absmean_codes(weight)
    alpha = least_squares_alpha(weight)
    error = lambda a: float(jnp.sum((weight - a * codes) ** 2))  # noqa: E731
    assert error(alpha) < error(alpha * 1.01) and error(alpha) < error(alpha * 0.99)


def test_least_squares_alpha_of_a_zero_matrix_is_that_of_a_xavier_draw():
    zero = least_squares_alpha(jnp.zeros((192, 64)))
    assert zero == pytest.approx(0.625 * (6 / 256) ** 0.5)
    drawn = least_squares_alpha(jax.nn.initializers.xavier_uniform()(jax.random.key(0), (192, 64)))
    assert float(zero) == pytest.approx(float(drawn), rel=0.05)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_a_matrix_whose_codes_mean_nothing_has_no_scale(value):
    weight, alpha = jax.random.normal(jax.random.key(0), (3, 8, 16)), jnp.array([0.5, -2.0, 1.0])
    np.testing.assert_array_equal(sound_alpha(weight, alpha), alpha)
    assert np.isnan(sound_alpha(weight.at[1, 2, 3].set(value), alpha)).tolist() == [False, True, False]
    assert np.isnan(sound_alpha(weight, alpha.at[2].set(value))).tolist() == [False, False, True]
    assert np.isnan(ternarize(weight.at[1, 2, 3].set(value), alpha)[1]).tolist() == [False, True, False]


# How codes and scales may be shared, beside the published way.
SHARED = [("matrix", Rounding("channel")), ("channel", PUBLISHED), ("channel", Rounding("channel", 0.7))]


def uneven(seed, shape=(2, 8, 16)):
    """Weights whose rows have sizes of their own, of which one is zero."""
    random = np.random.default_rng(seed)
    weight = random.standard_normal(shape) * np.exp(random.standard_normal((*shape[:-1], 1)))
    weight[0, 3] = 0
    return weight.astype(np.float32)


def exact_codes(weight, rounding):
    """In float64, by the definition."""
    size = np.abs(weight.astype(np.float64))
    gamma = size.mean(-1 if rounding.gamma_per == "channel" else (-2, -1), keepdims=True)
    return np.sign(weight) * (size / (gamma + 1e-6) > rounding.threshold)


@pytest.mark.parametrize("gamma_per", ["matrix", "channel"])
@pytest.mark.parametrize("threshold", [0.5, np.nextafter(0.5, 1), 0.7, 1.3])
def test_codes_are_not_zero_beyond_the_threshold(gamma_per, threshold):
    rounding = Rounding(gamma_per, float(threshold))
    codes = absmean_codes(uneven(0), rounding)
    assert codes.dtype == jnp.int8 and {-1, 0, 1} == set(np.unique(codes))
    np.testing.assert_array_equal(codes, exact_codes(uneven(0), rounding))


def test_the_published_threshold_is_rounding():
    """Numbers lie just below, at and above the half, where gamma = 2 up to 1e-6, and of the least and largest."""
    half = np.float32(0.5) * (2 + 1e-6)
    near = half * (1 + np.float32(2.0**-23) * np.arange(-4, 5, dtype=np.float32))
    weight = np.concatenate([near, -near, [0, 1e-38, 3, -5]]).astype(np.float32)
    weight = np.append(weight, 2 * (len(weight) + 1) - np.abs(weight).sum())[None]
    codes = absmean_codes(weight)
    np.testing.assert_array_equal(codes, absmean_codes(weight, Rounding(threshold=np.nextafter(0.5, 0))) * (codes != 0))
    scaled = weight / (np.abs(weight).mean(dtype=np.float32) + np.float32(1e-6))
    np.testing.assert_array_equal(codes, np.clip(np.round(scaled), -1, 1))
    np.testing.assert_array_equal(codes, np.sign(scaled) * (np.abs(scaled) > 0.5))


@pytest.mark.parametrize(("alpha_per", "rounding"), SHARED)
@pytest.mark.parametrize("ternarize", [ternarize, ternarize_by_layer])
def test_gradients_are_those_of_autograd_in_float64(ternarize, alpha_per, rounding):
    """Gradients are those of the sum of all that the maps make, with w = alpha (W + (T - W)) and T - W held fixed."""
    torch = pytest.importorskip("torch")
    random, weight = np.random.default_rng(1), uneven(1)
    alpha = random.standard_normal(weight.shape[:2] if alpha_per == "channel" else weight.shape[:1]).astype(np.float32)
    x, dy = random.standard_normal((5, 16)).astype(np.float32), random.standard_normal((5, 2, 8)).astype(np.float32)

    run = lambda weight, alpha: TernaryLinear(*ternarize(weight, alpha, jnp.float32, rounding))(x)  # noqa: E731
    y, pullback = jax.vjp(run, weight, alpha)

    master, scale = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (weight, alpha))
    used = master + (torch.tensor(exact_codes(weight, rounding)) - master).detach()
    used = used * (scale[..., None] if alpha_per == "channel" else scale[:, None, None])
    exact = torch.einsum("bi,noi->bno", torch.tensor(x, dtype=torch.float64), used)
    exact.backward(torch.tensor(dy, dtype=torch.float64))
    expected = [a.detach().numpy() for a in (exact, master.grad, scale.grad)]
    for ours, theirs in zip((y, *pullback(jnp.asarray(dy))), expected, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
        assert np.count_nonzero(theirs) > 0.9 * theirs.size


@pytest.mark.parametrize("alpha_per", ["matrix", "channel"])
@pytest.mark.parametrize("rounding", [PUBLISHED, Rounding("channel", 0.7), Rounding(threshold=1.3)])
def test_least_squares_alpha_is_the_minimum_in_float64(alpha_per, rounding):
    weight = uneven(2).astype(np.float64)
    codes, over = exact_codes(uneven(2), rounding), -1 if alpha_per == "channel" else (-2, -1)
    dot, count = (weight * codes).sum(over), np.abs(codes).sum(over)
    fallback = (2 + rounding.threshold) / 4 * (6 / 24) ** 0.5
    expected = np.where(count > 0, dot / np.maximum(count, 1), fallback)
    assert (count == 0).any() == (alpha_per == "channel")
    np.testing.assert_allclose(least_squares_alpha(uneven(2), alpha_per, rounding), expected, rtol=1e-6)


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_the_start_of_a_zero_row_is_that_of_a_xavier_draw(threshold):
    rounding = Rounding("channel", threshold)
    drawn = least_squares_alpha(
        jax.nn.initializers.xavier_uniform()(jax.random.key(0), (192, 4096)), "channel", rounding
    )
    zero = least_squares_alpha(jnp.zeros((192, 4096)), "channel", rounding)
    assert zero.shape == drawn.shape == (192,)
    np.testing.assert_allclose(drawn, zero, rtol=0.05)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_what_shares_gamma_with_a_number_that_is_not_finite_has_no_scale(value):
    weight, by_channel = jnp.asarray(uneven(3)).at[1, 2, 3].set(value), jnp.ones((2, 8))
    lost = np.isnan(sound_alpha(weight, by_channel, Rounding("channel")))
    assert np.argwhere(lost).tolist() == [[1, 2]]
    assert np.isnan(sound_alpha(weight, by_channel)).all(1).tolist() == [False, True]
    assert np.isnan(sound_alpha(weight, jnp.ones(2), Rounding("channel"))).tolist() == [False, True]
    lost = np.isnan(sound_alpha(jnp.asarray(uneven(3)), by_channel.at[0, 5].set(value), Rounding("channel")))
    assert np.argwhere(lost).tolist() == [[0, 5]]
