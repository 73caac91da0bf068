"""Activations rounded to 8 bits, against the same arithmetic in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.ternary.activations import quantize


def draws(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("num_axes", [1, 2])
def test_whole_numbers_are_those_of_numpy(num_axes):
    h = draws(3, 5, 16)
    operand, scale = quantize(jnp.asarray(h), "int8", num_axes)
    axes = tuple(range(-num_axes, 0))
    step = np.abs(h).max(axis=axes, keepdims=True) / 127
    assert (operand.dtype, operand.shape, scale.shape) == (jnp.int8, h.shape, h.shape[:-num_axes])
    np.testing.assert_allclose(scale, step.squeeze(axes), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(operand), np.round(h / step), atol=1)
    assert np.mean(np.asarray(operand) != np.round(h / step)) < 0.01 and np.abs(np.asarray(operand)).max() == 127


def test_each_token_is_rounded_on_its_own_scale():
    h = draws(4, 32) * np.array([1e-6, 1.0, 300.0, 1e6], np.float32)[:, None]
    operand, scale = quantize(jnp.asarray(h), "float8_e4m3fn")
    numbers = np.asarray(operand.astype(jnp.float32)) * np.asarray(scale)[:, None]
    # Half a unit of three bits; below the smallest normal number, half a step of a fixed grid.
    assert np.all(np.abs(numbers - h) <= 2**-4 * np.abs(h) + 2**-10 * np.asarray(scale)[:, None])
    assert np.all(np.isfinite(numbers)) and np.abs(numbers - h).max() > 0


def test_float_operands_have_no_scale():
    h = draws(2, 8)
    operand, scale = quantize(jnp.asarray(h), "bfloat16")
    assert operand.dtype == jnp.bfloat16 and scale is None
