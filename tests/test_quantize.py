"""The quantiser: codes, the straight-through gradient, and starts of alpha that can learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.fast.linear import ternarize_by_layer
from terdit_jax.ternary.linear import TernaryLinear
from terdit_jax.ternary.quantize import absmean_codes, least_squares_alpha, sound_alpha, ternarize


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
