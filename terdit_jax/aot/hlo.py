"""The structure of HLO text, as compilers print it: computations, instructions, loops with their trip counts.

Pure functions of text. What instructions mean, which bytes they move or what they compute, is for others to say.
"""

from collections.abc import Iterator
import dataclasses
import math
import re

# dtype[dims], and the layout after it if there is one.
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_OPCODE = re.compile(r"(?:[^\s{]+(?:\{[^}]*\})?)? *([\w\-]+)\(")  # after the type, unless that is a tuple
_CALLEE = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CALLEES = re.compile(r"\b(?:calls|branch_computations|called_computations)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Array:
    """dtype as HLO writes it (u8, bf16, ...), shape, and the layout's text, "" where there is none."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""

    @property
    def bytes(self) -> int:
        """Without padding."""
        return math.ceil(math.prod(self.shape) * dtype_bits(self.dtype) / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: name, the arrays of its result, opcode, what stands in its parentheses, the names of instructions among
    that, and all that stands after them."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    arguments: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


def search(pattern: str, text: str, default: str) -> str:
    """The first group of the first match, or the default."""
    match = re.search(pattern, text)
    return match[1] if match else default


def read_ints(text: str) -> tuple[int, ...]:
    """Every number in a piece of text."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


def read_arrays(text: str) -> tuple[Array, ...]:
    """Every array type in a piece of text."""
    return tuple(Array(dtype, read_ints(dims), layout) for dtype, dims, layout in _ARRAY.findall(text))


def dtype_bits(dtype: str) -> int:
    """Bits of one element. Raises ValueError for a dtype that is unknown."""
    if dtype in ("pred", "token", "opaque"):
        return 8 if dtype == "pred" else 0
    match = re.match(r"(?:bf|[sufc])(\d+)", dtype)  # s8, bf16, f8e4m3fn, c64, ...
    if match is None:
        raise ValueError(f"unknown HLO dtype {dtype!r}")
    return int(match[1])


def split_computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The instructions' lines by computation, and the entry computation's name.

    Raises:
      ValueError: text without an entry computation.
    """
    computations: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in hlo.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if header:
            lines = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line)
    if not entry:
        raise ValueError("this is no HLO text of a whole program: it has no ENTRY computation")
    return computations, entry


def read_instruction(line: str) -> Instruction | None:
    """An instruction's line taken apart, or None for any other line."""
    head = re.match(r"\s*(ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    rest = line[head.end() :]
    opcode = _OPCODE.match(rest, _closing(rest, 0) + 1 if rest.startswith("(") else 0)
    if opcode is None:
        return None
    begin = opcode.end()
    close = _closing(rest, begin - 1)
    # Operands are %names, or bare names where the printer leaves the sign out; types may stand before them.
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[begin:close])) or tuple(
        re.findall(r"(?:^|, )([a-zA-Z_][\w.\-]*)", rest[begin:close])
    )
    arguments, attributes = rest[begin:close], rest[close + 1 :]
    arrays = read_arrays(rest[: opcode.start(1)])
    return Instruction(head[2], arrays, opcode[1], arguments, operands, attributes, bool(head[1]))


def _closing(text: str, opening: int) -> int:
    """The place of the parenthesis that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return len(text)


def trip_counts(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
    """Counts how often each computation runs each time the entry does. Of branches, all are counted.

    Trip counts are the compiler's where it states them; otherwise a loop is taken to count from 0 in ones up to the
    constant that its condition compares with.

    Raises:
      ValueError: a loop without a trip count.
    """
    calls = {name: list(_calls(computations, lines)) for name, lines in computations.items()}
    trips = dict.fromkeys(computations, 0)

    def run(name: str, times: int) -> None:
        trips[name] += times
        for callee, factor in calls.get(name, ()):
            run(callee, times * factor)

    run(entry, 1)
    return trips


def _calls(computations: dict[str, list[str]], lines: list[str]) -> Iterator[tuple[str, int]]:
    for line in lines:
        line = line.partition(", metadata=")[0] + line.partition("backend_config=")[2]
        if re.search(r" [\w\-]+-(?:done|update)\(", line):
            continue  # its start has been counted
        callees = [*_CALLEE.findall(line)]
        for several in _CALLEES.findall(line):
            callees += [name.strip().lstrip("%") for name in several.split(",")]
        factor = _trip_count(computations, line) if " while(" in line else 1
        yield from ((callee, factor) for callee in callees if callee in computations)


def _trip_count(computations: dict[str, list[str]], line: str) -> int:
    known = search(r'"known_trip_count":\{"n":"(\d+)"\}', line, "")
    if known:
        return int(known)
    condition = search(r"condition=%?([\w.\-]+)", line, "")
    lines = list(computations.get(condition, ()))
    lines += [inner for callee, _ in _calls(computations, lines) for inner in computations[callee]]
    text = "\n".join(lines)
    bounds = re.findall(r"= [su]\d+\[\]\S* constant\((\d+)\)", text)
    if len(bounds) != 1 or "direction=LT" not in text:
        raise ValueError(f"no trip count in loop condition {condition}: its constants are {bounds}")
    return int(bounds[0])
