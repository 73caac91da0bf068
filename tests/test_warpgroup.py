"""Code that cuts rows over threads lowers for GPUs at the models' widths; test_mosaic and test_fused test values."""

import itertools

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
import pytest

from terdit_jax.aot.topology import open_devices, parse_topology
from terdit_jax.fast.hopper import backward, biased, forward, warpgroup

B, T = 64, 256


@pytest.mark.parametrize(("width", "heads"), [(3072, 32), (2048, 32), (1536, 32), (256, 4)])
def test_pairs_of_a_thread_lower(width, heads):
    head_dim = width // heads
    shape = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    y, norm = shape(B, T, 3 * width, dtype=jnp.bfloat16), {"scale": shape(width), "bias": shape(width)}
    rope, gradients = shape(2, T, head_dim // 2), [shape(B, T, heads, head_dim, dtype=jnp.bfloat16)] * 3
    for scale, alphas in itertools.product((None, shape(B, T)), (shape(3), shape(3, width))):
        traced = forward.queries_keys_values.trace(y, scale, alphas, (norm, norm), rope, heads=heads)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
        eight = None if scale is None else "float8_e4m3fn"
        arguments = y, scale, alphas, (norm, norm), rope, *gradients
        traced = backward.queries_keys_values.trace(*arguments, heads=heads, eight=eight)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def passes_with_scales_of_outputs(width, eight, sharding=None):
    """Every kernel that reads alphas, traced for a row of them."""

    def shape(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    scale, stored = None if eight is None else shape(B, T), forward.Stored(True, eight)
    y, h, hidden = (shape(B, T, n * width, dtype=jnp.bfloat16) for n in (8, 4, 3))
    norm, d, bias = (
        {"scale": shape(width), "bias": shape(width)},
        shape(B, T, 8, width // 8, dtype=jnp.bfloat16),
        shape(4 * width),
    )
    of_qkv = hidden, scale, shape(3, width), (norm, norm), shape(2, T, width // 16)
    of_pairs = [
        forward.queries_keys_values.trace(*of_qkv, heads=8),
        backward.queries_keys_values.trace(*of_qkv, d, d, d, heads=8, eight=eight),
        forward.swiglu.trace(y, scale, shape(2, 4 * width), stored),
        backward.swiglu.trace(y, scale, shape(2, 4 * width), h, scale, eight=eight),
    ]
    return [
        *(of_pairs if warpgroup.supports(width) else []),
        forward.gelu.trace(h, scale, shape(1, 4 * width), bias, stored),
        biased.gelu.trace(h, scale, shape(1, 4 * width), bias, h, scale, eight=eight),
        biased.split_heads.trace(d, d, d, shape(3, width), eight=eight),
    ]


def passes_of_dit(width, eight, sharding=None):
    """Every kernel of DiT's blocks, traced for rows of this width and four times it."""

    def shape(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    x, y = (shape(B, T, n, dtype=jnp.bfloat16) for n in (width, 4 * width))
    scale, vector, stored = None if eight is None else shape(B, T), shape(B, width), forward.Stored(True, eight)
    site, d, bias = shape(dtype=jnp.int32), shape(B, T, 8, width // 8, dtype=jnp.bfloat16), shape(4 * width)
    added = x, x, scale, vector, vector, x, x, scale
    return [
        forward.norm_modulate.trace(x, vector, vector, stored, norm="layer"),
        forward.add_norm_modulate.trace(x, x, scale, shape(1, 4, B, width), site, stored, norm="layer"),
        forward.gelu.trace(y, scale, shape(1), bias, stored),
        forward.quantize.trace(x, eight or "bfloat16"),
        backward.add_norm_modulate.trace(*added, eight=eight, norm="layer", offset=True),
        backward.add_norm_modulate.trace(x, None, None, None, vector, x, x, scale, norm="layer"),
        backward.add_gated.trace(x, scale, vector, x, eight=eight, offset=True),
        biased.gelu.trace(y, scale, shape(1), bias, y, scale, eight=eight),
        biased.split_heads.trace(d, d, d, shape(3), eight=eight),
    ]


dit_widths = pytest.mark.parametrize("width", [1152, 1024, 768, 384])
both_dtypes = pytest.mark.parametrize("eight", [None, "float8_e4m3fn"])


@dit_widths
@both_dtypes
def test_passes_of_dit_lower(width, eight):
    for traced in passes_of_dit(width, eight):
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.slow
@dit_widths
@both_dtypes
@pytest.mark.parametrize("passes", [passes_of_dit, passes_with_scales_of_outputs])
def test_passes_compile_for_an_h200(width, eight, passes):
    """To machine code, without one: what lowering leaves to the compiler may fail too."""
    pytest.importorskip("jax_cuda13_plugin", reason="no compiler for GPUs is installed: pip install 'terdit-jax[aot]'")
    device = open_devices(parse_topology("h200:1"))[0]
    for traced in passes(width, eight, SingleDeviceSharding(device)):
        assert traced.lower().compile() is not None


def test_widths_that_a_warpgroup_cannot_share():
    assert warpgroup.supports(1536, 4096) and not warpgroup.supports(1536, 4096 + 128)
    assert warpgroup.supports(1152, 4608, pairs=False) and not warpgroup.supports(1152 + 64, pairs=False)


def test_pieces_of_a_row_as_wide_as_the_hardware_loads():
    assert [forward.wide_parts(width) for width in (4608, 4096, 3072, 1536, 384)] == [3, 4, 3, 3, 3]


def test_rows_of_an_odd_number_of_features_a_thread_are_read_in_wide_stretches():
    assert warpgroup.stretches(1152) == [(0, 1024), (1024, 128)]
    assert warpgroup.stretches(384) == [(0, 256), (256, 128)]
    assert warpgroup.stretches(3456) == [(0, 3072), (3072, 256), (3328, 128)]
    assert warpgroup.stretches(1536) == [(0, 1536)]
