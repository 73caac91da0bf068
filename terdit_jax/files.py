"""Files that appear whole or not at all: written under a name of their own, synced, then renamed.

Two writers of one path never share a temporary name, and what a killed writer left is removed by the next one. What the
bytes mean belongs to the callers.
"""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import json
import os
from pathlib import Path
import shutil
import tempfile
from typing import Any
import uuid

from etils import epath

from terdit_jax.errors import UserError
from terdit_jax.paths import is_remote

_SUFFIX = ".partial"
_PREFIX_CHARACTERS = 40  # of the final name that a temporary one repeats: together they must stay below 255 bytes
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EACCES)


@contextlib.contextmanager
def new_file(path: epath.PathLike, *, replace: bool = True, sync: bool = True) -> Iterator[epath.Path]:
    """A local path to write to; when the body ends its content is moved to `path`, and removed if the body raises.

    Args:
      path: where the file shall stand; folders on the way to it are made.
      replace: whether it may take the place of a file that is there, or has come to be there meanwhile.
      sync: whether it is on disk when this returns, also after a loss of power.

    Raises:
      OSError: it cannot be written; FileExistsError, without `replace`, if there is something at `path`.
    """
    path = epath.Path(path)
    if is_remote(path):
        with tempfile.TemporaryDirectory() as scratch:
            local = epath.Path(scratch) / path.name
            yield local
            _upload(local, path, replace=replace)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_orphans(Path(path))
    temporary, lock = _reserve(Path(path), folder=False)
    try:
        yield epath.Path(temporary)
        if sync:
            _sync(temporary)
        if replace:
            os.replace(temporary, path)
        else:
            _move_without_replacing(temporary, Path(path))
        if sync:
            _sync(temporary.parent)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(lock)


@contextlib.contextmanager
def new_folder(path: epath.PathLike) -> Iterator[Path]:
    """A local folder to write files into; when the body ends it is synced and renamed to `path`, as `new_file` does.

    Raises:
      OSError: it cannot be written; FileExistsError if there is something at `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_orphans(path)
    temporary, lock = _reserve(path, folder=True)
    try:
        yield temporary
        for file in (*temporary.rglob("*"), temporary):
            _sync(file)
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        try:
            os.rename(temporary, path)
        except OSError as error:  # another writer was faster by a moment
            if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
            raise
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def write_bytes(path: epath.PathLike, content: bytes, *, replace: bool = True, sync: bool = True) -> None:
    """`new_file` with this content."""
    with new_file(path, replace=replace, sync=sync) as temporary:
        temporary.write_bytes(content)


def write_text(path: epath.PathLike, content: str, *, replace: bool = True, sync: bool = True) -> None:
    """`new_file` with this content, in UTF-8 whatever the locale."""
    write_bytes(path, content.encode(), replace=replace, sync=sync)


def write_json(
    path: epath.PathLike, content: Any, *, indent: int | None = None, replace: bool = True, sync: bool = True
) -> None:
    """`new_file` with this content as JSON and a line feed."""
    write_text(path, json.dumps(content, indent=indent) + "\n", replace=replace, sync=sync)


@contextlib.contextmanager
def refusing(path: epath.PathLike, flag: str = "--output") -> Iterator[None]:
    """Makes a UserError that names `path` of an OSError within, for files that a user asked for."""
    try:
        yield
    except FileExistsError as error:
        if os.path.lexists(path) and error.filename and os.path.abspath(error.filename) == os.path.abspath(path):
            raise UserError(f"{flag}={os.fspath(path)}: exists already, name another place") from error
        # A file stands where a folder on the way should be.
        raise UserError(f"cannot write {os.fspath(path)}: Not a directory") from error
    except OSError as error:
        raise UserError(f"cannot write {os.fspath(path)}: {error.strerror or error}") from error


def refuse_existing(path: epath.PathLike, flag: str = "--output") -> None:
    """Raises UserError if there is something, a dangling link included, at a path that is to be written."""
    there = epath.Path(path).exists() if is_remote(path) else os.path.lexists(path)
    if there:
        raise UserError(f"{flag}={os.fspath(path)}: exists already, name another place")


def _reserve(path: Path, *, folder: bool) -> tuple[Path, int]:
    """A new file or folder beside `path`, and a descriptor that holds a lock on it: who holds none has died."""
    while True:
        temporary = path.with_name(f".{path.name[:_PREFIX_CHARACTERS]}.{uuid.uuid4().hex}{_SUFFIX}")
        if folder:
            temporary.mkdir()
            descriptor = os.open(temporary, os.O_RDONLY)
        else:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks: its orphans are not removed
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.exists(temporary):  # another writer may have taken it for an orphan before it was locked
            return temporary, descriptor
        os.close(descriptor)


def _remove_orphans(path: Path) -> None:
    """Removes what writers of `path` that were killed have left: temporary files and folders that nobody locks."""
    prefix = f".{path.name[:_PREFIX_CHARACTERS]}."
    try:
        names = [name for name in os.listdir(path.parent) if name.startswith(prefix) and name.endswith(_SUFFIX)]
    except OSError:
        return
    for name in names:
        orphan = path.with_name(name)
        with contextlib.suppress(OSError):
            descriptor = os.open(orphan, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if orphan.is_dir():
                    shutil.rmtree(orphan)
                else:
                    orphan.unlink()
            finally:
                os.close(descriptor)


def _move_without_replacing(temporary: Path, path: Path) -> None:
    """Renames, but never over something: a link is refused where a rename would overwrite."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(temporary, path)


def _upload(local: epath.Path, path: epath.Path, *, replace: bool) -> None:
    """Copies to an object store, where an object appears whole when its upload ends."""
    if not replace and path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    local.copy(path, overwrite=replace)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP):  # folders on some systems
            raise
    finally:
        os.close(descriptor)
