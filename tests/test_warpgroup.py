"""What cuts rows over threads lowers for GPUs at the models' widths; values are test_mosaic's and test_fused's."""

import jax
import jax.numpy as jnp
import pytest

from terdit_jax.fast.hopper import backward, forward, warpgroup

B, T = 64, 256


@pytest.mark.parametrize(("width", "heads"), [(3072, 32), (2048, 32), (1536, 32), (256, 4)])
def test_pairs_of_a_thread_lower(width, heads):
    head_dim = width // heads
    shape = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    y, norm = shape(B, T, 3 * width, dtype=jnp.bfloat16), {"scale": shape(width), "bias": shape(width)}
    rope, gradients = shape(2, T, head_dim // 2), [shape(B, T, heads, head_dim, dtype=jnp.bfloat16)] * 3
    for scale in (None, shape(B, T)):
        traced = forward.queries_keys_values.trace(y, scale, shape(3), (norm, norm), rope, heads=heads)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
        eight = None if scale is None else "float8_e4m3fn"
        arguments = y, scale, shape(3), (norm, norm), rope, *gradients
        traced = backward.queries_keys_values.trace(*arguments, heads=heads, eight=eight)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_widths_that_a_warpgroup_cannot_share():
    assert warpgroup.supports(1536, 4096) and not warpgroup.supports(1536, 4096 + 128)
