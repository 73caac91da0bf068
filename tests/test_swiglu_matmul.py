"""The matmul with SwiGLU on its sums: products and function on Hopper GPUs, elsewhere that it lowers for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.fast.hopper.swiglu_matmul import pays, swiglu_matmul
from tests.interpreted import ON_HOPPER

SHAPES = [(384, 384, 256), (4096, 1536, 4096)]  # rows, width, hidden width


@pytest.fixture(params=["bfloat16", "float8_e4m3fn"])
def dtype(request):
    return request.param


@pytest.mark.parametrize(("rows", "width", "hidden"), SHAPES)
def test_it_lowers(rows, width, hidden, dtype):
    shape = lambda *shape, dtype="float32": jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    scale = None if dtype == "bfloat16" else shape(rows)
    operands = shape(rows, width, dtype=dtype), scale, shape(2 * hidden, width, dtype=dtype), shape(2)
    assert "mosaic_gpu" in swiglu_matmul.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU's tensor cores")
@pytest.mark.parametrize(("rows", "width", "hidden"), SHAPES)
def test_it_is_matmul_and_swiglu(rows, width, hidden, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((rows, width)), dtype)
    weight = jnp.asarray(rng.integers(-1, 2, (2 * hidden, width)), dtype)
    scale = None if dtype == "bfloat16" else jnp.asarray(rng.uniform(0.5, 2, rows), jnp.float32)
    alphas = np.float32([0.7, -1.3]) / np.sqrt(width)
    made = np.asarray(swiglu_matmul(x, scale, weight, jnp.asarray(alphas)), np.float64)
    products = np.asarray(x, np.float32) @ np.asarray(weight, np.float32).T * (1 if scale is None else scale[:, None])
    a, b = np.split(np.asarray(products, np.float64), 2, axis=1)
    expected = a * alphas[0] / (1 + np.exp(-a * alphas[0])) * b * alphas[1]
    # Tensor cores keep about 14 bits of a sum of 8-bit products.
    error = np.linalg.norm(made - expected) / np.linalg.norm(expected)
    assert error < 2**-8 and np.abs(made - expected).max() < 2**-7 * np.abs(expected).max()


def test_where_it_pays():
    assert pays(16384, 3072, 8192) and pays(4096, 1536, 4096)
    assert not pays(512, 3072, 8192) and not pays(4096 + 64, 3072, 8192)
    assert not pays(4096, 3072 + 64, 8192) and not pays(4096, 3072, 8192 + 64)
