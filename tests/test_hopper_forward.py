"""The kernels equal the passes they stand for, interpreted on CPUs and as they are on Hopper GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.fast import xla_passes
from terdit_jax.fast.hopper import forward
from terdit_jax.model.embedders import rope_table
from tests.interpreted import interpreted_kernels

B, T, D, HEADS = 2, 4, 256, 4
OPERANDS = ("bfloat16", "float8_e4m3fn")


by_output = pytest.mark.parametrize(
    "by_output", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["a scale a map", "a scale an output"]
)
widths = pytest.mark.parametrize("width", [256, 384, 1152])


@pytest.fixture(params=OPERANDS)
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(forward, "ENOUGH_BLOCKS", 4)  # so that blocks of these few rows have two each
    with interpreted_kernels(monkeypatch):
        yield


def draws(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def assert_equal_but_for_rounding(actual, expected):
    """Sums in another order may round a number to a neighbour; here and there, not everywhere."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    a, b = (np.asarray(array.astype(jnp.float32)) for array in (actual, expected))
    step = 2 * float(jnp.finfo(expected.dtype).eps) if expected.dtype != jnp.float32 else 1e-5
    np.testing.assert_allclose(a, b, rtol=step, atol=step * 1e-2 * np.abs(b).max())
    assert expected.dtype == jnp.float32 or np.mean(a != b) < 0.02
    assert np.abs(b).max() > 0


def assert_same_pass(name, *arguments, **options):
    made, expected = (getattr(module, name)(*arguments, **options) for module in (forward, xla_passes))
    made, expected = (jax.tree.leaves(leaves) for leaves in (made, expected))
    assert len(made) == len(expected)
    for pair in zip(made, expected, strict=True):
        assert_equal_but_for_rounding(*pair)


def test_add_norm_modulate(dtype):
    y_scale = None if dtype == "bfloat16" else jnp.abs(draws(B, T, seed=1))
    x, y = (draws(B, T, D, seed=seed, dtype=jnp.bfloat16) for seed in (2, 3))
    assert_same_pass("add_norm_modulate", x, y, y_scale, draws(2, 3, B, D, seed=4), jnp.int32(1), dtype)


@widths
def test_layer_norm_and_offset(dtype, width):
    """Rows lie far from zero and differ in size."""
    y_scale = None if dtype == "bfloat16" else jnp.abs(draws(B, T, seed=1))
    sizes = jnp.array([1e-2, 30, 1, 1e3])[:, None]
    x, y = ((sizes * (3 + draws(B, T, width, seed=seed))).astype(jnp.bfloat16) for seed in (2, 3))
    arguments = x, y, y_scale, draws(2, 4, B, width, seed=4), jnp.int32(1), dtype
    assert_same_pass("add_norm_modulate", *arguments, norm="layer")


@widths
def test_layer_norm_alone(width):
    x = (5 + draws(B, T, width, seed=2)).astype(jnp.bfloat16)
    gain, shift = draws(B, width, seed=3), draws(B, width, seed=4)
    expected = xla_passes.norm_modulate(x, gain, shift, norm="layer").astype(jnp.bfloat16)
    made = forward.norm_modulate(x, gain, shift, forward.Stored(True, None), norm="layer")
    assert_equal_but_for_rounding(made[0], expected)


def test_norm_modulate():
    x, gain, shift = draws(B, T, D, seed=2, dtype=jnp.bfloat16), draws(B, D, seed=3), draws(B, D, seed=4)
    vectors = jnp.stack([jnp.zeros((B, D)), gain, shift])[None]
    expected = xla_passes.add_norm_modulate(x, jnp.zeros_like(x), None, vectors, jnp.int32(0), "bfloat16")[1]
    assert_equal_but_for_rounding(forward.norm_modulate(x, gain, shift, forward.Stored(True, None))[0], expected)


@by_output
def test_swiglu(dtype, by_output):
    y_scale = None if dtype == "bfloat16" else jnp.abs(draws(B, T, seed=1))
    y = draws(B, T, 2 * D, dtype=jnp.bfloat16)
    assert_same_pass("swiglu", y, y_scale, draws(2, D, seed=2) if by_output else jnp.array([0.7, -1.3]), dtype)


@pytest.mark.parametrize("width", [D, 384, 4608])
@by_output
def test_gelu(dtype, width, by_output):
    y_scale = None if dtype == "bfloat16" else jnp.abs(draws(B, T, seed=1))
    y, bias = draws(B, T, width, dtype=jnp.bfloat16), draws(width, seed=2)
    assert_same_pass("gelu", y, y_scale, draws(1, width, seed=3) if by_output else jnp.array([-0.7]), bias, dtype)


def test_gelu_keeps_what_is_small():
    """Where GELU is a small difference of large numbers by its formula, and where exp overflows."""
    a = jnp.linspace(-20, 20, 256 * B * T).reshape(B, T, 256).astype(jnp.bfloat16)
    exact = np.asarray(a, np.float64)
    exact = exact / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (exact + 0.044715 * exact**3)))
    made = np.asarray(forward.gelu(a, None, jnp.ones(1), jnp.zeros(256), "bfloat16")[0], np.float64)
    np.testing.assert_allclose(made, exact, rtol=2**-8, atol=1e-30)


def test_training_rounds_to_8_bits_what_it_has_rounded_to_bfloat16():
    """Whichever of the two is stored; and what is stored in bfloat16 alone is the same."""
    x, y = (draws(B, T, n * D, seed=n, dtype=jnp.bfloat16) for n in (1, 2))
    y_scale, vectors, eight = jnp.abs(draws(B, T, seed=3)), draws(1, 3, B, D, seed=4), OPERANDS[1]
    for run in (
        lambda kinds: forward.norm_modulate(x, *vectors[0, 1:], kinds),
        lambda kinds: forward.add_norm_modulate(x, y[..., :D], y_scale, vectors, jnp.int32(0), kinds)[1:],
        lambda kinds: forward.swiglu(y, y_scale, jnp.array([0.7, -1.3]), kinds),
        lambda kinds: forward.gelu(y, y_scale, jnp.array([0.7]), draws(2 * D, seed=5), kinds),
    ):
        both, wide, narrow = (run(forward.Stored(*kinds)) for kinds in ((True, eight), (True, None), (False, eight)))
        assert wide[1:] == (None, None) and narrow[0] is None
        np.testing.assert_array_equal(both[0], wide[0])
        for made in (both, narrow):
            for actual, expected in zip(made[1:], xla_passes.quantize(both[0], eight), strict=True):
                assert_equal_but_for_rounding(actual, expected)


def test_quantize(dtype):
    assert_same_pass("quantize", draws(B, T, D, dtype=jnp.bfloat16), dtype)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("kv_heads", [HEADS, HEADS // 2])
@by_output
def test_queries_keys_values(kv_heads, normed, by_output):
    head_dim = 2 * D // HEADS
    width, kv_width = HEADS * head_dim, kv_heads * head_dim
    norms = tuple({"scale": draws(n, seed=n), "bias": draws(n, seed=n + 1)} for n in (width, kv_width))
    y = draws(B, T, width + 2 * kv_width, dtype=jnp.bfloat16)
    alphas, rope = jnp.array([0.5, -2.0, 3.0]), jnp.asarray(rope_table(T, head_dim))
    if by_output:
        alphas = tuple(draws(n, seed=n + 2) for n in (width, kv_width, kv_width))
    scale = jnp.abs(draws(B, T, seed=1)) + 0.1
    arguments = (scale, alphas, norms if normed else None, rope, HEADS)
    made = forward.queries_keys_values(y, *arguments)
    # `xla_passes` has the features of a head in another order.
    orders = [xla_passes.rotary_order(count, head_dim) for count in (HEADS, kv_heads)]
    columns = np.concatenate([orders[0], width + orders[1], np.arange(width + kv_width, y.shape[-1])])
    ordered = tuple(
        {name: leaf[order] for name, leaf in norm.items()} for norm, order in zip(norms, orders, strict=True)
    )
    if by_output:
        alphas = tuple(alpha[order] for alpha, order in zip(alphas, (*orders, slice(None)), strict=True))
    arguments = (scale, alphas, ordered if normed else None, rope, HEADS)
    made = [
        *(a.reshape(B, T, -1)[..., order].reshape(a.shape) for a, order in zip(made, orders, strict=False)),
        made[2],
    ]
    # In float32, `xla_passes` does not round between norm and rotation, as kernels never do.
    y = y[..., columns].astype(jnp.float32)
    for actual, expected in zip(made, xla_passes.queries_keys_values(y, *arguments), strict=True):
        assert_equal_but_for_rounding(actual, expected.astype(jnp.bfloat16))
