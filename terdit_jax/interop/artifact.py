"""The packed artifact: a safetensors file of a model at 2 bits a ternary weight, described, and checked to the byte.

docs/format.md gives it byte for byte; a tensor is verified when it is read, so that loading goes through the file once.
"""

from collections.abc import Iterable, Iterator, Mapping
import hashlib
import json
import math
import operator
import os
import zlib

import numpy as np

from terdit_jax.errors import UserError
from terdit_jax.interop.description import Description
from terdit_jax.interop.published import Layout, StateDict
from terdit_jax.interop.safetensors import (
    DTYPES,
    Container,
    array_type,
    as_bytes,
    entry,
    render_header,
    write_container,
)
from terdit_jax.interop.shapes import check_architecture
from terdit_jax.untrusted import parse_json, reading

FORMAT, VERSION = "terdit_jax", "1"
# No reader has to allocate more than this many times a tensor's stored bytes: what zlib shrinks further stays plain.
MAX_EXPANSION = 2
_ZEROS = "0" * 64
_SEAL = "header_sha256"


def is_artifact(container: Container) -> bool:
    """Whether a safetensors file claims to be ours; `open_artifact` says whether it is.

    One sign is enough: a damaged one must not make it a plain file, of which nothing is checked.
    """
    return container.metadata.get("format") == FORMAT or _SEAL in container.metadata


def write_artifact(
    path: str | os.PathLike,
    description: Description,
    layout: Layout,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    compress: bool = False,
) -> None:
    """Writes an artifact, one tensor in memory at a time; the path appears when everything is on disk.

    Args:
      path: must not exist.
      layout: what `tensors` will yield, in order.
      compress: deflates the 2-bit planes by Huffman codes, to 1.57 bits a code where a quarter of them is zero.

    Raises:
      UserError: the path exists or cannot be written.
    """
    checksums, deflated = {}, {}

    def stored_tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, array in tensors:
            stored = _deflate(array) if compress and array.dtype == np.uint8 else array
            if stored is not array:
                deflated[name] = array_type(array.dtype, array.shape)
            checksums[name] = hashlib.sha256(as_bytes(stored)).hexdigest()
            yield name, stored

    every = {name: array_type(dtype, shape) for name, (dtype, shape) in layout.items()}
    fullest = _metadata(description, dict.fromkeys(layout, _ZEROS), every if compress else {})
    room = _header_bound(layout, fullest)
    write_container(path, stored_tensors(), lambda: _metadata(description, checksums, deflated), room=room, seal=_SEAL)


def write_plain(
    path: str | os.PathLike, description: Description, layout: Layout, tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes safetensors as other software does, with the description alone added; else as `write_artifact`."""
    metadata = {"description": _dump(description.to_dict())}
    write_container(path, tensors, lambda: metadata, room=_header_bound(layout, metadata))


def open_artifact(container: Container, source: str) -> tuple[Description, StateDict]:
    """The description and the tensors of an artifact.

    Raises:
      UserError: a header that was altered, another version, a description that does not fit the tensors; on reading,
        a tensor that does not match its checksum.
    """
    metadata = container.metadata
    expected = {"format", "version", "description", "sha256", "zlib", _SEAL}
    if metadata.get("version") != VERSION:
        version = metadata.get("version", "none")[:20]
        raise UserError(f"{source}: artifact version {version!r}, this code reads {VERSION!r}")
    if metadata.keys() != expected or metadata["format"] != FORMAT:
        raise UserError(f"{source}: its metadata must hold exactly {', '.join(sorted(expected))}")
    digest = metadata[_SEAL]
    blank = container.header.replace(digest.encode(), _ZEROS.encode(), 1)
    if hashlib.sha256(blank).hexdigest() != digest:
        raise UserError(f"{source}: its header does not match its SHA-256: the file is damaged, fetch it again")
    checksums = parse_json(metadata["sha256"], f"{source}: the list of checksums", dict)
    if checksums.keys() != container.arrays.keys():
        raise UserError(f"{source}: its checksums are not those of its tensors")
    deflated = _parse_deflated(parse_json(metadata["zlib"], f"{source}: the zlib list", dict), container, source)
    layout = {name: (array.dtype, array.shape) for name, array in container.arrays.items()} | deflated

    def read(name: str) -> np.ndarray:
        stored = container.arrays[name]
        if hashlib.sha256(as_bytes(stored)).hexdigest() != checksums[name]:
            raise UserError(f"{source}: tensor {name!r} does not match its SHA-256: the file is damaged")
        return _inflate(stored, *deflated[name], f"{source}: tensor {name!r}") if name in deflated else stored

    return read_description(metadata["description"], layout, source), StateDict(layout, read)


def read_description(text: str, layout: Layout, source: str) -> Description:
    """A description from a file's metadata, checked against the tensors beside it. Raises UserError."""
    fields = parse_json(text, f"{source}: its description", dict)
    description = Description.from_dict(fields, source)
    check_architecture(description.model, layout, source)
    return description


def _metadata(description: Description, checksums: Mapping[str, str], deflated: Mapping[str, list]) -> dict[str, str]:
    return {
        _SEAL: _ZEROS,  # first: its zeros are the first in the header
        "format": FORMAT,
        "version": VERSION,
        "description": _dump(description.to_dict()),
        "sha256": _dump(checksums),
        "zlib": _dump(deflated),
    }


def _dump(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _header_bound(layout: Layout, metadata: Mapping[str, str]) -> int:
    """The header's length if every offset were as long as the last."""
    end = sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())
    entries = {name: entry(dtype, shape, 10 * end) for name, (dtype, shape) in layout.items()}
    return len(render_header(entries, metadata))


def _deflate(array: np.ndarray) -> np.ndarray:
    """A zlib stream as (n,) uint8, or the array itself where that is longer, or so short that readers would refuse."""
    # Codes do not repeat in runs, so matching finds nothing: Huffman codes alone are as small and fast.
    encoder = zlib.compressobj(9, strategy=zlib.Z_HUFFMAN_ONLY)
    stream = encoder.compress(as_bytes(array)) + encoder.flush()
    if not array.nbytes / MAX_EXPANSION <= len(stream) < array.nbytes:
        return array
    return np.frombuffer(stream, np.uint8)


def _inflate(stored: np.ndarray, dtype: np.dtype, shape: tuple[int, ...], what: str) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    decoder = zlib.decompressobj()
    try:
        content = decoder.decompress(as_bytes(stored), size + 1)  # a byte more shows that there is more
    except zlib.error as error:
        raise UserError(f"{what} does not inflate: {error}") from error
    if len(content) != size or not decoder.eof or decoder.unused_data:
        raise UserError(f"{what} does not inflate to the {size} bytes it should")
    return np.frombuffer(content, dtype).reshape(shape)


def _parse_deflated(listed: dict, container: Container, source: str) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    deflated = {}
    for name, kind in listed.items():
        what = f"{source}: deflated tensor {name[:60]!r}"
        with reading(f"{what} is not in the file, or is not described by dtype and shape"):
            stored, (code, sizes) = container.arrays[name], kind
            dtype, shape = DTYPES[code], tuple(map(operator.index, sizes))
        if stored.dtype != np.uint8 or stored.ndim != 1:
            raise UserError(f"{what} is no row of bytes")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > MAX_EXPANSION * stored.nbytes:
            raise UserError(f"{what} would expand more than {MAX_EXPANSION} times")
        deflated[name] = dtype, shape
    return deflated
