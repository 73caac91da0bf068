"""Activations rounded to 8 bits, against the same arithmetic in NumPy; and maps that multiply in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.fast.eight_bit import SAME, quantize
from terdit_jax.fast.linear import FastLinear
from terdit_jax.ternary.quantize import absmean_codes
from tests.golden_models import assert_close


def draws(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("num_axes", [1, 2])
def test_whole_numbers_are_those_of_numpy(num_axes):
    h = draws(3, 5, 16)
    rounded, scale = quantize(jnp.asarray(h), "int8", num_axes)
    axes = tuple(range(-num_axes, 0))
    step = np.abs(h).max(axis=axes, keepdims=True) / 127
    assert (rounded.dtype, rounded.shape, scale.shape) == (jnp.int8, h.shape, h.shape[:-num_axes])
    np.testing.assert_allclose(scale, step.squeeze(axes), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(rounded), np.round(h / step), atol=1)
    assert np.mean(np.asarray(rounded) != np.round(h / step)) < 0.01 and np.abs(np.asarray(rounded)).max() == 127


def test_each_token_is_rounded_on_its_own_scale():
    h = draws(4, 32) * np.array([1e-6, 1.0, 300.0, 1e6], np.float32)[:, None]
    rounded, scale = quantize(jnp.asarray(h), "float8_e4m3fn")
    numbers = np.asarray(rounded.astype(jnp.float32)) * np.asarray(scale)[:, None]
    # Half a unit of three bits; below the smallest normal number, half a step of a fixed grid.
    assert np.all(np.abs(numbers - h) <= 2**-4 * np.abs(h) + 2**-10 * np.asarray(scale)[:, None])
    assert np.all(np.isfinite(numbers)) and np.abs(numbers - h).max() > 0


def test_float_dtypes_have_no_scale():
    h = draws(2, 8)
    rounded, scale = quantize(jnp.asarray(h), "bfloat16")
    assert rounded.dtype == jnp.bfloat16 and scale is None


@pytest.fixture
def group():
    """Three maps of one input: codes (3, 8, 16), alpha (3,), x (2, 5, 16)."""
    keys = jax.random.split(jax.random.key(0), 3)
    codes = absmean_codes(jax.random.normal(keys[0], (3, 8, 16)))
    return codes, jax.random.normal(keys[1], (3,)), jax.random.normal(keys[2], (2, 5, 16))


@pytest.mark.parametrize(("matmul_dtype", "bound"), [("int8", 0.01), ("float8_e4m3fn", 0.04)])
def test_eight_bits_round_activations_and_their_gradient_only(group, matmul_dtype, bound):
    """Whole numbers are summed exactly; the weights' gradient does not change by a bit."""
    codes, alpha, x = group
    cotangent = jax.random.normal(jax.random.key(1), (2, 5, 3, 8))

    def run(dtype):
        y, pullback = jax.vjp(lambda x, sink: FastLinear(codes, alpha, sink, None, dtype)(x), x, jnp.zeros(codes.shape))
        return y, *pullback(cotangent)

    (y, dx, dw), (exact_y, exact_dx, exact_dw) = run(matmul_dtype), run(SAME)
    np.testing.assert_array_equal(dw, exact_dw)
    for actual, expected in ((y, exact_y), (dx, exact_dx)):
        assert 1e-4 < jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected) < bound


def test_eight_bits_multiply_exactly(group):
    """Activations that int8 holds come out as in float32."""
    codes, alpha, _ = group
    x = jax.random.randint(jax.random.key(3), (2, 5, 16), -126, 127).at[..., 0].set(127).astype(jnp.float32)
    sink = jnp.zeros(codes.shape)
    assert_close(FastLinear(codes, alpha, sink, None, "int8")(x), FastLinear(codes, alpha, sink)(x))
