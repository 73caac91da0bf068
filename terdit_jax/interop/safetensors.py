"""The safetensors container: checked by the reference library, mapped without copying, written tensor by tensor.

The library believes no header; how long one may be is bounded before it. What the tensors and the metadata mean is left
to `artifact`. Format: https://huggingface.co/docs/safetensors.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import hashlib
import json
import math
import os

import ml_dtypes
import numpy as np
from safetensors import safe_open

from terdit_jax.errors import UserError
from terdit_jax.files import new_file, refuse_existing, refusing
from terdit_jax.paths import as_path
from terdit_jax.untrusted import parse_json, reading

# Python objects take thirty times the JSON they come from; the largest published model has 0.3 MB of it.
MAX_HEADER_BYTES = 2 << 20
METADATA = "__metadata__"
_LENGTH_BYTES = 8
DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Container:
    """An opened file. arrays: views of the mapped file, read when touched; header: its bytes, for checksums."""

    arrays: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]
    header: bytes


def open_container(path: str | os.PathLike) -> Container:
    """Maps a safetensors file.

    Raises:
      UserError: a file that cannot be read, whose header does not describe exactly the bytes after it, or that holds a
        dtype which NumPy does not have.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if length > MAX_HEADER_BYTES:
                raise UserError(f"{path}: not a safetensors file, its header would have {length:,} bytes")
            header = file.read(length)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    with reading(f"{path}: not a safetensors file, or cut off or damaged"):
        with safe_open(path, "np"):  # compares the header with the file
            data = np.asarray(np.memmap(path, np.uint8, "r"))[_LENGTH_BYTES + length :]
        entries = parse_json(header, f"{path}: its header", dict)
        metadata = entries.pop(METADATA, {})
        arrays = {
            name: data[slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in entries.items()
        }
    return Container(arrays, metadata, header)


def write_container(
    path: str | os.PathLike,
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Callable[[], Mapping[str, str]],
    *,
    room: int,
    seal: str | None = None,
) -> None:
    """Writes a file, one tensor in memory at a time; the path appears when everything is on disk.

    The header comes first but is known last, so room for it is kept and filled with spaces, as the format allows.

    Args:
      path: must not exist.
      tensors: names and arrays.
      metadata: gives that of the header, after the last tensor.
      room: upper bound of the header's length in bytes.
      seal: a key of the metadata whose value, made of zeros, is replaced by the SHA-256 of the header so written.

    Raises:
      UserError: the path exists, also by now, or cannot be written, or readers would refuse so long a header.
    """
    if room > MAX_HEADER_BYTES - 8:
        raise UserError(f"cannot write {path}: a header of {room:,} bytes is more than the format allows")
    path, room = as_path(path), -(-room // 8) * 8
    refuse_existing(path)
    with refusing(path), new_file(path, replace=False) as temporary, open(temporary, "wb") as file:
        file.seek(_LENGTH_BYTES + room)
        entries, end = {}, 0
        for name, array in tensors:
            file.write(as_bytes(array))
            entries[name] = entry(array.dtype, array.shape, end)
            end += array.nbytes
        values = metadata()
        header = render_header(entries, values).ljust(room)
        if len(header) != room:
            raise ValueError(f"the header has {len(header)} bytes, there is room for {room}")
        if seal:
            header = header.replace(values[seal].encode(), hashlib.sha256(header).hexdigest().encode(), 1)
        file.seek(0)
        file.write(room.to_bytes(_LENGTH_BYTES, "little") + header)


def as_bytes(array: np.ndarray) -> memoryview:
    """An array's bytes; bfloat16 has no buffer of its own."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def entry(dtype: np.dtype, shape: tuple[int, ...], start: int) -> dict:
    """A tensor's line in the header."""
    size = math.prod(shape) * dtype.itemsize
    return {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, start + size]}


def array_type(dtype: np.dtype, shape: tuple[int, ...]) -> list:
    """A tensor's dtype and shape as JSON has them."""
    return [_CODES[dtype], list(shape)]


def render_header(entries: Mapping[str, dict], metadata: Mapping[str, str]) -> bytes:
    """The header's JSON."""
    return json.dumps({METADATA: dict(metadata), **entries}, separators=(",", ":")).encode()
