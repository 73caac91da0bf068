"""The matmul with SwiGLU behind it: products and function on Hopper GPUs, elsewhere that it lowers for them."""

from interpreted import ON_HOPPER
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.kernels.swiglu_matmul import pays, swiglu_matmul

SHAPES = [(384, 192, 256), (4096, 1536, 4096)]  # rows, width, hidden width


@pytest.mark.parametrize(("rows", "width", "hidden"), SHAPES)
def test_it_lowers(rows, width, hidden):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((rows, width), (2 * hidden, width))]
    traced = swiglu_matmul.trace(*shapes, jax.ShapeDtypeStruct((2,), jnp.float32))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU's tensor cores")
@pytest.mark.parametrize(("rows", "width", "hidden"), SHAPES)
def test_it_is_matmul_and_swiglu(rows, width, hidden):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((rows, width)), jnp.bfloat16)
    weight = jnp.asarray(rng.integers(-1, 2, (2 * hidden, width)), jnp.bfloat16)
    alphas = np.float32([0.7, -1.3]) / np.sqrt(width)
    made = np.asarray(swiglu_matmul(x, weight, jnp.asarray(alphas)), np.float32)
    with jax.default_matmul_precision("highest"):
        a, b = jnp.split(x.astype(jnp.float32) @ weight.astype(jnp.float32).T, 2, axis=1)
    expected = np.asarray(jax.nn.silu(a * alphas[0]) * (b * alphas[1]))
    np.testing.assert_allclose(made, expected, rtol=2**-8, atol=1e-4)
    assert np.abs(expected).max() > 1


def test_where_it_pays():
    assert pays(16384, 3072, 8192) and pays(4096, 1536, 4096)
    assert not pays(512, 3072, 8192) and not pays(4096 + 64, 3072, 8192)
    assert not pays(4096, 3072 + 32, 8192) and not pays(4096, 3072, 8192 + 64)
