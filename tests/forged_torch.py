"""Files of torch.save forged by somebody who knows the format: pickles that are programs, zips that are bombs.

The members' CRC-32 are right here, as a forger would have them; `SENTINEL` is what a payload would create if it ran.
"""

from collections.abc import Callable, Mapping
import os
import pickletools
import struct
import tempfile

import ml_dtypes
import numpy as np
from torch_files import (
    BUILD,
    MARK,
    NEWOBJ,
    PERSID,
    PROTO,
    REDUCE,
    STOP,
    call,
    members,
    name,
    namespace,
    state_dict,
    tensor,
    tensor_of,
    text,
    torch_file,
    value,
    zip_of,
)

Random = np.random.Generator
Arrays = Mapping[str, np.ndarray]
SENTINEL = os.path.join(tempfile.gettempdir(), f"terdit_jax_code_was_run_{os.getpid()}")
HUGE = (1 << 20, 1 << 31, 1 << 47, 1 << 63, 1 << 64, 1 << 2000, -1, -(1 << 40), 0)


def _evil(random: Random) -> bytes:
    """A pickle that runs code when it is loaded."""
    command = f"open({SENTINEL!r}, 'w')"
    shell = f"touch {SENTINEL}"
    return _pick(
        random,
        (
            call("os", "system", shell), call("posix", "system", shell), call("subprocess", "getoutput", shell),
            call("builtins", "eval", command), call("builtins", "exec", command), call("__builtin__", "eval", command),
            call("builtins", "__import__", "os"), call("timeit", "timeit", command), call("runpy", "run_path", shell),
            call("torch.storage", "_load_from_bytes", shell), call("torch", "load", shell),
            call("numpy", "load", shell), call("collections", "OrderedDict.__reduce_ex__", shell),
            call("torch._utils", "_rebuild_parameter", shell), call("torch", "FloatStorage", shell),
            call("argparse", "Namespace", shell), call("argparse", "FileType", "w"),
            text("os") + text("system") + b"\x93" + value((shell,)) + REDUCE,  # STACK_GLOBAL
            MARK + text(shell) + b"ios\nsystem\n",  # INST
            MARK + name("os", "system") + text(shell) + b"o",  # OBJ
            name("os", "system") + value((shell,)) + NEWOBJ,
            name("os", "system") + value((shell,)) + value({}) + b"\x92",  # NEWOBJ_EX
            b"\x82\x01" + value((shell,)) + REDUCE,  # EXT1
            b"Pos.system\n", name("os\r\x1b[2J", "sys\x0btem"), name("", ""),
        ),
    )  # fmt: skip


def _laughs(random: Random, depth: int = 60) -> bytes:
    """A value of a few hundred bytes with 2**60 leaves, or one that holds itself."""
    kind = random.integers(4)
    if kind == 3:
        return _pick(random, (b"]q\x07h\x07a", b"}q\x07" + text("name") + b"h\x07s"))
    program = MARK + text("ha") + b"q\x07"
    for _ in range(depth):
        twice = b"h\x07h\x07\x86", b"](h\x07h\x07e", b"}(" + text("a") + b"h\x07" + text("b") + b"h\x07u"
        program += twice[kind] + b"q\x07"
    return program + b"t"  # of all of them, for there is no instruction to drop one


def _deep(random: Random) -> bytes:
    depth = int(10 ** random.uniform(2, 5))
    return _pick(random, (b")" + b"\x85" * depth, b"]" * depth + b"a" * (depth - 1), b"N" + b"\x85" * depth))


def _odd(random: Random) -> bytes:
    """Instructions with sizes and numbers that nothing backs, or that no state dict has."""
    big = int(_pick(random, (1 << 16, (1 << 31) - 1, (1 << 32) - 1)))
    return _pick(
        random,
        (
            b"X" + struct.pack("<I", big), b"T" + struct.pack("<I", big), b"B" + struct.pack("<I", big),
            b"\x8e" + struct.pack("<Q", big << 31), b"\x8d" + struct.pack("<Q", big << 31),
            b"\x96" + struct.pack("<Q", big << 31), b"\x8b" + struct.pack("<I", big), b"\x8a\xff" + b"\xff" * 255,
            b"\x8b" + struct.pack("<I", 100_000) + b"\x7f" * 100_000, b"L" + b"9" * 100_000 + b"L\n", b"I01\n",
            b"F1e999\n", b"X\x01\0\0\0\xff", b"", text("n" * 9999),
            b"Nr" + struct.pack("<I", big), b"j" + struct.pack("<I", big), b"h\xfe", b"0", b"1", b"2", b"t", b"u", b"e",
            b"R", b"b", b"Q", b"\x95" + struct.pack("<Q", 1 << 62), b"\x80\xff", b"S'\\d'\n", b"Vx\\uZZZZ\n",
            b"g999\n", b"(" * 1000, b"]" * 300_000, b"(" * 300_000, b"N" * (3 << 20), b"}" * 200_000,
        ),
    )  # fmt: skip


def _junk(random: Random) -> bytes:
    kind = random.integers(5)
    if kind == 0:
        return _odd(random)
    if kind == 1:
        return _laughs(random)
    if kind == 2:
        return _deep(random)
    if kind == 3:
        numbers = (-1, 0, 1, 8, 1 << 19, 1 << 1000, 0.0, float("inf"), float("nan"))
        return value(_pick(random, (*numbers, None, True, "", "\n", "\ud800", "9" * 9999, [], {}, ())))
    empty = name("argparse", "Namespace") + b")" + NEWOBJ
    return _pick(random, (empty, call("collections", "OrderedDict"), name("torch", "FloatStorage")))


def _forged_tensor(random: Random, key: str, array: np.ndarray) -> bytes:
    """A tensor with one part of its description wrong."""
    strides = tuple(int(np.prod(array.shape[i + 1 :])) for i in range(array.ndim))
    storage = {4: "FloatStorage", 1: "ByteStorage"}[array.itemsize]
    parts = dict(key=key, storage=storage, size=array.size, offset=0, shape=array.shape, strides=strides)
    huge = int(_pick(random, HUGE))
    match random.integers(11):
        case 0:
            parts["size"] = huge
        case 1:
            parts["offset"] = huge
        case 2:
            parts["shape"] = (huge,) * int(random.integers(1, 10))
            parts["strides"] = (1,) * len(parts["shape"])
        case 3:
            parts["shape"], parts["strides"] = (1 << 47, 0, 1 << 47), (0, 0, 0)
        case 4:
            parts["strides"] = tuple(-n for n in strides) if random.random() < 0.5 else tuple(0 for _ in strides)
        case 5:
            others = ("DoubleStorage", "BoolStorage", "LongStorage", "UntypedStorage", "HalfStorage")
            parts["storage"] = _pick(random, others)
        case 6:
            parts["key"] = _pick(random, ("../0", "0/../1", "", "99999", "0" * 9999, "0\n", 0))
        case 7:
            parts["kind"] = _pick(random, ("module", "", ("storage",), 1))
        case 8:
            part = _pick(random, list(parts))
            parts[part] = _junk(random)
        case 9:
            persistent = _pick(random, (_junk(random), value(("storage",)), value(("storage", 1, 2, 3, 4)), value([])))
            return call("torch._utils", "_rebuild_tensor_v2", persistent + PERSID, 0, array.shape, strides)
        case 10:
            return tensor(**parts) + _junk(random) + BUILD
    return tensor(**parts)


def _change_operations(random: Random, program: bytes) -> bytes:
    """The program with some of its instructions gone, repeated, swapped or replaced."""
    starts = [position for _, _, position in pickletools.genops(program)]
    operations = [program[a:b] for a, b in zip(starts, [*starts[1:], len(program)], strict=True)]
    for _ in range(random.integers(1, 4)):
        i, j = (int(n) for n in random.integers(1, len(operations), 2))
        match random.integers(5):
            case 0:
                operations[i] = b""
            case 1:
                operations[i] *= 2
            case 2:
                operations[i], operations[j] = operations[j], operations[i]
            case 3:
                operations[i] = operations[j]
            case 4:
                operations[i] = _junk(random)
    return b"".join(operations)


def _change_bytes(random: Random, program: bytes) -> bytes:
    content = bytearray(program)
    for _ in range(random.integers(1, 4)):
        content[random.integers(len(content))] = random.integers(256)
    return bytes(content)


def _wrap(random: Random, arrays: Arrays, fields: dict, inner: bytes) -> bytes:
    """A pickle with `inner` somewhere a value belongs: among a state dict's tensors, or a namespace's attributes."""
    if arrays:
        key = _pick(random, list(arrays))
        return _pick(random, (PROTO + inner + STOP, state_dict(arrays, {key: inner}), state_dict(arrays, {"x": inner})))
    fields = {**fields, "model": dict(fields["model"])}
    place = _pick(random, (fields, fields["model"]))
    place[_pick(random, list(place))] = inner
    attributes = {"image_size": 32, "terdit_jax": fields}
    odd = {_pick(random, ("image_size", "vae", "terdit_jax")): inner}
    state = _pick(random, (attributes, attributes, odd, inner))
    return _pick(random, (PROTO + inner + STOP, namespace(state), namespace(state), namespace(state)))


def _code(random: Random, arrays: Arrays, fields: dict) -> bytes:
    return torch_file(_wrap(random, arrays, fields, _evil(random)), arrays.values())


def _odd_values(random: Random, arrays: Arrays, fields: dict) -> bytes:
    return torch_file(_wrap(random, arrays, fields, _junk(random)), arrays.values())


def _operations(random: Random, arrays: Arrays, fields: dict) -> bytes:
    program = state_dict(arrays) if arrays else namespace({"image_size": 32, "terdit_jax": fields})
    change = _pick(random, (_change_operations, _change_bytes))
    return torch_file(change(random, program), arrays.values())


def _keys(random: Random, arrays: Arrays, fields: dict) -> bytes:
    """Keys that are no text, or that take for ever to hash."""
    odd = _pick(random, (_laughs(random), value(1), value((1, 2)), b"N", name("torch", "FloatStorage")))
    program = b"}" + odd + b"Ns"
    return torch_file(_wrap(random, arrays, fields, program), arrays.values())


def _quadratic(random: Random, arrays: Arrays, fields: dict) -> bytes:
    """One large value given thousands of times, each of which would copy it."""
    large = value({f"{i}": None for i in range(20_000)}) + b"r\x07\0\0\0"
    repeated = _pick(
        random,
        (
            name("argparse", "Namespace") + b")\x81" + b"h\x07b" * 20_000,
            b"](" + (name("argparse", "Namespace") + b")\x81h\x07b") * 5_000 + b"e",
            b"](" + b"h\x07" * 20_000 + b"e",
        ),
    )
    return torch_file(_wrap(random, arrays, fields, large + repeated + b"\x86"), arrays.values())


def _tensors(random: Random, arrays: Arrays, fields: dict) -> bytes:
    keys = list(arrays)
    number = int(random.integers(len(keys)))
    forged = _forged_tensor(random, str(number), arrays[keys[number]])
    return torch_file(state_dict(arrays, {keys[number]: forged}), arrays.values())


def _shared(random: Random, arrays: Arrays, fields: dict) -> bytes:
    """Thousands of tensors that are all one storage."""
    largest = max(arrays, key=lambda key: arrays[key].nbytes)
    same = dict.fromkeys(arrays, tensor_of("0", arrays[largest]))
    more = {f"layers.{i}.feed_forward.w1.weight": same[largest] for i in range(1000)}
    return torch_file(PROTO + value(same | more) + STOP, [arrays[largest]])


def _values(random: Random, arrays: Arrays, fields: dict) -> bytes:
    """Codes that stand for nothing and numbers that are none."""
    arrays = dict(arrays)
    key = _pick(random, list(arrays))
    array = arrays[key]
    if array.dtype == np.uint8:
        array = array.copy()
        array.flat[random.integers(array.size)] |= 0b11 << 2 * int(random.integers(4))
    else:
        dtype = _pick(random, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))
        array = array.astype(dtype)
        # The last is finite in float64 alone.
        bad = (np.nan, np.inf, 1e300 if dtype == np.float64 else -np.inf)
        array.flat[random.integers(array.size)] = _pick(random, bad)
    arrays[key] = array
    return torch_file(state_dict(arrays), arrays.values())


def _zips(random: Random, arrays: Arrays, fields: dict) -> bytes:
    """Zips that are sound, but not what torch.save writes."""
    program = state_dict(arrays) if arrays else namespace({"image_size": 32, "terdit_jax": fields})
    named = members(program, arrays.values())
    match random.integers(8):
        case 0:
            return zip_of(named, deflated=tuple(key for key, _ in named))
        case 1:
            return zip_of([(named[0][0], bytes(20 << 20)), *named[1:]], deflated=(named[0][0],))
        case 2:
            return zip_of([*named, ("archive/data.pkl", PROTO + _evil(random) + STOP)])
        case 3:
            return zip_of([*named, ("other/data.pkl", PROTO + _evil(random) + STOP)])
        case 4:
            return zip_of([(f"archive/{i}", b"") for i in range(int(_pick(random, (2000, 20_000))))] + named)
        case 5:
            return zip_of([(key, b"big" if key.endswith("byteorder") else content) for key, content in named])
        case 6:
            return zip_of(named[1:])
        case _:
            return zip_of([(key.partition("/")[2], content) for key, content in named])


def _directory(random: Random, content: bytes) -> bytes:
    """A number in the zip's directory or its end is forged; everything else is sound."""
    start = content.find(b"PK\x01\x02")
    entries = [i for i in range(start, len(content)) if content.startswith(b"PK\x01\x02", i)]
    end = content.rfind(b"PK\x05\x06")
    places = [(8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4)]
    base, (offset, width) = int(_pick(random, entries)), _pick(random, places)
    if random.random() < 0.3:
        base, (offset, width) = end, _pick(random, [(4, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)])
    largest = (1 << 8 * width) - 1
    number = int(_pick(random, (0, 1, largest, largest // 2, largest - 1, int(random.integers(largest)), 8)))
    return content[: base + offset] + number.to_bytes(width, "little") + content[base + offset + width :]


def _zip64(random: Random, content: bytes) -> bytes:
    """A 64-bit record ahead of the zip's end, with forged sizes and places."""
    end = content.rfind(b"PK\x05\x06")
    count, size, start = struct.unpack("<HII", content[end + 10 : end + 20])
    numbers = [count, count, size, start]
    if random.random() < 0.9:
        numbers[random.integers(4)] = int(_pick(random, (0, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)))
    place = end if random.random() < 0.7 else int(_pick(random, (1 << 40, (1 << 63) - 1, (1 << 64) - 1)))
    record = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, *numbers)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, place, 1)
    last = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return content[:end] + record + locator + last


# name -> (change, what may come of it)
PICKLES: dict[str, tuple[Callable, str]] = {
    "code": (_code, "refused"),
    "odd values": (_odd_values, "any"),
    "operations": (_operations, "any"),
    "odd keys": (_keys, "refused"),
    "quadratic": (_quadratic, "refused"),
    "other zips": (_zips, "same"),
}
TENSORS = {"forged tensor": (_tensors, "any"), "shared storage": (_shared, "refused"), "values": (_values, "refused")}
ZIPS = {"zip directory": (_directory, "same"), "zip64": (_zip64, "same")}


def names(arrays: Arrays) -> tuple[str, ...]:
    """Mutations of a state dict, or of a namespace, which has no arrays."""
    return (*PICKLES, *ZIPS, *(TENSORS if arrays else ()))


def forge(kind: str, content: bytes, arrays: Arrays, fields: dict, random: Random) -> tuple[bytes, str]:
    """A forged file and what may come of it: "refused", "same" (that, or the weights as they were) or "any"."""
    if kind in ZIPS:
        change, outcome = ZIPS[kind]
        return change(random, content), outcome
    change, outcome = (PICKLES | TENSORS)[kind]
    return change(random, arrays, fields), outcome


def _pick(random: Random, items):
    return items[random.integers(len(items))]
