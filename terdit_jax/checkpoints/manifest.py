"""The SHA-256 manifest of a checkpoint: written last, compared before anything else is read.

Damage is content that differs from the manifest. A file that cannot be read is no damage: it may be sound.
"""

from collections.abc import Iterable
import concurrent.futures
import errno
import hashlib
import io
import json
import os
import stat
from typing import cast

from etils import epath

from terdit_jax.files import write_json
from terdit_jax.paths import is_remote

MANIFEST = "sha256.json"
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


def write_manifest(step_directory: epath.Path) -> None:
    """Records the SHA-256 of every file of a finished checkpoint in the checkpoint itself."""
    write_json(step_directory / MANIFEST, _hash_files(step_directory, list_files(step_directory)), indent=1)


def find_damage(step_directory: epath.Path, items: Iterable[str]) -> str | None:
    """Returns what is wrong with the given items of a checkpoint, or None if they are as they were written.

    Raises:
      OSError: they cannot be read, so that nothing is known about them.
    """
    prefixes = tuple(f"{item}/" for item in items)
    try:
        with open_file(step_directory / MANIFEST) as file:
            recorded = json.loads(file.read().decode())
    except FileNotFoundError:
        return "its SHA-256 manifest is missing"
    except (ValueError, RecursionError):
        return "its SHA-256 manifest is not JSON"
    if not isinstance(recorded, dict):
        return "its SHA-256 manifest is no table of files"
    recorded = {name: digest for name, digest in recorded.items() if name.startswith(prefixes)}
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in recorded):
            return f"its manifest lists nothing under {prefix}"
    if outside := [name for name in recorded if ".." in name.split("/")]:
        return f"its manifest lists {outside[0]}"
    digests = _hash_files(step_directory, recorded)
    if missing := sorted(name for name in recorded if digests[name] is None):
        return f"{missing[0]} is missing"
    changed = sorted(name for name in recorded if digests[name] != recorded[name])
    return f"{changed[0]} does not match its SHA-256" if changed else None


def list_files(directory: epath.Path) -> list[str]:
    """Returns the names, relative to the directory, of all files below it but the manifest."""
    found = []
    for entry in sorted(directory.iterdir()):
        if entry.is_dir():
            found += [f"{entry.name}/{name}" for name in list_files(entry)]
        elif entry.name != MANIFEST:
            found.append(entry.name)
    return found


def _hash_files(directory: epath.Path, names: Iterable[str]) -> dict[str, str | None]:
    """The SHA-256 of each file, None if there is no such file."""

    def digest(name: str) -> str | None:
        try:
            with open_file(directory / name) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return None

    names = list(names)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def open_file(path: epath.Path) -> io.BufferedReader:
    """Opens a file; anything else, such as a folder or a pipe, counts as missing.

    Raises:
      FileNotFoundError: there is no such file.
      OSError: it cannot be read.
    """
    try:
        if is_remote(path) or stat.S_ISREG(os.stat(path).st_mode):
            return cast(io.BufferedReader, path.open("rb"))  # etils says no more than that it is a file
    except OSError as error:
        if error.errno not in _MISSING and not isinstance(error, FileNotFoundError):
            raise
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
