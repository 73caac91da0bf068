"""HLO text taken apart: instructions with their arrays and operands, loops with their trip counts."""

import jax
import jax.numpy as jnp
import pytest

from terdit_jax.aot.hlo import Array, dtype_bits, read_instruction, split_computations, trip_counts


def test_an_instruction_of_a_tpu_program():
    line = (
        "  ROOT %f.4 = (bf16[8,3,3072]{2,1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[]{:T(128)}) fusion(%a.1, %b),"
        ' kind=kLoop, calls=%inner, metadata={op_name="x(y)"}'
    )
    instruction = read_instruction(line)
    assert (instruction.name, instruction.opcode, instruction.is_root) == ("f.4", "fusion", True)
    assert instruction.operands == ("a.1", "b") and "calls=%inner" in instruction.attributes
    first, second = instruction.arrays
    assert (first.dtype, first.shape, first.bytes) == ("bf16", (8, 3, 3072), 2 * 8 * 3 * 3072)
    assert "S(1)" in first.layout and second == Array("f32", (), "{:T(128)}")


def test_an_instruction_with_typed_operands_and_a_parameter():
    dot = read_instruction("  %dot = f32[4,8]{1,0} dot(f32[4,2]{1,0} %x, f32[2,8]{1,0} %y), lhs_contracting_dims={1}")
    assert dot.operands == ("x", "y") and dot.arrays == (Array("f32", (4, 8), "{1,0}"),)
    parameter = read_instruction("  %p = s32[] parameter(3)")
    assert (parameter.opcode, parameter.arguments, parameter.operands) == ("parameter", "3", ())
    assert read_instruction("}") is None


def test_bits_of_dtypes():
    assert [dtype_bits(dtype) for dtype in ("pred", "s4", "u8", "bf16", "f8e4m3fn")] == [8, 4, 8, 16, 8]
    with pytest.raises(ValueError, match="unknown HLO dtype 'weird'"):
        dtype_bits("weird")


def test_nested_loops_multiply():
    def inner(x, _):
        return jnp.sin(x @ x), None

    def outer(x, _):
        return jax.lax.scan(inner, x, None, length=3)[0], None

    program = jax.jit(lambda x: jax.lax.scan(outer, x, None, length=5)[0])
    computations, entry = split_computations(program.lower(jnp.ones((4, 4))).compile().as_text())
    trips = trip_counts(computations, entry)
    (name,) = [name for name, lines in computations.items() if any(" dot(" in line for line in lines)]
    assert trips[entry] == 1 and trips[name] == 15


@pytest.mark.parametrize("text", ["", "HloModule x\n%a (p: f32[]) -> f32[] {\n}\n"])
def test_text_without_an_entry_is_an_error(text):
    with pytest.raises(ValueError, match="no ENTRY"):
        split_computations(text)
