"""Safetensors files and artifacts forged by somebody who knows the format and signs the checksums again.

A forger changes the tensors, then the header's values, then its text; what was sealed is sealed anew after that.
"""

from collections.abc import Callable
import hashlib
import json
import re
import zlib

import ml_dtypes
import numpy as np

from terdit_jax.interop.safetensors import METADATA

Random = np.random.Generator
CODES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "U8": np.uint8}
DIGITS = "1" * 4299  # the longest number that Python reads
JUNK = (
    None, True, False, -1, 0, 1, 2, 3, 1 << 19, 1 << 20, 1 << 31, 1 << 47, 1 << 63, -(1 << 63), 1 << 64, 10**4000,
    0.0, 1e-320, 0.5, 1e308, float("inf"), float("nan"), "", "x", "none", "ddim", "\n", "\ud800", "\x1b[2J",
    "9" * 100_000, [], {}, [[]], {"": {}}, [0, 8], [1 << 40] * 9, ["U8", [8]], "0" * 64,
)  # fmt: skip


class Parts:
    """A file taken apart. tensors: name -> [dtype code, shape, bytes]; metadata: of the header."""

    def __init__(self, content: bytes):
        length = int.from_bytes(content[:8], "little")
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        self.metadata = header.pop(METADATA, {})
        self.tensors = {
            name: [entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]]
            for name, entry in header.items()
        }

    def header(self) -> dict:
        """The header of the tensors as they are now, with their checksums."""
        entries, end = {}, 0
        for name, (dtype, shape, content) in self.tensors.items():
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + len(content)]}
        if "sha256" in self.metadata:
            digests = {name: hashlib.sha256(content).hexdigest() for name, (_, _, content) in self.tensors.items()}
            self.metadata["sha256"] = json.dumps(digests)
        return {METADATA: self.metadata, **entries}

    def data(self) -> bytes:
        return b"".join(content for _, _, content in self.tensors.values())

    def pick(self, random: Random, dtypes: str) -> list:
        """Some tensor stored as one of these dtypes, or any."""
        fitting = [tensor for tensor in self.tensors.values() if tensor[0] in dtypes.split()]
        return _pick(random, fitting or list(self.tensors.values()))

    def deflated(self) -> dict:
        return json.loads(self.metadata.get("zlib", "{}"))


def seal(text: bytes) -> bytes:
    """The header's text with its own checksum put right, if it has one."""
    match = re.search(rb'"header_sha256": ?"([0-9a-f]{64})"', text)
    if not match:
        return text
    blank = text.replace(match[1], b"0" * 64, 1)
    return text.replace(match[1], hashlib.sha256(blank).hexdigest().encode(), 1)


def render(text: bytes, data: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


# Of tensors: what a file that is sound in form may hold.


def _unused_code(parts: Parts, random: Random) -> None:
    planes = [name for name, tensor in parts.tensors.items() if tensor[0] == "U8"]
    deflated = parts.deflated()
    if not planes:
        return _not_finite(parts, random)
    name = _pick(random, planes)
    content = bytearray(zlib.decompress(parts.tensors[name][2]) if name in deflated else parts.tensors[name][2])
    content[random.integers(len(content))] |= 0b11 << 2 * int(random.integers(4))
    content = _deflate(bytes(content)) if name in deflated else bytes(content)
    parts.tensors[name][1:] = ([len(content)] if name in deflated else parts.tensors[name][1]), content


def _not_finite(parts: Parts, random: Random) -> None:
    tensor = parts.pick(random, "F32")
    code = _pick(random, ("F64", "F32", "F16", "BF16"))
    values = np.frombuffer(tensor[2], CODES[tensor[0]]).astype(CODES[code])
    # The last is finite in float64 alone.
    values[random.integers(values.size)] = _pick(random, (np.nan, np.inf, -np.inf, 1e300 if code == "F64" else np.nan))
    tensor[0], tensor[2] = code, values.tobytes()


def _other_dtype(parts: Parts, random: Random) -> None:
    for tensor in parts.tensors.values():
        if tensor[0] == "F32":
            code = _pick(random, ("F64", "F16", "BF16", "F32"))
            tensor[0], tensor[2] = code, np.frombuffer(tensor[2], np.float32).astype(CODES[code]).tobytes()


def _missing(parts: Parts, random: Random) -> None:
    del parts.tensors[_pick(random, list(parts.tensors))]


def _extra(parts: Parts, random: Random) -> None:
    names = ("x", "layers.99.ffn_norm.weight", "layers.0.attention.wq.bias", "\n" * 9, "n" * 9999, "\ud800")
    parts.tensors[_pick(random, names)] = ["F32", [2], bytes(8)]


def _stream(parts: Parts, random: Random) -> None:
    """Streams that expand a hundredfold, go on, stop early, or are none; with a shape that tells the truth or lies."""
    name = _pick(random, [name for name, tensor in parts.tensors.items() if tensor[0] == "U8"] or list(parts.tensors))
    listed = parts.deflated()
    _, shape, content = parts.tensors[name]
    shape = listed[name][1] if name in listed else shape
    plain = zlib.decompress(content) if name in listed else content
    good = _deflate(plain)
    bomb = zlib.compress(bytes(100 * len(plain)))
    stream = _pick(
        random,
        (
            bomb, bomb + bytes(50 * len(plain)), good + b"x", good * 2, good[:-1], good[:-4] + b"beef", b"", plain,
            _deflate(plain + b"x"), _deflate(plain[1:]), _deflate(b""),
        ),
    )  # fmt: skip
    shape = _pick(random, (shape, shape, [1000 * len(plain)], [0], [], [2 * len(stream)], [1 << 40], [0, 1 << 62]))
    parts.tensors[name] = ["U8", [len(stream)], stream]
    parts.metadata["zlib"] = json.dumps(listed | {name: [_pick(random, ("U8", "U8", "BF16", "F64")), shape]})


def _stream_of_others(parts: Parts, random: Random) -> None:
    """A tensor that is no row of bytes said to be a stream."""
    name = _pick(random, list(parts.tensors))
    code = _pick(random, ("BF16", "F32", "U8", "BOOL"))
    content = parts.tensors[name][2]
    size = {"BF16": 2, "F32": 4}.get(code, 1)
    parts.tensors[name] = [code, [1, len(content) // size], content[: len(content) // size * size]]
    parts.metadata["zlib"] = json.dumps({name: ["U8", [len(content)]]})


# Of the header, which stays JSON.


def _junk(header: dict, random: Random) -> None:
    """Some value anywhere, also inside of the texts that hold JSON, becomes something else."""
    place = _pick(random, [header, header[METADATA], *header.values()])
    key = _pick(random, list(place) or ["x"])
    inner = place.get(key)
    if isinstance(inner, str) and inner.startswith("{"):
        tree = json.loads(inner)
        _junk_tree(tree, random)
        place[key] = json.dumps(tree)
    elif isinstance(inner, list) and random.random() < 0.5:
        inner[random.integers(len(inner)) if inner else 0 :] = [_pick(random, JUNK)]
    else:
        place[key] = _pick(random, JUNK)


def _description(header: dict, random: Random) -> None:
    fields = json.loads(header[METADATA]["description"])
    _junk_tree(fields, random)
    header[METADATA]["description"] = json.dumps(fields)


def _junk_tree(tree: dict, random: Random) -> None:
    while True:
        key = _pick(random, list(tree) or ["x"])
        if not isinstance(tree.get(key), dict) or random.random() < 0.2:
            break
        tree = tree[key]
    if random.random() < 0.1:
        tree.pop(key, None)
    else:
        tree[key] = _pick(random, JUNK)


def _huge_model(header: dict, random: Random) -> None:
    fields = json.loads(header[METADATA]["description"])
    for name in random.choice(["hidden_size", "depth", "num_classes", "input_size", "ffn_multiple_of"], 2):
        fields["model"][name] = 1 << int(random.integers(16, 62))
    header[METADATA]["description"] = json.dumps(fields)


def _huge_shape(header: dict, random: Random) -> None:
    entry = header[_pick(random, [name for name in header if name != METADATA])]
    entry["shape"] = [1 << int(random.integers(20, 63)) for _ in range(random.integers(1, 10))]
    if random.random() < 0.3:
        entry["shape"][random.integers(len(entry["shape"]))] = 0
        entry["data_offsets"] = [entry["data_offsets"][0]] * 2
    elif random.random() < 0.5:
        size = int(np.prod(entry["shape"], dtype=object)) * 4
        entry["data_offsets"] = [0, size]


# Of the header's text.


def _twice(text: bytes, random: Random) -> bytes:
    key = _pick(random, re.findall(rb'"[^"\\]+": ', text))
    return text.replace(b"{", b"{" + key + _pick(random, (b"0", b"{}", b'"1"')) + b", ", 1)


def _nested_description(text: bytes, random: Random) -> bytes:
    depth = int(random.integers(100, 3000))
    nested = b"[" * depth + b"]" * depth
    return re.sub(rb'(\\"[a-z_]+\\": ?)', lambda match: match[1] + nested + b', \\"z\\": ', text, count=1)


def _number(text: bytes, random: Random) -> bytes:
    numbers = (DIGITS, "-" + DIGITS, DIGITS * 2, "1e999", "NaN", "-Infinity", "1E-999", "0x10", "00", "01.")
    spans = [match.span() for match in re.finditer(rb"\b\d+\b", text)]
    start, stop = _pick(random, spans)
    return text[:start] + _pick(random, numbers).encode() + text[stop:]


def _objects(text: bytes, random: Random) -> bytes:
    """Inserts the most objects that the longest header can hold, or more."""
    unit = _pick(random, (b"[],", b"{},", b"1.5,", b'"\xc4\x80",', b"[[]],"))
    return _insert(text, b"[" + unit * int(_pick(random, (60_000, 200_000, 2_000_000)) // len(unit)) + b"0]")


def _insert(text: bytes, junk: bytes) -> bytes:
    return text.replace(b"{", b'{"x": ' + junk + b", ", 1)


TENSORS: dict[str, tuple[Callable, str]] = {  # name -> (change, what may come of it)
    "code 11": (_unused_code, "refused"),
    "not finite": (_not_finite, "refused"),
    "other dtypes": (_other_dtype, "any"),
    "tensor missing": (_missing, "refused"),
    "tensor added": (_extra, "refused"),
    "zlib stream": (_stream, "any"),
    "zlib of others": (_stream_of_others, "any"),
}
HEADERS = {
    "junk in header": (_junk, "any"),
    "junk in description": (_description, "any"),
    "huge model": (_huge_model, "refused"),
    "huge shape": (_huge_shape, "refused"),
}
TEXTS = {
    "key twice": (_twice, "refused"),
    "nested description": (_nested_description, "refused"),
    "odd number": (_number, "any"),
    "many objects": (_objects, "refused"),
}
LENGTHS = "forged length"
NAMES = (*TENSORS, *HEADERS, *TEXTS, LENGTHS)


def forge(name: str, content: bytes, random: Random) -> tuple[bytes, str]:
    """A forged file and what may come of it: it must be "refused", or "any" outcome is sound."""
    if name == LENGTHS:
        length = int(_pick(random, (0, 1, 2, 1 << 20, 1 << 40, (1 << 64) - 1)))
        return length.to_bytes(8, "little") + content[8:], "refused"
    parts = Parts(content)
    outcome = "any"
    if name in TENSORS:
        change, outcome = TENSORS[name]
        change(parts, random)
    header = parts.header()
    if name in HEADERS:
        change, outcome = HEADERS[name]
        change(header, random)
    text = json.dumps(header).encode()
    if name in TEXTS:
        change, outcome = TEXTS[name]
        text = change(text, random)
    return render(seal(text), parts.data()), outcome


def _deflate(content: bytes) -> bytes:
    encoder = zlib.compressobj(9, strategy=zlib.Z_HUFFMAN_ONLY)
    return encoder.compress(content) + encoder.flush()


def _pick(random: Random, items):
    return items[random.integers(len(items))]
