"""The FLOPs of a compiled program and its traffic between a chip and its memory, loops counted as often as they run.

The compilers' own cost analysis counts a loop's body once, so the HLO text is read instead.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
import dataclasses
import json
import math
import re

from terdit_jax.aot.hlo import (
    Array,
    Instruction,
    read_instruction,
    read_ints,
    search,
    split_computations,
    trip_counts,
)


@dataclasses.dataclass(frozen=True)
class Costs:
    """Work of one chip, each time the program runs. Attributes:

    flops: multiplications and additions of matrix products, by the dtype that is multiplied (as HLO writes it).
    memory_bytes: read from and written to the chip's main memory.
    """

    flops: dict[str, float]
    memory_bytes: float


Program = dict[str, dict[str, Instruction]]  # computation -> name -> instruction


def read_costs(hlo: str) -> Costs:
    """The costs of a compiled program.

    Memory traffic is that of the operands and results of every instruction or fusion, save those that stay in a TPU's
    vector memory. Slices of a larger array, stacked layers above all, count as large as the slice.

    Args:
      hlo: `jax.stages.Compiled.as_text()`.

    Raises:
      ValueError: text that is no whole program, a loop without a trip count, an unknown dtype.
    """
    computations, entry = split_computations(hlo)
    trips = trip_counts(computations, entry)
    program = {
        name: {i.name: i for line in lines if (i := read_instruction(line))} for name, lines in computations.items()
    }
    flops: dict[str, float] = defaultdict(float)
    traffic, sequential = 0.0, _sequential(program, entry)
    on_tpu = ":T(" in hlo  # only TPU layouts are tiled, and only there does S(1) mean the chip's own memory
    for name, instructions in program.items():
        for instruction in instructions.values() if trips[name] else ():
            dtype, count = _flops(instruction, instructions)
            if count:
                flops[dtype] += trips[name] * count
            if name in sequential:
                traffic += trips[name] * _traffic(instruction, instructions, program, on_tpu)
    return Costs(dict(flops), traffic)


def _sequential(program: Program, entry: str) -> set[str]:
    """The computations whose instructions run one after the other: the entry, loops, branches, not fusions."""
    found, waiting = set(), [entry]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for instruction in program[name].values():
            if instruction.opcode in ("while", "conditional", "call", "async-start"):
                attributes = instruction.attributes.partition(", metadata=")[0]
                waiting += [callee for callee in re.findall(r"%([\w.\-]+)", attributes) if callee in program]
    return found


def _flops(instruction: Instruction, known: dict[str, Instruction]) -> tuple[str, float]:
    """(dtype, FLOPs) of a matrix product, whatever the compiler made of it; ("", 0) for anything else."""
    opcode, attributes = instruction.opcode, instruction.attributes
    if opcode == "dot":
        contracted = read_ints(search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes, ""))
    elif opcode == "custom-call" and "__cublas$" in attributes:
        field = '"dot_dimension_numbers":'
        numbers, _ = json.JSONDecoder().raw_decode(attributes, attributes.index(field) + len(field))
        contracted = tuple(int(i) for i in numbers["lhs_contracting_dimensions"])
    elif opcode == "convolution":
        return _convolution(instruction, known)
    else:
        return "", 0.0
    left = _input(instruction, 0, known)
    if left is None:
        return "", 0.0
    depth = math.prod(left.shape[i] for i in contracted)
    return left.dtype, 2.0 * math.prod(instruction.arrays[0].shape) * depth


def _convolution(instruction: Instruction, known: dict[str, Instruction]) -> tuple[str, float]:
    """FLOPs of a convolution, as which TPU compilers write matrix products.

    Batches and stacks become windows of which most is padding: only places where a kernel meets an input count.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    left, kernel = _input(instruction, 0, known), _input(instruction, 1, known)
    if labels is None or kernel is None or left is None:
        return "", 0.0
    inputs = dict(zip(labels[1], left.shape, strict=True))
    weights = dict(zip(labels[2], kernel.shape, strict=True))
    results = dict(zip(labels[3], instruction.arrays[0].shape, strict=True))
    window = search(r"window=\{([^}]*)\}", instruction.attributes, "")
    flops = 2.0 * results["b"] * results["f"] * weights["i"]
    for dim in (label for label in labels[3] if label.isdigit()):
        place = int(dim)
        flops *= _meetings(inputs[dim], weights[dim], results[dim], *(_of(window, field, place) for field in _WINDOW))
    return left.dtype, flops


_WINDOW = ("stride", "lhs_dilate", "rhs_dilate", "pad")


def _of(window: str, field: str, place: int) -> int:
    """A window's field along one spatial dimension; of padding, what lies below."""
    values = search(rf"\b{field}=([\d_x\-]+)", window, "")
    return int(values.split("x")[place].partition("_")[0]) if values else int(field != "pad")


def _meetings(size: int, kernel: int, results: int, stride: int, dilate: int, spread: int, pad: int) -> int:
    """Counts the pairs (result, kernel place) along a dimension that fall onto an input, not onto padding or a gap."""
    last = (size - 1) * dilate
    places = (r * stride + k * spread - pad for r in range(results) for k in range(kernel))
    return sum(0 <= place <= last and place % dilate == 0 for place in places)


# Instructions that move nothing themselves: names for what is there, or waiting for what has been started.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "opt-barrier", "optimization-barrier", "partition-id", "replica-id", "async-start", "async-update", "async-done",
    "add-dependency", "domain", "iota", "broadcast-done", "get-dimension-size",
}  # fmt: skip
_NO_TRAFFIC_CALLS = re.compile(r'custom_call_target="(?:AllocateBuffer|CreateBuffer|Sharding|ConcatBitcast|annotate)')


def _traffic(instruction: Instruction, known: dict[str, Instruction], program: Program, on_tpu: bool) -> float:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or _NO_TRAFFIC_CALLS.search(instruction.attributes):
        return 0.0

    def size(arrays: Sequence[Array]) -> float:
        return sum(array.bytes for array in arrays if not (on_tpu and re.search(r"S\([1-9]\d*\)", array.layout)))

    operands = [known[name] for name in instruction.operands if name in known]
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * size(instruction.arrays)
    if opcode in ("dynamic-update-slice", "scatter"):
        update = operands[1 if opcode == "dynamic-update-slice" else -1 : None][:1]
        return 2 * sum(size(o.arrays) for o in update)
    if opcode.endswith("-start"):  # (what goes in, what comes out, bookkeeping)
        return size(instruction.arrays[:2])
    if opcode != "fusion":
        return size(instruction.arrays) + sum(size(o.arrays) for o in operands)
    return _fusion_traffic(instruction, operands, program, size)


def _fusion_traffic(
    fusion: Instruction, operands: list[Instruction], program: Program, size: Callable[[Sequence[Array]], float]
) -> float:
    inside = program.get(search(r"calls=%?([\w.\-]+)", fusion.attributes, ""), {})
    parameters = {int(i.arguments): i for i in inside.values() if i.opcode == "parameter"}
    uses: dict[str, list[Instruction]] = {}
    for instruction in inside.values():
        for name in instruction.operands:
            uses.setdefault(name, []).append(instruction)
    total = 0.0
    for place, operand in enumerate(operands):
        parameter = parameters.get(place)
        sliced = _sliced(parameter.name, uses, inside) if parameter else None
        total += size(operand.arrays) if sliced is None else min(size(operand.arrays), size(sliced))
    root = next((i for i in inside.values() if i.is_root), None)
    results = [inside[name] for name in root.operands if name in inside] if root and root.opcode == "tuple" else [root]
    if root is None or len(results) != len(fusion.arrays):
        return total + size(fusion.arrays)
    for array, result in zip(fusion.arrays, results, strict=True):
        updated = _updated(result, inside)
        total += size([array]) if updated is None else min(size([array]), size(updated))
    return total


_RENAMES = ("bitcast", "reshape", "copy", "transpose", "convert")


def _sliced(name: str, uses: dict[str, list[Instruction]], inside: dict[str, Instruction]) -> list[Array] | None:
    """The parts read of a fusion's parameter that is only sliced or updated in place; None if all of it is."""
    read: list[Array] = []
    for use in uses.get(name, []):
        if use.opcode in ("dynamic-slice", "slice", "gather"):
            read += use.arrays
        elif use.opcode == "dynamic-update-slice" and use.operands[0] == name:
            continue  # what is not updated stays where it is
        elif use.opcode == "bitcast":
            further = _sliced(use.name, uses, inside)
            if further is None:
                return None
            read += further
        else:
            return None
    return read if uses.get(name) else []


def _updated(result: Instruction | None, inside: dict[str, Instruction]) -> list[Array] | None:
    """The parts written of a fusion's result that updates an array in place; None if all of it is."""
    while result is not None and result.opcode in _RENAMES and result.operands:
        result = inside.get(result.operands[0])
    if result is None or result.opcode != "dynamic-update-slice" or len(result.operands) < 2:
        return None
    update = inside.get(result.operands[1])
    return list(update.arrays) if update else None


def _input(instruction: Instruction, place: int, known: dict[str, Instruction]) -> Array | None:
    names = instruction.operands
    if place >= len(names) or names[place] not in known:
        return None
    return known[names[place]].arrays[0]
