"""The three forms of the linear map: golden values, gradients, and packed = trained."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.ternary.linear import FullLinear, PackedLinear, TernaryLinear
from terdit_jax.ternary.packing import pack
from terdit_jax.ternary.quantize import absmean_codes, ternarize

GOLDEN = np.load(Path(__file__).parent / "golden" / "ternary_linear.npz")


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_golden_ternary_linear_and_its_gradients():
    def forward(x, weight, alpha, bias):
        codes, alpha, sink = ternarize(weight[None], alpha)
        return TernaryLinear(codes, alpha, sink)(x)[:, 0] + bias

    np.testing.assert_array_equal(absmean_codes(GOLDEN["weight"]), np.round(GOLDEN["ternary"]))
    out, pullback = jax.vjp(forward, *(jnp.asarray(GOLDEN[k]) for k in ("x", "weight", "alpha", "bias")))
    close(out, GOLDEN["out"])
    for grad, name in zip(pullback(jnp.asarray(GOLDEN["cotangent"])), ("x", "weight", "alpha", "bias"), strict=True):
        assert np.abs(GOLDEN[f"grad_{name}"]).max() > 0
        close(grad, GOLDEN[f"grad_{name}"])


@pytest.fixture
def group():
    """Three maps of one input: codes (3, 8, 16), alpha (3,), x (2, 5, 16)."""
    keys = jax.random.split(jax.random.key(0), 3)
    codes = absmean_codes(jax.random.normal(keys[0], (3, 8, 16)))
    return codes, jax.random.normal(keys[1], (3,)), jax.random.normal(keys[2], (2, 5, 16))


def test_a_group_is_its_maps_one_by_one(group):
    codes, alpha, x = group
    y = TernaryLinear(codes, alpha, jnp.zeros(codes.shape))(x)
    assert y.shape == (2, 5, 3, 8)
    for i in range(3):
        close(y[..., i, :], alpha[i] * (x @ codes[i].T))


def test_gradients_of_a_group_match_autodiff_of_the_dense_map(group):
    codes, alpha, x = group
    cotangent = jax.random.normal(jax.random.key(1), (2, 5, 3, 8))

    def dense(x, weight):
        return jnp.einsum("bti,noi->btno", x, weight)

    def ours(x, sink):
        return TernaryLinear(codes, alpha, sink)(x)

    # Straight through, W takes alpha times the gradient of the weight in use.
    expected = jax.vjp(dense, x, alpha[:, None, None] * codes)[1](cotangent)
    expected = expected[0], alpha[:, None, None] * expected[1]
    actual = jax.vjp(ours, x, jnp.zeros(codes.shape))[1](cotangent)
    for a, e in zip(actual, expected, strict=True):
        assert np.abs(e).max() > 0
        close(a, e)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_packed_equals_trained_bit_for_bit(group, dtype):
    codes, alpha, x = group
    trained = TernaryLinear(codes, alpha, jnp.zeros(codes.shape))(x.astype(dtype))
    packed = PackedLinear(pack(codes), alpha)(x.astype(dtype))
    assert packed.dtype == dtype
    np.testing.assert_array_equal(trained, packed)


def test_full_precision_is_a_plain_matmul(group):
    codes, _, x = group
    weight = codes * 0.37
    close(FullLinear(weight)(x), jnp.einsum("bti,noi->btno", x, weight))


def test_weight_gradient_has_the_sinks_dtype(group):
    codes, alpha, x = group
    loss = lambda sink: TernaryLinear(codes, alpha, sink)(x.astype(jnp.bfloat16)).sum()  # noqa: E731
    assert jax.grad(loss)(jnp.zeros(codes.shape, jnp.bfloat16)).dtype == jnp.bfloat16
