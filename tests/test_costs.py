"""FLOPs and memory traffic read from compiled programs, loops counted as often as they run."""

import jax
from jax import lax
import jax.numpy as jnp
import pytest

from terdit_jax.aot.costs import read_costs


def costs(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return read_costs(jax.jit(function).lower(*arguments).compile().as_text())


def test_products_plain_and_batched():
    assert costs(lambda a, b: a @ b, (8, 16), (16, 32)).flops == {"f32": 2 * 8 * 16 * 32}
    batched = costs(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (5, 8, 16), (5, 16, 32))
    assert batched.flops == {"f32": 5 * 2 * 8 * 16 * 32}


def test_a_loop_counts_every_trip_and_only_the_slice_of_stacked_layers():
    layers, width = 6, 256

    def run(x, weights):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    found = costs(run, (8, width), (layers, width, width))
    assert found.flops == {"f32": layers * 2 * 8 * width * width}
    weights = 4 * layers * width * width
    assert weights < found.memory_bytes < 3.5 * weights, "each layer is read once, perhaps by way of a copy"


def test_elementwise_traffic_is_what_goes_in_and_out():
    size = 1 << 16
    found = costs(lambda a, b: jnp.sin(a) * b + 1, (size,), (size,))
    assert found.memory_bytes == 3 * 4 * size and not found.flops


# What TPU and GPU compilers write; CPUs have neither.
TEXT = """HloModule m

ENTRY %main (a: bf16[4,4]) -> bf16[4,4] {{
{lines}
}}
"""


@pytest.mark.parametrize(
    ("left", "right", "result", "attributes", "flops"),
    [
        ("512,64", "96,64", "512,96", "dim_labels=bf_oi->bf", 512 * 64 * 96),
        # a batch of 8 by 32 products of (256, 96) and (96, 256)
        (
            "8,32,256,96", "8,32,96,256", "8,32,256,256",
            "window={size=8x32 stride=7x31 lhs_dilate=8x32}, dim_labels=01bf_01io->01bf", 8 * 32 * 256 * 96 * 256,
        ),
        # three stacked matrices of one input: the window slides over padding, each result meets one of them
        (
            "8,256,1,3072", "3,3072,3072,1", "8,256,3,3072",
            "window={size=1x3 pad=0_0x2_2 rhs_reversal=0x1}, dim_labels=0b1f_1oi0->0b1f", 8 * 256 * 3 * 3072 * 3072,
        ),
        # and back: the sum runs over the stack as well
        (
            "8,256,3,3072", "3,3072,3072,1", "8,256,1,3072",
            "window={size=1x3}, dim_labels=0b1f_1io0->0b1f", 8 * 256 * 3 * 3072 * 3072,
        ),
    ],
)  # fmt: skip
def test_products_written_as_convolutions(left, right, result, attributes, flops):
    lines = (
        f"  %a = bf16[{left}]{{0:T(8,128)}} parameter(0)\n  %b = bf16[{right}]{{0:T(8,128)}} parameter(1)\n"
        f"  ROOT %c = bf16[{result}]{{0:T(8,128)}} convolution(%a, %b), {attributes}"
    )
    assert read_costs(TEXT.format(lines=lines)).flops == {"bf16": 2 * flops}


def test_products_written_as_cublas_calls():
    config = '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
    lines = (
        "  %a = bf16[8,16]{1,0} parameter(0)\n  %b = bf16[16,32]{1,0} parameter(1)\n"
        f'  ROOT %c = (bf16[8,32]{{1,0}}, s8[99]{{0}}) custom-call(%a, %b), custom_call_target="__cublas$gemm", '
        f"backend_config={config}"
    )
    assert read_costs(TEXT.format(lines=lines)).flops == {"bf16": 2 * 8 * 16 * 32}


def test_what_stays_in_a_tpu_s_vector_memory_is_no_traffic():
    lines = (
        "  %a = f32[1024]{0:T(1024)} parameter(0)\n"
        "  %b = f32[1024]{0:T(1024)S(1)} negate(%a)\n"
        "  ROOT %c = f32[1024]{0:T(1024)} negate(%b)"
    )
    assert read_costs(TEXT.format(lines=lines)).memory_bytes == 2 * 4096
