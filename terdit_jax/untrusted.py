"""Reading files that may be damaged or forged: JSON, arrays of an npz, and whatever a library parses for us.

Nothing here runs code that a file names. What the values mean is checked by the callers.
"""

from collections.abc import Iterable, Iterator
import contextlib
import json
import math
import os
import reprlib
from typing import IO, Any
import zipfile

import numpy as np

from terdit_jax.errors import UserError, in_a_line, printable

_MAX_DEFLATION = 1032  # times that zlib can shrink anything


@contextlib.contextmanager
def reading(refusal: str) -> Iterator[None]:
    """Turns whatever is raised within into a UserError: the refusal and, in brackets, the reason.

    Parsers of archives, arrays, images, protobufs and checkpoints raise dozens of kinds of exceptions between them, a
    failed allocation's among them: no list of them would be complete. Use it around reading alone.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{refusal} ({in_a_line(error)})") from error


def parse_json(text: bytes | str, what: str, kind: type) -> Any:
    """JSON of one kind, without duplicate keys or numbers that are none. Raises UserError, naming `what`, otherwise."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not sound JSON: {str(error)[:100]}") from error
    if not isinstance(value, kind):
        raise UserError(f"{what} is not a JSON {kind.__name__}")
    return value


def load_arrays(source: str | os.PathLike | IO[bytes], names: Iterable[str], refusal: str) -> dict[str, np.ndarray]:
    """The arrays of an npz under these names, none of them pickled.

    Raises:
      UserError: the refusal, for anything else: no npz, a damaged one, a name that it lacks, a member that is no array.
    """
    with reading(refusal), zipfile.ZipFile(source) as archive:
        return {name: _load_member(archive, name) for name in names}


def _load_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    find_array(archive, name)
    with archive.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def find_array(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether it is column-major, and dtype of an array of an npz, whose file is large enough to hold it.

    Raises:
      KeyError, ValueError: there is no such array; of another reader's errors there are many.
    """
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others decompress without a limit
        raise ValueError(f"{name} is compressed as numpy never does")
    with archive.open(info) as member:
        shape, column_major, dtype = read_array_header(member)
    size, there = math.prod(shape) * dtype.itemsize, min(info.file_size, _MAX_DEFLATION * info.compress_size)
    if min(shape, default=0) < 0 or size > there:
        raise ValueError(f"{name} has {there} bytes, its shape {str(shape)[:40]} needs {size}")
    return shape, column_major, dtype


def read_array_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether it is column-major, and dtype of an array of an npz. Raises ValueError for what is none."""
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(member)
    raise ValueError(f"array format {version}")


def short(value: object) -> str:
    """An untrusted value for a message. Lists and dicts are not looked into: they may be as good as endless."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "an enormous number"
    if value is None or isinstance(value, int | float | str):
        return repr(value[:60] if isinstance(value, str) else value)
    return f"a {type(value).__name__}"


def short_json(value: object) -> str:
    """Shortens a value of JSON as `short` does, but shows the beginning of lists and dicts."""
    return printable(reprlib.repr(value))


def difference(found: Any, wanted: Any, name: str = "") -> str | None:
    """The first entry in which untrusted JSON differs from ours, in words and by its dotted name; None without one."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted(found.keys() | wanted.keys())
        entries = (difference(found.get(key), wanted.get(key), f"{name}.{key}" if name else key) for key in keys)
        return next(filter(None, entries), None)
    if found == wanted:
        return None
    return f"{printable(name[:60])} is {short_json(found)} and not {short_json(wanted)}"


def brief(name: str) -> str:
    """A name from a file for a message: its beginning and, of a long one, its end."""
    return name if len(name) <= 80 else f"{name[:50]}...{name[-25:]}"


def is_number(value: object, low: float, high: float) -> bool:
    """Whether a value of JSON is a finite number, no truth value, with low <= value <= high."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return low <= value <= high and abs(value) < math.inf


def is_count(value: object, low: int, high: int) -> bool:
    """Whether a value of JSON is an integer with low <= value <= high."""
    return type(value) is int and low <= value <= high
