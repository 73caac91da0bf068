"""Reads the float32 constants of a frozen TensorFlow graph (`.pb`) without TensorFlow, at protobuf's wire format.

Only what names and holds a constant is looked at; which of them make a network is left to others.
"""

from collections.abc import Iterator
import math
import os

import numpy as np

from terdit_jax.errors import UserError
from terdit_jax.interop.safetensors import is_possible

# Field numbers of tensorflow/core/framework: GraphDef, NodeDef, AttrValue and its map's entry, TensorProto.
_NODE = 1
_NAME, _OP, _ATTR = 1, 2, 5
_KEY, _VALUE = 1, 2
_TENSOR = 8
_DTYPE, _SHAPE, _CONTENT, _FLOATS = 1, 2, 4, 5
_DIM, _SIZE = 2, 1
_FLOAT32 = 1  # of DataType
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


def read_constants(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """name -> float32 array of every such constant, views of the mapped file where it holds plain bytes.

    Raises:
      UserError: a file that cannot be read, or that is no graph.
    """
    try:
        data = memoryview(np.asarray(np.memmap(path, np.uint8, "r")))
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    constants: dict[str, np.ndarray] = {}
    try:
        for number, node in _fields(data):
            if number == _NODE:
                constants.update(_read_node(_expect_bytes(node)))
    except ValueError as error:
        raise UserError(f"{path}: not a frozen TensorFlow graph ({error})") from error
    if not constants:
        raise UserError(f"{path}: not a frozen TensorFlow graph: it holds no float32 constant")
    return constants


def _read_node(node: memoryview) -> dict[str, np.ndarray]:
    name, op, tensor = b"", b"", None
    for number, value in _fields(node):
        if number == _NAME:
            name = bytes(_expect_bytes(value))
        elif number == _OP:
            op = bytes(_expect_bytes(value))
        elif number == _ATTR:
            entry = dict(_fields(value))
            if bytes(_expect_bytes(entry.get(_KEY, b""))) == b"value":
                tensor = dict(_fields(entry.get(_VALUE, b""))).get(_TENSOR)
    if op != b"Const" or tensor is None:
        return {}
    array = _read_tensor(_expect_bytes(tensor), name)
    return {} if array is None else {name.decode(errors="replace"): array}


def _read_tensor(tensor: memoryview, name: bytes) -> np.ndarray | None:
    """None for a dtype other than float32."""
    dtype, shape, content, floats = 0, [], None, []
    for number, value in _fields(tensor):
        if number == _DTYPE:
            dtype = value
        elif number == _SHAPE:
            shape = [dict(_fields(dim)).get(_SIZE, 0) for n, dim in _fields(value) if n == _DIM]
        elif number == _CONTENT:
            content = _expect_bytes(value)
        elif number == _FLOATS:
            floats.append(_expect_bytes(value))  # packed, or one at a time
    if dtype != _FLOAT32:
        return None
    if not all(isinstance(n, int) for n in shape) or not is_possible(shape):
        raise ValueError(f"constant {name[:60].decode(errors='replace')!r} has an impossible shape")
    content = b"".join(floats) if content is None else content
    count, size = math.prod(shape), len(content)
    if size == 4 and not shape:
        return np.frombuffer(content, "<f4").reshape(())
    if size != 4 * count:
        raise ValueError(f"constant {name[:60].decode(errors='replace')!r} of shape {shape} has {size} bytes")
    return np.frombuffer(content, "<f4").reshape(shape)


def _fields(data: int | bytes | memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a message: an int, or the bytes of anything longer.

    Raises:
      ValueError: bytes that are no message.
    """
    data, position = _expect_bytes(data), 0
    while position < len(data):
        tag, position = _varint(data, position)
        wire_type = tag & 7
        if wire_type == _VARINT:
            value, position = _varint(data, position)
            yield tag >> 3, value
            continue
        if wire_type == _BYTES:
            size, position = _varint(data, position)
        elif wire_type in (_FIXED64, _FIXED32):
            size = 8 if wire_type == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire_type} at a place where a message has none")
        if size > len(data) - position:
            raise ValueError("it is cut off")
        yield tag >> 3, data[position : position + size]
        position += size


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """The number at `position`, seven bits a byte, low ones first, and the place behind it."""
    number = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("it is cut off")
        byte = data[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position
    raise ValueError("a number has more than 64 bits")


def _expect_bytes(value: int | bytes | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number stands where a message belongs")
    return memoryview(value)
