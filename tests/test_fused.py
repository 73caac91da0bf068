"""Fused passes, and blocks made of them, have the values and gradients of the plain ones in float32."""

import dataclasses

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
from terdit_jax.ternary.activations import Rows, quantize
from tests.golden_models import random_params, tiny_config
from tests.interpreted import interpreted_kernels

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


def unwrapped(run):
    """The function with the values of rows in place of these."""
    is_rows = lambda leaf: isinstance(leaf, Rows)  # noqa: E731
    take = lambda leaf: leaf.values if is_rows(leaf) else leaf  # noqa: E731
    return lambda *arguments: jax.tree.map(take, run(*arguments), is_leaf=is_rows)


def norm(x, gain, shift):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5) * gain[:, None] + shift[:, None]


def test_norm_modulate():
    arguments = draws(B, T, D, seed=1, dtype=BF16), draws(B, D, seed=2), draws(B, D, seed=3)
    assert_same_function(unwrapped(fused.norm_modulate), lambda x, *rest: (x, norm(x, *rest)), *arguments)


def test_add_norm_modulate():
    def plain(x, y, gate, gain, shift):
        x = x + gate[:, None] * y
        return x, norm(x, gain, shift)

    activations = (draws(B, T, D, seed=seed, dtype=BF16) for seed in (1, 2))
    vectors = (draws(B, D, seed=seed) for seed in (3, 4, 5))
    ours = lambda x, y, *vectors: fused.add_norm_modulate(x, Rows(y[:, :, None]), *vectors)  # noqa: E731
    assert_same_function(unwrapped(ours), plain, *activations, *vectors)


def test_add_gated():
    activations = (draws(B, T, D, seed=seed, dtype=BF16) for seed in (1, 2))
    ours = lambda x, y, gate: fused.add_gated(x, Rows(y[:, :, None]), gate)  # noqa: E731
    assert_same_function(ours, lambda x, y, gate: x + gate[:, None] * y, *activations, draws(B, D, seed=3))


def test_swiglu():
    alphas, y = jnp.array([0.7, -1.3]), draws(B, T, 2, D, dtype=BF16)
    plain = lambda y: rowwise.swiglu(y.reshape(B, T, -1), None, alphas, "float32")[0]  # noqa: E731
    assert_same_function(unwrapped(lambda y: fused.swiglu(Rows(y), alphas)), plain, y)


def test_queries_keys_values():
    alphas, rope = jnp.array([0.5, -2.0, 3.0]), jnp.asarray(rope_table(T, D // HEADS))
    norms = draw_norms()

    def plain(y, norms):
        y = y.reshape(B, T, -1)
        order = rowwise.rotary_order(HEADS, D // HEADS)
        columns = np.concatenate([order, D + order, np.arange(2 * D, 3 * D)])
        named = jax.tree.map(lambda leaf: leaf[order], norms)
        q, k, v = rowwise.queries_keys_values(y[..., columns], None, alphas, named, rope, HEADS)
        back = np.argsort(order)
        return *(a.reshape(B, T, D)[..., back].reshape(a.shape) for a in (q, k)), v

    ours = lambda y, norms: fused.queries_keys_values(Rows(y), alphas, norms, rope, HEADS)  # noqa: E731
    assert_same_function(ours, plain, draws(B, T, 3, D, dtype=BF16), norms)


def assert_in_8_bits(rows, num_axes=1):
    """The rows have beside them what their values are in 8 bits."""
    eight, scale = quantize(rows.values, fused.EIGHT, num_axes)
    assert rows.eight.dtype == eight.dtype
    np.testing.assert_allclose(rows.scale, scale, rtol=1e-6)
    assert np.mean(rows.eight.astype(jnp.float32) != eight.astype(jnp.float32)) < 0.01


@pytest.mark.parametrize("kernels", [2], indirect=True)
def test_products_in_8_bits_stand_for_what_scales_make_of_them():
    """Values and gradients are those of the scaled products, and the gradients come in 8 bits besides. What is passed
    back to an operand may have a scale: it stands for what that makes of it."""
    scale, y = jnp.abs(draws(B, T, seed=7)) + 0.1, draws(B, T, 3, D, dtype=BF16)
    alphas, rope = jnp.array([0.5, -2.0, 3.0]), jnp.asarray(rope_table(T, D // HEADS))
    norms = draw_norms()
    x, vectors = draws(B, T, D, seed=1, dtype=BF16), [draws(B, D, seed=seed) for seed in (3, 4, 5)]
    for maps, run in (
        (1, lambda y: fused.add_norm_modulate(x, y, *vectors)),
        (1, lambda y: fused.add_gated(x, y, vectors[0])),
        (2, lambda y: fused.swiglu(y, alphas[:2])),
        (3, lambda y: fused.queries_keys_values(y, alphas, norms, rope, HEADS)),
    ):
        product = Rows(y[:, :, :maps], jnp.zeros((B, T, maps, D), fused.EIGHT), scale)
        made, pullback = jax.vjp(run, product)
        scaled = (product.values.astype(jnp.float32) * scale[..., None, None]).astype(BF16)
        expected, plain_pullback = jax.vjp(unwrapped(lambda y: run(Rows(y))), scaled)  # noqa: B023 - used at once
        assert_near(unwrapped(lambda: made)(), expected)  # noqa: B023
        for leaf in jax.tree.leaves((made, run(product)), is_leaf=lambda leaf: isinstance(leaf, Rows)):
            if isinstance(leaf, Rows):
                assert_in_8_bits(leaf)
        plain = jax.tree.map(lambda leaf: draws(*leaf.shape, seed=leaf.size, dtype=leaf.dtype), expected)
        (gradient,) = pullback(_unscaled(plain, made, scale))
        assert_near(gradient.values, plain_pullback(plain)[0], 0.02)
        assert_in_8_bits(gradient, num_axes=2)


def _unscaled(cotangents, made, scale):
    """The same, those of operands by way of a scale."""

    def apart(leaf, d):
        if not isinstance(leaf, Rows):
            return d
        return Rows((d.astype(jnp.float32) / scale[..., None]).astype(BF16), jnp.zeros_like(leaf.eight), scale)

    return jax.tree.map(apart, made, cotangents, is_leaf=lambda leaf: isinstance(leaf, Rows))


def test_rows_of_attention_are_rounded_by_a_pass_of_their_own():
    h, scale = draws(B, T, D, dtype=BF16), jnp.abs(draws(B, T, seed=7)) + 0.1
    made, pullback = jax.vjp(lambda h: fused.as_rows(h, fused.EIGHT), h)
    np.testing.assert_array_equal(made.values, h)
    assert_in_8_bits(made)
    (gradient,) = pullback(Rows(h, jnp.zeros_like(made.eight), scale))
    np.testing.assert_array_equal(gradient, (h.astype(jnp.float32) * scale[..., None]).astype(BF16))


IN_8_BITS = {"dtype": "bfloat16", "grad_dtype": "bfloat16", "matmul_dtype": fused.EIGHT}


@pytest.fixture
def gradients(monkeypatch):
    """Of a network whose blocks are fused in bfloat16, by fields of its configuration."""
    config = tiny_config(hidden_size=D, depth=2, num_heads=HEADS, input_size=4, attention="xla", layers="unrolled")
    params = random_params(config)
    x_t, t, y = draws(B, 4, 4, 4, seed=5), jnp.array([20, 700]), jnp.array([1, 10])
    target = draws(B, 4, 4, 8, seed=6)
    monkeypatch.setattr(block, "has_fused_passes", lambda config: config.dtype == "bfloat16")

    def run(**fields):
        made = dataclasses.replace(config, **fields)
        loss = lambda p: jnp.mean((forward(made, make_operands(made, p), x_t, t, y) - target) ** 2)  # noqa: E731
        # Of alphas' gradients, those of queries and keys are zero but for rounding: norms undo what they do.
        return [leaf for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)) if leaf.size > 8]

    return run


@pytest.fixture
def errors(monkeypatch, gradients):
    """Each leaf's relative distance from the float32 gradient, by fields of the configuration; and that of plain
    blocks, which round to 8 bits at their matmuls alone."""
    eight = fused.EIGHT
    monkeypatch.setattr(fused, "EIGHT", None)
    exact = gradients()

    def distances(**fields):
        pairs = zip(gradients(**IN_8_BITS, **fields), exact, strict=True)
        return np.array([np.linalg.norm(a - e) / np.linalg.norm(e) for a, e in pairs])

    plain = distances()
    monkeypatch.setattr(fused, "EIGHT", eight)
    return distances, plain


def assert_rounded_alike(errors, plain):
    """No leaf is further from float32 than rounding takes it in plain blocks, give or take what one draw of rounding
    errors differs from another. Where rounding hides nothing, a wrong factor of 1.2 in one pass shows."""
    assert 0.01 < errors.mean() < 1.1 * plain.mean()
    assert (errors < 1.3 * plain + 0.01).all(), np.round(errors / plain, 2)


@pytest.mark.parametrize("kernels", [2], indirect=True)
def test_gradients_in_8_bits_are_those_of_a_network_that_rounds_at_its_matmuls(errors):
    distances, plain = errors
    assert_rounded_alike(distances(), plain)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [2], indirect=True)
@pytest.mark.parametrize(
    "fields", [{"remat": "dots", "layers": "scanned"}, {"remat": "block"}], ids=["scanned", "rematerialised"]
)
def test_gradients_in_8_bits_round_alike_scanned_and_rematerialised(errors, fields):
    """On a GPU they are not equal: programs that differ in the last bit of a bfloat16 before a rounding to 8 bits
    differ by a step of 8 bits after it, and two draws of such errors are further apart than each is from float32."""
    distances, plain = errors
    assert_rounded_alike(distances(**fields), plain)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [2], indirect=True)
def test_gradients_in_8_bits_round_alike_on_a_mesh(errors):
    distances, plain = errors
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 1, "tensor": 1, "slices": 1}, jax.devices()[:2])):
        assert_rounded_alike(distances(remat="dots", layers="scanned"), plain)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [2], indirect=True)
@pytest.mark.parametrize("wrong", ["swiglu", "add_gated", "norm_modulate"])
def test_a_pass_that_is_a_fifth_too_large_does_not_pass_for_rounding(monkeypatch, errors, wrong):
    distances, plain = errors
    run = getattr(fused, wrong)

    @jax.custom_vjp
    def amplify(tree):
        return tree

    def backward(_, cotangents):
        enlarge = lambda d: d * 1.2 if d.dtype == jnp.bfloat16 else d  # noqa: E731
        return (jax.tree.map(enlarge, cotangents),)

    amplify.defvjp(lambda tree: (tree, None), backward)
    monkeypatch.setattr(fused, wrong, lambda first, *rest, **options: run(amplify(first), *rest, **options))
    with pytest.raises(AssertionError):
        assert_rounded_alike(distances(), plain)


@pytest.mark.parametrize("kernels", [2], indirect=True)
@pytest.mark.parametrize("ternary", [True, pytest.param(False, marks=pytest.mark.slow)])
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
        draws(4, T, 3, D, dtype=BF16),
        jnp.array([0.5, -2.0, 3.0]),
        jnp.asarray(rope_table(T, D // HEADS)),
    )
    norms = draw_norms()

    def run(x, gain, shift, y, norms):
        made = fused.norm_modulate(x, gain, shift), fused.queries_keys_values(Rows(y), alphas, norms, rope, HEADS)
        return sum(jnp.sum(jnp.sin(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(made))

    gradients = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2, 3, 4)))
    expected = gradients(x, gain, shift, y, norms)
    mesh = make_mesh({"data": 2, "fsdp": 1, "tensor": 1, "slices": 1}, jax.devices()[:2])
    with jax.set_mesh(mesh):
        actual = gradients(x, gain, shift, y, norms)
    assert_near(actual, expected, 1e-3)
