"""Files that appear whole or not at all: written under a name of their own, synced, then renamed.

Two writers of one path never share a temporary name, and what a killed writer left is removed by the next one. What the
bytes mean belongs to the callers.
"""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import itertools
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
def new_file(
    path: epath.PathLike, *, replace: bool = True, sync: bool = True, scratch: epath.PathLike | None = None
) -> Iterator[epath.Path]:
    """A local path to write to, an empty file; when the body ends it is renamed to `path`, and removed if it raises.

    Args:
      path: where the file shall stand; folders on the way are made. To an object store it is copied.
      replace: whether it may take the place of a file that is there, or has come to be there meanwhile.
      sync: whether it is on disk when the body has ended, also after a loss of power.
      scratch: the folder of the temporary file, on the same file system; that of `path` if left out.

    Raises:
      OSError: it cannot be written; FileExistsError, without `replace`, if there is something at `path`.
    """
    path = epath.Path(path)
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = epath.Path(folder) / path.name
            temporary.touch()
            yield temporary
            if not replace and path.exists():
                raise _exists(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.copy(path, overwrite=replace)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _reserved(Path(scratch or path.parent), path.name, folder=False) as temporary:
        yield temporary
        if sync:
            _sync(temporary)
        if replace:
            os.replace(temporary, path)
        else:
            _move_without_replacing(temporary, path)
        if sync:
            _sync(path.parent)


@contextlib.contextmanager
def new_folder(path: epath.PathLike) -> Iterator[epath.Path]:
    """A local folder to write files into; when the body ends it is synced and renamed to `path`, as `new_file` does.

    To an object store its files are copied one by one.

    Raises:
      OSError: it cannot be written; FileExistsError if there is something at `path`.
    """
    path = epath.Path(path)
    if is_remote(path):
        with tempfile.TemporaryDirectory() as scratch:
            yield epath.Path(scratch)
            if path.exists():
                raise _exists(path)
            path.mkdir(parents=True)
            for file in epath.Path(scratch).iterdir():
                file.copy(path / file.name)
        return
    with _reserved(Path(path.parent), path.name, folder=True) as temporary:
        yield temporary
        for file in (*Path(temporary).rglob("*"), temporary):
            _sync(file)
        if os.path.lexists(path):
            raise _exists(path)
        try:
            os.rename(temporary, path)
        except OSError as error:  # another writer was faster by a moment
            raise _exists(path) if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) else error from error
        _sync(path.parent)


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


def set_aside(path: epath.PathLike, place: epath.PathLike | None = None) -> epath.Path:
    """Moves a file or folder out of the way, under a name that is free, and returns where it is now.

    It goes into `place`, a folder. Where that cannot be (another file system, no permission), or without one, it stays
    where it is, as NAME.damaged. Raises OSError if it cannot be moved at all.
    """
    path = epath.Path(path)
    if place is not None:
        place = epath.Path(place)
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            return path.rename(_free_name(place, path.name))
        with contextlib.suppress(OSError):
            place.rmdir()  # if it is empty
    return path.rename(_free_name(path.parent, f"{path.name}.damaged"))


@contextlib.contextmanager
def refusing(path: epath.PathLike, flag: str = "--output") -> Iterator[None]:
    """Turns an OSError within into a UserError that names `path`, for files that a user asked for."""
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


def check_output(path: epath.PathLike, flag: str = "--output", *, replace: bool = False) -> None:
    """Finds out before the work whether a file can be written after it; nothing is left of the trial.

    Raises:
      UserError: something is there that is no file or, without `replace`, anything; or its folder takes no files.
    """
    if not replace:
        refuse_existing(path, flag)
    if is_remote(path):
        return
    if os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(f"{flag}={os.fspath(path)}: is no file, name another place")
    _check_takes_files(Path(os.path.abspath(path)).parent, path, flag)


def check_folder(path: epath.PathLike, flag: str) -> None:
    """Finds out before the work whether files can be written into a folder, new or there; nothing is made.

    Raises:
      UserError: something else is there, or no file can be made in it, or in the nearest folder above it.
    """
    if not is_remote(path):
        if os.path.lexists(path) and not os.path.isdir(path):
            raise UserError(f"{flag}={os.fspath(path)}: is no folder, name another place")
        _check_takes_files(Path(os.path.abspath(path)), path, flag)


def _check_takes_files(folder: Path, path: epath.PathLike, flag: str) -> None:
    """Raises UserError, naming `path`, if no file can be made in the folder, or in the nearest one above it."""
    try:
        while not folder.exists():
            folder = folder.parent
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{flag}={os.fspath(path)}: {folder} takes no files ({error.strerror or error})") from error


@contextlib.contextmanager
def _reserved(place: Path, name: str, *, folder: bool) -> Iterator[epath.Path]:
    """A new file or folder in `place` for what will be called `name`; what is left of it in the end is removed.

    It is locked: what nobody locks is left from a writer that was killed.
    """
    place.mkdir(parents=True, exist_ok=True)
    _remove_orphans(place, name)
    is_ours = False
    while not is_ours:
        temporary = epath.Path(place) / f".{name[:_PREFIX_CHARACTERS]}.{uuid.uuid4().hex}{_SUFFIX}"
        if folder:
            temporary.mkdir()
            try:
                descriptor = os.open(temporary, os.O_RDONLY)
            except FileNotFoundError:  # another writer took it for an orphan, and has removed it already
                continue
        else:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = temporary.exists()
        except OSError as error:  # a file system without locks: its orphans are not removed
            is_ours = not isinstance(error, BlockingIOError)
        if not is_ours:
            os.close(descriptor)  # another writer took it for an orphan before it was locked
    try:
        yield temporary
    finally:
        if folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        os.close(descriptor)


def _remove_orphans(place: Path, name: str) -> None:
    """Removes what killed writers of a file `name` have left in `place`."""
    prefix = f".{name[:_PREFIX_CHARACTERS]}."
    try:
        names = [entry for entry in os.listdir(place) if entry.startswith(prefix) and entry.endswith(_SUFFIX)]
    except OSError:
        return
    for entry in names:
        orphan = Path(place) / entry
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


def _move_without_replacing(temporary: epath.Path, path: epath.Path) -> None:
    """Renames, but never over something: a link is refused where a rename would overwrite."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(path):
            raise _exists(path) from None
        os.replace(temporary, path)


def _exists(path: epath.Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(path))


def _free_name(place: epath.Path, name: str) -> epath.Path:
    candidates = (place / (f"{name}.{i}" if i else name) for i in itertools.count())
    return next(path for path in candidates if not path.exists())


def _sync(path: epath.PathLike) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP):  # folders on some systems
            raise
    finally:
        os.close(descriptor)
