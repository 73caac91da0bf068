"""Fused passes, and blocks made of them, have the values and gradients of the plain ones in float32."""

import dataclasses

from golden_models import random_params, tiny_config
from interpreted import interpreted_kernels
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.inference import rowwise
from terdit_jax.kernels import mosaic
from terdit_jax.model import block, fused
from terdit_jax.model.embedders import rope_table
from terdit_jax.model.transformer import forward, make_operands
from terdit_jax.parallel.mesh import make_mesh
from terdit_jax.ternary import activations

B, T, D, HEADS = 2, 8, 256, 4
BF16 = jnp.bfloat16


@pytest.fixture(autouse=True, params=[1, 2], ids=["one row a block", "two"])
def kernels(monkeypatch, request):
    monkeypatch.setattr(mosaic, "ENOUGH_BLOCKS", B * T // request.param)
    with interpreted_kernels(monkeypatch):
        yield


def draws(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def draw_norms():
    return tuple({"scale": 1 + draws(D, seed=seed), "bias": draws(D, seed=seed + 1)} for seed in (1, 3))


def assert_near(actual, expected, tolerance=0.01):
    """Relative error in norm: sums of numbers that were rounded to bfloat16."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape and np.linalg.norm(e) > 0
        assert np.linalg.norm(a - e) < tolerance * np.linalg.norm(e)


def assert_same_function(ours, plain, *arguments):
    """Values and gradients of `ours` on bfloat16 activations are those of `plain` on the same numbers in float32."""
    made, pullback = jax.vjp(ours, *arguments)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), arguments)
    expected, plain_pullback = jax.vjp(plain, *wide)
    assert_near(made, expected)
    cotangents = jax.tree.map(lambda leaf: draws(*leaf.shape, seed=leaf.size, dtype=leaf.dtype), made)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), cotangents)
    assert_near(pullback(cotangents), plain_pullback(wide))


def norm(x, gain, shift):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5) * gain[:, None] + shift[:, None]


def test_norm_modulate():
    arguments = draws(B, T, D, seed=1, dtype=BF16), draws(B, D, seed=2), draws(B, D, seed=3)
    assert_same_function(fused.norm_modulate, lambda x, *rest: (x, norm(x, *rest)), *arguments)


def test_add_norm_modulate():
    def plain(x, y, gate, gain, shift):
        x = x + gate[:, None] * y
        return x, norm(x, gain, shift)

    activations = (draws(B, T, D, seed=seed, dtype=BF16) for seed in (1, 2))
    vectors = (draws(B, D, seed=seed) for seed in (3, 4, 5))
    ours = lambda x, y, *vectors: fused.add_norm_modulate(x, y, None, *vectors)  # noqa: E731
    assert_same_function(ours, plain, *activations, *vectors)


def test_swiglu():
    alphas, y = jnp.array([0.7, -1.3]), draws(B, T, 2 * D, dtype=BF16)
    plain = lambda y: rowwise.swiglu(y, None, alphas, "float32")[0]  # noqa: E731
    assert_same_function(lambda y: fused.swiglu(y, None, alphas), plain, y)


def test_queries_keys_values():
    alphas, rope = jnp.array([0.5, -2.0, 3.0]), jnp.asarray(rope_table(T, D // HEADS))
    norms = draw_norms()

    def plain(y, norms):
        order = rowwise.rotary_order(HEADS, D // HEADS)
        columns = np.concatenate([order, D + order, np.arange(2 * D, 3 * D)])
        named = jax.tree.map(lambda leaf: leaf[order], norms)
        q, k, v = rowwise.queries_keys_values(y[..., columns], None, alphas, named, rope, HEADS)
        back = np.argsort(order)
        return *(a.reshape(B, T, D)[..., back].reshape(a.shape) for a in (q, k)), v

    ours = lambda y, norms: fused.queries_keys_values(y, None, alphas, norms, rope, HEADS)  # noqa: E731
    assert_same_function(ours, plain, draws(B, T, 3 * D, dtype=BF16), norms)


def test_products_in_8_bits_stand_for_what_scales_make_of_them():
    """Values and gradients are those of the scaled products, which the gradient of the products then is."""
    scale, y = jnp.abs(draws(B, T, seed=7)) + 0.1, draws(B, T, 3 * D, dtype=BF16)
    alphas, rope = jnp.array([0.5, -2.0, 3.0]), jnp.asarray(rope_table(T, D // HEADS))
    norms = draw_norms()
    x, vectors = draws(B, T, D, seed=1, dtype=BF16), [draws(B, D, seed=seed) for seed in (3, 4, 5)]
    for run in (
        lambda y, scale: fused.add_norm_modulate(x, y[..., :D], scale, *vectors),
        lambda y, scale: fused.swiglu(y[..., : 2 * D], scale, alphas[:2]),
        lambda y, scale: fused.queries_keys_values(y, scale, alphas, norms, rope, HEADS),
    ):
        made, pullback = jax.vjp(lambda y: run(y, scale), y)  # noqa: B023 - used at once
        scaled = (y.astype(jnp.float32) * scale[..., None]).astype(BF16)
        expected, plain_pullback = jax.vjp(lambda y: run(y, None), scaled)  # noqa: B023
        assert_near(made, expected)
        cotangents = jax.tree.map(lambda leaf: draws(*leaf.shape, seed=leaf.size, dtype=leaf.dtype), made)
        assert_near(pullback(cotangents), plain_pullback(cotangents), 0.02)


@pytest.mark.parametrize("num_axes", [1, 2])
def test_quantize(num_axes):
    h = draws(B, T, 2, D, dtype=BF16)
    h = h if num_axes == 2 else h[:, :, 0]
    made, expected = (q(h, "float8_e4m3fn", num_axes) for q in (fused.quantize, activations.quantize))
    assert made[0].dtype == expected[0].dtype
    np.testing.assert_allclose(made[1], expected[1], rtol=1e-6)
    assert np.mean(made[0].astype(jnp.float32) != expected[0].astype(jnp.float32)) < 0.01


@pytest.mark.parametrize("kernels", [2], indirect=True)
@pytest.mark.parametrize("ternary", [True, False])
def test_a_network_of_fused_blocks_has_the_plain_ones_gradients(monkeypatch, ternary):
    """In bfloat16, no further from float32 than plain blocks are."""
    config = tiny_config(hidden_size=D, depth=2, num_heads=HEADS, input_size=4, ternary=ternary, attention="xla")
    params = random_params(config)
    x_t, t, y = draws(B, 4, 4, 4, seed=5), jnp.array([20, 700]), jnp.array([1, 10])
    target = draws(B, 4, 4, 8, seed=6)

    def gradients(dtype, is_fused):
        monkeypatch.setattr(block, "has_fused_passes", lambda config: is_fused)
        made = dataclasses.replace(config, dtype=dtype, grad_dtype=dtype)
        run = lambda p: jnp.mean((forward(made, make_operands(made, p), x_t, t, y) - target) ** 2)  # noqa: E731
        return jax.jit(jax.grad(run))(params)

    exact = gradients("float32", False)

    def error(tree):
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(exact), strict=True)
        return np.array([np.linalg.norm(a - e) / np.linalg.norm(e) for a, e in pairs if e.size > 8])

    plain, ours = error(gradients("bfloat16", False)), error(gradients("bfloat16", True))
    assert ours.max() < 0.2 and ours.mean() < 1.2 * plain.mean()


def test_each_device_of_a_mesh_runs_its_own_pictures():
    """Values and gradients, those of vectors that all pictures share among them, are one device's."""
    x, gain, shift = draws(4, T, D, seed=1, dtype=BF16), draws(4, D, seed=2), draws(4, D, seed=3)
    y, alphas, rope = (
        draws(4, T, 3 * D, dtype=BF16),
        jnp.array([0.5, -2.0, 3.0]),
        jnp.asarray(rope_table(T, D // HEADS)),
    )
    norms = draw_norms()

    def run(x, gain, shift, y, norms):
        made = fused.norm_modulate(x, gain, shift), fused.queries_keys_values(y, None, alphas, norms, rope, HEADS)
        return sum(jnp.sum(jnp.sin(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(made))

    gradients = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2, 3, 4)))
    expected = gradients(x, gain, shift, y, norms)
    mesh = make_mesh({"data": 2, "fsdp": 1, "tensor": 1, "slices": 1}, jax.devices()[:2])
    with jax.set_mesh(mesh):
        actual = gradients(x, gain, shift, y, norms)
    assert_near(actual, expected, 1e-3)
