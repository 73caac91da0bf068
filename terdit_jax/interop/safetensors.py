"""The safetensors container: read as a mapping of the file without copying, written tensor by tensor.

Nothing here is trusted or allocated on a header's word: every offset is checked against the file first. What the
tensors and the metadata mean is left to `artifact`. Format: https://huggingface.co/docs/safetensors.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path
from types import TracebackType

import ml_dtypes
import numpy as np

from terdit_jax.errors import UserError
from terdit_jax.files import PendingFile, refuse_existing, refusing
from terdit_jax.paths import as_path
from terdit_jax.untrusted import parse_json

# Python objects take thirty times the JSON they come from; the largest published model has 0.3 MB of it.
MAX_HEADER_BYTES = 2 << 20
METADATA = "__metadata__"
_LENGTH_BYTES = 8
_DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Container:
    """An opened file. arrays: views of the mapped file, read when touched; header: its bytes, for checksums."""

    arrays: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]
    header: bytes


def open_container(path: str | os.PathLike) -> Container:
    """Maps a safetensors file.

    Raises:
      UserError: a file that cannot be read or whose header does not describe exactly the bytes that follow it.
    """
    try:
        size = Path(path).stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size <= _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, MAX_HEADER_BYTES):
                raise UserError(f"{path}: not a safetensors file, or cut off")
            header = file.read(length)
        data = np.asarray(np.memmap(path, np.uint8, "r"))[_LENGTH_BYTES + length :]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    entries = parse_json(header, f"{path}: its header", dict)
    metadata = entries.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path}: its header's {METADATA} must hold text only")
    return Container(_map_arrays(entries, data, str(path)), metadata, header)


def parse_array_type(dtype: object, shape: object, what: str) -> tuple[np.dtype, tuple[int, ...]]:
    """A tensor's dtype and shape as written in JSON. Raises UserError, naming `what`, for what is none."""
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise UserError(f"{what} has an unknown dtype")
    if not isinstance(shape, list) or not all(type(n) is int for n in shape) or not is_possible(shape):
        raise UserError(f"{what} has an impossible shape")
    return _DTYPES[dtype], tuple(shape)


def is_possible(shape: Sequence[int]) -> bool:
    """Whether NumPy can make an array of such a shape, which it cannot of (0, 2**48, 2**48), though that is empty."""
    return len(shape) <= 8 and min(shape, default=0) >= 0 and math.prod(max(n, 1) for n in shape) < 1 << 48


def _map_arrays(entries: dict, data: np.ndarray, path: str) -> dict[str, np.ndarray]:
    spans = []
    for name, entry in entries.items():
        what = f"{path}: tensor {name[:60]!r}"
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise UserError(f"{what} has no dtype, shape and data_offsets")
        dtype, shape = parse_array_type(entry["dtype"], entry["shape"], what)
        offsets = entry["data_offsets"]
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
            raise UserError(f"{what} has impossible data_offsets")
        if not 0 <= offsets[0] <= offsets[1] <= data.size:
            raise UserError(f"{what} does not lie in the file, which is cut off or damaged")
        if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{what} has {offsets[1] - offsets[0]} bytes, its shape needs another number")
        spans.append((offsets[0], offsets[1], name, dtype, shape))
    arrays, end = {}, 0
    for start, stop, name, dtype, shape in sorted(spans, key=lambda span: span[:2]):
        if start != end:
            raise UserError(f"{path}: tensor {name[:60]!r} does not lie where the one before it ends")
        arrays[name] = data[start:stop].view(dtype).reshape(shape)
        end = stop
    if end != data.size:
        raise UserError(f"{path}: {data.size - end} bytes belong to no tensor")
    return arrays


class Writer:
    """Writes a file tensor by tensor, under a temporary name until `finish`; leaving early removes it.

    The header comes first but is known last, so room for it is kept and filled with spaces, as the format allows.
    """

    def __init__(self, path: str | os.PathLike, header_bytes: int):
        """Opens the temporary file; `header_bytes` is an upper bound of the header's length.

        Raises:
          UserError: the path exists or cannot be written, or readers would refuse so long a header.
        """
        if header_bytes > MAX_HEADER_BYTES - 8:
            raise UserError(f"cannot write {path}: a header of {header_bytes:,} bytes is more than the format allows")
        self._path = as_path(path)
        self._header_bytes = -(-header_bytes // 8) * 8
        self._entries: dict[str, dict] = {}
        self._end = 0
        refuse_existing(self._path)
        with refusing(self._path):
            self._pending = PendingFile(self._path)
            self._file = open(self._pending.temporary, "wb")
            self._file.seek(_LENGTH_BYTES + self._header_bytes)

    def add(self, name: str, array: np.ndarray) -> None:
        """Appends a tensor."""
        with refusing(self._path):
            self._file.write(as_bytes(array))
        self._entries[name] = entry(array.dtype, array.shape, self._end)
        self._end += array.nbytes

    def finish(self, metadata: Mapping[str, str], seal: str | None = None) -> None:
        """Writes the header, syncs, and gives the file its name.

        Args:
          metadata: of the header.
          seal: a key of it whose value, made of zeros, is to be replaced by the SHA-256 of the header so written.

        Raises:
          UserError: the disk is full, or the path has come to exist meanwhile.
        """
        header = render_header(self._entries, metadata).ljust(self._header_bytes)
        assert len(header) == self._header_bytes, "the header is longer than was said"
        if seal:
            digest = hashlib.sha256(header).hexdigest().encode()
            header = header.replace(metadata[seal].encode(), digest, 1)
        with refusing(self._path):
            self._file.seek(0)
            self._file.write(len(header).to_bytes(_LENGTH_BYTES, "little") + header)
            self._file.close()
            self._pending.place(replace=False)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # a full disk refuses what is buffered a second time
            self._file.close()
        self._pending.discard()


def as_bytes(array: np.ndarray) -> np.ndarray:
    """An array's bytes as (n,) uint8; bfloat16 has no buffer of its own."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def entry(dtype: np.dtype, shape: tuple[int, ...], start: int) -> dict:
    """A tensor's line in the header."""
    size = math.prod(shape) * dtype.itemsize
    return {**array_type(dtype, shape), "data_offsets": [start, start + size]}


def array_type(dtype: np.dtype, shape: tuple[int, ...]) -> dict:
    """A tensor's dtype and shape as JSON has them; the inverse of `parse_array_type`."""
    return {"dtype": _CODES[dtype], "shape": list(shape)}


def render_header(entries: Mapping[str, dict], metadata: Mapping[str, str]) -> bytes:
    """The header's JSON."""
    return json.dumps({METADATA: dict(metadata), **entries}, separators=(",", ":")).encode()
