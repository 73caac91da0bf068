"""Backward kernels are the gradients of the plain passes, for products with and without a scale a token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.fast import xla_passes
from terdit_jax.fast.eight_bit import quantize
from terdit_jax.fast.hopper import backward, biased, forward
from terdit_jax.model.embedders import rope_table
from tests.interpreted import interpreted_kernels

B, T, D, HEADS = 2, 8, 256, 4
BF16, EIGHT_BIT = jnp.bfloat16, "float8_e4m3fn"
ALPHAS = jnp.array([0.5, -2.0, 3.0])


@pytest.fixture(autouse=True, params=[1, 2], ids=["one row a block", "two"])
def kernels(monkeypatch, request):
    monkeypatch.setattr(forward, "ENOUGH_BLOCKS", B * T // request.param)
    with interpreted_kernels(monkeypatch):
        yield


def draws(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def scales(seed):
    return jnp.abs(draws(B, T, seed=seed)) + 0.1


def assert_near(actual, expected, tolerance=0.01):
    """Relative error in norm: sums of numbers that were rounded to bfloat16."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape and np.linalg.norm(e) > 0
        assert np.linalg.norm(a - e) < tolerance * np.linalg.norm(e)


def assert_product_gradient(made, expected, dtype):
    """(in bfloat16, in 8 bits, scale) of a gradient; the latter two round the former, token by token."""
    wide, rounded, scale = made
    assert_near(wide, expected)
    if dtype is None:
        assert rounded is None and scale is None
        return
    plain, plain_scale = quantize(wide, dtype)
    np.testing.assert_allclose(scale, plain_scale, rtol=1e-6)
    assert np.mean(rounded.astype(jnp.float32) != plain.astype(jnp.float32)) < 0.01


def times(values, scale):
    return values.astype(jnp.float32) * (1.0 if scale is None else scale[..., None])


def norm(x, gain, shift):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5) * gain[:, None] + shift[:, None]


def layer_norm(x, gain, shift):
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * gain[:, None] + shift[:, None]


by_output = pytest.mark.parametrize(
    "by_output", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["a scale a map", "a scale an output"]
)
both_dtypes = pytest.mark.parametrize("dtype", [None, EIGHT_BIT], ids=["bfloat16", "8 bits"])


@pytest.fixture
def case(dtype):
    """Products (B, T, 3 D), their scale, and the scale of a gradient."""
    y = draws(B, T, 3 * D, seed=9, dtype=BF16)
    return (y, None, None) if dtype is None else (y, scales(7), scales(8))


@both_dtypes
def test_add_norm_modulate(case, dtype):
    y, y_scale, d_scale = case
    y = y[..., :D]
    x, dx, dh = (draws(B, T, D, seed=seed, dtype=BF16) for seed in (1, 2, 3))
    gate, gain, shift = (draws(B, D, seed=seed) for seed in (4, 5, 6))

    def plain(x, y, gate, gain, shift):
        x = x + gate[:, None] * y
        return x, norm(x, gain, shift)

    (new_x, _), pullback = jax.vjp(plain, x.astype(jnp.float32), times(y, y_scale), gate, gain, shift)
    to_x, to_y, *to_vectors = pullback((dx.astype(jnp.float32), times(dh, d_scale)))
    made = backward.add_norm_modulate(new_x.astype(BF16), y, y_scale, gate, gain, dx, dh, d_scale, eight=dtype)
    assert_near(made[0], to_x)
    assert_product_gradient(made[1:4], to_y, dtype)
    assert_near([made[4][:, which] for which in (2, 1, 0)], to_vectors)


@both_dtypes
@pytest.mark.parametrize("width", [256, 384, 1152])
def test_layer_norm_and_offset(dtype, width):
    """Rows lie far from zero and differ in size."""
    y_scale, d_scale = (None, None) if dtype is None else (scales(7), scales(8))
    sizes = jnp.geomspace(0.1, 30, T)[:, None]
    x, y = ((sizes * (1 + draws(B, T, width, seed=seed))).astype(BF16) for seed in (1, 9))
    dx, dh = (draws(B, T, width, seed=seed, dtype=BF16) for seed in (2, 3))
    gate, gain, shift, offset = (draws(B, width, seed=seed) for seed in (4, 5, 6, 7))

    def plain(x, y, gate, gain, shift, offset):
        x = x + gate[:, None] * y + offset[:, None]
        return x, layer_norm(x, gain, shift)

    (new_x, _), pullback = jax.vjp(plain, x.astype(jnp.float32), times(y, y_scale), gate, gain, shift, offset)
    to_x, to_y, *to_vectors = pullback((dx.astype(jnp.float32), times(dh, d_scale)))
    arguments = new_x.astype(BF16), y, y_scale, gate, gain, dx, dh, d_scale
    made = backward.add_norm_modulate(*arguments, eight=dtype, norm="layer", offset=True)
    assert_near(made[0], to_x)
    assert_product_gradient(made[1:4], to_y, dtype)
    assert_near([made[4][:, which] for which in (2, 1, 0, 3)], to_vectors)


def test_layer_norm_alone():
    x = (3 + draws(B, T, 384, seed=1)).astype(BF16)
    dx, dh = (draws(B, T, 384, seed=seed, dtype=BF16) for seed in (2, 3))
    gain, shift = (draws(B, 384, seed=seed) for seed in (4, 5))
    _, pullback = jax.vjp(lambda x, *rest: (x, layer_norm(x, *rest)), x.astype(jnp.float32), gain, shift)
    to_x, *to_vectors = pullback((dx.astype(jnp.float32), dh.astype(jnp.float32)))
    made = backward.add_norm_modulate(x, None, None, None, gain, dx, dh, None, norm="layer")
    assert_near((made[0], made[4][:, 1], made[4][:, 0]), (to_x, *to_vectors))


def test_norm_modulate():
    x, dx, dh = (draws(B, T, D, seed=seed, dtype=BF16) for seed in (1, 2, 3))
    gain, shift = (draws(B, D, seed=seed) for seed in (4, 5))
    _, pullback = jax.vjp(lambda x, *rest: (x, norm(x, *rest)), x.astype(jnp.float32), gain, shift)
    to_x, *to_vectors = pullback((dx.astype(jnp.float32), dh.astype(jnp.float32)))
    made = backward.add_norm_modulate(x, None, None, None, gain, dx, dh, None)
    assert_near((made[0], made[4][:, 1], made[4][:, 0]), (to_x, *to_vectors))
    assert made[1:4] == (None, None, None)


@both_dtypes
def test_add_gated(case, dtype):
    y, y_scale, _ = case
    y, gate, dx = y[..., :D], draws(B, D, seed=4), draws(B, T, D, seed=2, dtype=BF16)
    _, pullback = jax.vjp(lambda y, gate: gate[:, None] * y, times(y, y_scale), gate)
    to_y, to_gate = pullback(dx.astype(jnp.float32))
    *made, sums = backward.add_gated(y, y_scale, gate, dx, eight=dtype)
    assert_product_gradient(made, to_y, dtype)
    assert_near(sums[:, 0], to_gate)


@both_dtypes
def test_add_gated_with_an_offset(case, dtype):
    y, y_scale, _ = case
    y, gate, dx = y[..., :384], draws(B, 384, seed=4), draws(B, T, 384, seed=2, dtype=BF16)
    plain = lambda y, gate, offset: gate[:, None] * y + offset[:, None]  # noqa: E731
    _, pullback = jax.vjp(plain, times(y, y_scale), gate, jnp.zeros_like(gate))
    to_y, *to_vectors = pullback(dx.astype(jnp.float32))
    *made, sums = backward.add_gated(y, y_scale, gate, dx, eight=dtype, offset=True)
    assert_product_gradient(made, to_y, dtype)
    assert_near([sums[:, 0], sums[:, 1]], to_vectors)


@both_dtypes
@pytest.mark.parametrize("width", [256, 384, 4608])
@by_output
def test_gelu(dtype, width, by_output):
    y_scale, d_scale = (None, None) if dtype is None else (scales(7), scales(8))
    y, dh = (draws(B, T, width, seed=seed, dtype=BF16) for seed in (9, 3))
    bias = draws(width, seed=4)
    alphas = draws(1, width, seed=5) if by_output else ALPHAS[1:2]
    plain = lambda y, bias: jax.nn.gelu(alphas[0] * y + bias, approximate=True)  # noqa: E731
    _, pullback = jax.vjp(plain, times(y, y_scale), bias)
    to_y, to_bias = pullback(times(dh, d_scale))
    *made, sums = biased.gelu(y, y_scale, alphas, bias, dh, d_scale, eight=dtype)
    assert_product_gradient(made, to_y, dtype)
    assert_near(jnp.sum(sums, axis=0), to_bias)


def test_gradient_of_gelu_far_from_zero():
    y = jnp.linspace(-60, 60, B * T * D).reshape(B, T, D).astype(BF16)
    exact = jax.vmap(jax.grad(lambda a: jax.nn.gelu(a, approximate=True)))(y.astype(jnp.float32).ravel())
    made = biased.gelu(y, None, jnp.ones(1), jnp.zeros(D), jnp.ones_like(y), None)[0]
    np.testing.assert_allclose(made.astype(jnp.float32).ravel(), exact, rtol=2**-7, atol=1e-5)


@both_dtypes
@pytest.mark.parametrize("width", [256, 384])
@by_output
def test_split_heads(dtype, width, by_output):
    alphas = draws(3, width, seed=5) if by_output else ALPHAS
    y_scale = None if dtype is None else scales(7)
    y, bias = draws(B, T, 3 * width, seed=9, dtype=BF16), draws(3 * width, seed=4)
    plain = lambda y, bias: xla_passes.split_heads(y, None, alphas, bias, HEADS)  # noqa: E731
    made, pullback = jax.vjp(plain, times(y, y_scale), bias)
    d = [draws(*a.shape, seed=seed, dtype=BF16) for seed, a in enumerate(made)]
    to_y, to_bias = pullback(tuple(a.astype(jnp.float32) for a in d))
    *ours, sums = biased.split_heads(*d, alphas, eight=dtype)
    assert_product_gradient(ours, to_y, dtype)
    assert_near(jnp.sum(sums, axis=0), to_bias)


@both_dtypes
@by_output
def test_swiglu(case, dtype, by_output):
    alphas = draws(2, D, seed=5) if by_output else ALPHAS[:2]
    y, y_scale, d_scale = case
    y, dh = y[..., : 2 * D], draws(B, T, D, seed=3, dtype=BF16)
    _, pullback = jax.vjp(lambda y: xla_passes.swiglu(y, None, alphas, "float32")[0], times(y, y_scale))
    made = backward.swiglu(y, y_scale, alphas, dh, d_scale, eight=dtype)
    assert_product_gradient(made, pullback(times(dh, d_scale))[0], dtype)


@both_dtypes
@by_output
def test_queries_keys_values(case, dtype, by_output):
    y, y_scale, _ = case
    rope = jnp.asarray(rope_table(T, D // HEADS))
    norms = tuple({"scale": 1 + draws(D, seed=seed), "bias": draws(D, seed=seed + 1)} for seed in (1, 3))
    order = xla_passes.rotary_order(HEADS, D // HEADS)
    columns, back = np.concatenate([order, D + order, np.arange(2 * D, 3 * D)]), np.argsort(order)

    alphas = draws(3, D, seed=6) if by_output else ALPHAS

    def plain(y, norms):
        ordered = (alphas[0][order], alphas[1][order], alphas[2]) if by_output else alphas
        named = jax.tree.map(lambda leaf: leaf[order], norms)
        q, k, v = xla_passes.queries_keys_values(y[..., columns], None, ordered, named, rope, HEADS)
        return *(a.reshape(B, T, D)[..., back].reshape(a.shape) for a in (q, k)), v

    made, pullback = jax.vjp(plain, times(y, y_scale), norms)
    d = [draws(*a.shape, seed=seed, dtype=BF16) for seed, a in enumerate(made)]
    to_y, to_norms = pullback(tuple(a.astype(jnp.float32) for a in d))
    *ours, sums = backward.queries_keys_values(y, y_scale, alphas, norms, rope, *d, heads=HEADS, eight=dtype)
    assert_product_gradient(ours, to_y, dtype)
    sums = jnp.sum(sums, axis=0)
    assert_near(sums, jnp.stack([to_norms[which][leaf] for which in range(2) for leaf in ("scale", "bias")]))
