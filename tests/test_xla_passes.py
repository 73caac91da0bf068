"""Each pass between matmuls against the same arithmetic in NumPy's float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.fast import xla_passes
from terdit_jax.model.embedders import rope_table

B, T = 2, 5
OPERANDS = {"float32": 1e-6, "bfloat16": 2**-8, "float8_e4m3fn": 2**-4, "int8": None}


def draws(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rms_norm(x):
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-5)


def assert_operand(operand, scale, expected, dtype):
    """Within one rounding of the dtype; int8 within half a step of its grid."""
    numbers = np.asarray(operand.astype(jnp.float32), np.float64)
    assert operand.dtype == jnp.dtype(dtype)
    if OPERANDS[dtype] is None:
        np.testing.assert_allclose(numbers * scale[..., None], expected, atol=0.501 * float(scale.max()))
        assert np.abs(numbers).max(axis=-1).min() == 127
        return
    assert (scale is None) == (operand.dtype.itemsize > 1)
    if scale is not None:
        numbers = numbers * np.asarray(scale)[..., None]
        # Numbers below the smallest normal one of fp8 are rounded to a fixed grid.
        np.testing.assert_allclose(numbers, expected, rtol=OPERANDS[dtype], atol=2**-9 * float(scale.max()))
    else:
        np.testing.assert_allclose(numbers, expected, rtol=OPERANDS[dtype], atol=1e-5)


@pytest.mark.parametrize("dtype", OPERANDS)
def test_quantize(dtype):
    h = draws(B, T, 64) * np.array([1e-3, 1, 50, 1e4, 1])[:, None]
    operand, scale = xla_passes.quantize(jnp.asarray(h), dtype)
    if scale is not None:
        for token in range(T):  # each on its own scale
            assert_operand(operand[:, token], scale[:, token], h[:, token], dtype)
    else:
        assert_operand(operand, scale, h, dtype)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_tokens_of_zeros_stay_zeros(dtype):
    operand, scale = xla_passes.quantize(jnp.zeros((1, 2, 8)), dtype)
    assert np.all(np.asarray(operand.astype(jnp.float32)) == 0) and np.all(np.isfinite(scale)) and np.all(scale > 0)


@pytest.mark.parametrize("dtype", OPERANDS)
@pytest.mark.parametrize("scaled", [False, True])
def test_add_norm_modulate(dtype, scaled):
    x, y, vectors = draws(B, T, 64), draws(B, T, 64, seed=1), draws(4, 3, B, 64, seed=2)
    y_scale = np.abs(draws(B, T, seed=3)) if scaled else None
    gate, gain, shift = vectors[2].astype(np.float64)
    sums = x + gate[:, None] * y * (y_scale[..., None] if scaled else 1)
    new_x, operand, scale = xla_passes.add_norm_modulate(jnp.asarray(x), y, y_scale, jnp.asarray(vectors), 2, dtype)
    np.testing.assert_allclose(new_x, sums, rtol=1e-5, atol=1e-5)
    assert_operand(operand, scale, rms_norm(sums) * gain[:, None] + shift[:, None], dtype)


@pytest.mark.parametrize("dtype", OPERANDS)
@pytest.mark.parametrize("scaled", [False, True])
def test_add_layer_norm_modulate(dtype, scaled):
    x, y, vectors = draws(B, T, 64) + 3, draws(B, T, 64, seed=1), draws(4, 4, B, 64, seed=2)
    y_scale = np.abs(draws(B, T, seed=3)) if scaled else None
    gate, gain, shift, offset = vectors[2].astype(np.float64)[:, :, None]
    sums = x + gate * y * (y_scale[..., None] if scaled else 1) + offset
    arguments = jnp.asarray(x), y, y_scale, jnp.asarray(vectors), 2, dtype
    new_x, operand, scale = xla_passes.add_norm_modulate(*arguments, norm="layer")
    np.testing.assert_allclose(new_x, sums, rtol=1e-5, atol=1e-5)
    normed = (sums - sums.mean(axis=-1, keepdims=True)) / np.sqrt(sums.var(axis=-1, keepdims=True) + 1e-6)
    assert_operand(operand, scale, normed * gain + shift, dtype)


@pytest.fixture(params=["matrix", "channel"])
def alphas_of(request):
    """Scales of maps of a width: their own, or drawn for each of their outputs."""
    by_channel = request.param == "channel"
    return lambda width, *alphas: draws(len(alphas), width, seed=9) if by_channel else np.array(alphas, np.float32)


@pytest.mark.parametrize("dtype", OPERANDS)
@pytest.mark.parametrize("scaled", [False, True])
def test_gelu(dtype, scaled, alphas_of):
    y, bias, alphas = draws(B, T, 64), draws(64, seed=1), alphas_of(64, -1.3)
    y_scale = np.abs(draws(B, T, seed=3)) if scaled else None
    a = y.astype(np.float64) * (y_scale[..., None] if scaled else 1) * alphas[0] + bias
    operand, scale = xla_passes.gelu(jnp.asarray(y), y_scale, jnp.asarray(alphas), jnp.asarray(bias), dtype)
    expected = a / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
    assert_operand(operand, scale, expected, dtype)


@pytest.mark.parametrize("scaled", [False, True])
def test_split_heads(scaled, alphas_of):
    y, alphas, bias = draws(B, T, 96), alphas_of(32, 0.5, -2.0, 3.0), draws(96, seed=1)
    y_scale = np.abs(draws(B, T, seed=2)) if scaled else None
    made = xla_passes.split_heads(jnp.asarray(y), y_scale, jnp.asarray(alphas), jnp.asarray(bias), 4)
    expected = y * (y_scale[..., None] if scaled else 1) * np.repeat(alphas, 96 // alphas.size) + bias
    for a, e in zip(made, np.split(expected, 3, axis=-1), strict=True):
        np.testing.assert_allclose(a, e.reshape(B, T, 4, 8), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", OPERANDS)
@pytest.mark.parametrize("scaled", [False, True])
def test_swiglu(dtype, scaled, alphas_of):
    y, alphas = draws(B, T, 64), alphas_of(32, 0.7, -1.3)
    y_scale = np.abs(draws(B, T, seed=3)) if scaled else None
    a, b = np.split(y.astype(np.float64) * (y_scale[..., None] if scaled else 1), 2, axis=-1)
    a, b = a * alphas[0], b * alphas[1]
    operand, scale = xla_passes.swiglu(jnp.asarray(y), y_scale, jnp.asarray(alphas), dtype)
    assert_operand(operand, scale, a / (1 + np.exp(-a)) * b, dtype)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("by_channel", [False, True])
def test_queries_keys_values(kv_heads, normed, by_channel):
    """Heads reordered, and rotated as half before half, are the published ones whose even and odd features turn."""
    heads, head_dim = 4, 8
    width, kv_width = heads * head_dim, kv_heads * head_dim
    y, alphas = draws(B, T, width + 2 * kv_width), np.array([0.5, -2.0, 3.0], np.float32)
    if by_channel:
        alphas = [draws(n, seed=n + 2) for n in (width, kv_width, kv_width)]
    y_scale = np.abs(draws(B, T, seed=1)) + 0.1
    parts = np.split(y.astype(np.float64) * y_scale[..., None], (width, width + kv_width), axis=-1)
    q, k, v = (part * alpha for part, alpha in zip(parts, alphas, strict=True))
    norms = [{"scale": draws(n, seed=n), "bias": draws(n, seed=n + 1)} for n in (width, kv_width)]
    rope = rope_table(T, head_dim)

    def published(a, norm):
        if normed:
            a = a - a.mean(axis=-1, keepdims=True)
            a = a / np.sqrt(np.mean(np.square(a), axis=-1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]
        pairs = a.reshape(B, T, -1, head_dim // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * (rope[0] + 1j * rope[1])[:, None]
        return np.stack([turned.real, turned.imag], axis=-1).reshape(B, T, -1, head_dim)

    orders = [xla_passes.rotary_order(n, head_dim) for n in (heads, kv_heads)]
    columns = np.concatenate([orders[0], width + orders[1], width + kv_width + np.arange(kv_width)])
    ordered = tuple(
        {name: jnp.asarray(a[order]) for name, a in norm.items()} for norm, order in zip(norms, orders, strict=True)
    )
    if by_channel:
        alphas = tuple(alpha[order] for alpha, order in zip(alphas, (*orders, slice(None)), strict=True))
    made = xla_passes.queries_keys_values(
        jnp.asarray(y[..., columns]), y_scale, alphas, ordered if normed else None, jnp.asarray(rope), heads
    )
    for i, (a, n) in enumerate(((q, heads), (k, kv_heads))):
        expected = published(a, norms[i]).reshape(B, T, -1)[..., orders[i]].reshape(B, T, n, head_dim)
        np.testing.assert_allclose(made[i], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(made[2], v.reshape(B, T, kv_heads, head_dim), rtol=1e-5, atol=1e-6)
