"""Paths as people write them: relative, with `~`, or as the address of an object store.

Every flag, field and argument that names a place passes through `as_path`; `files` writes there.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

from absl import flags
from etils import epath

from terdit_jax.errors import UserError

flags.disclaim_key_flags()  # those of `define_path` belong to the command that defines them, and to its --helpshort

MAX_NAME_BYTES = 255  # of one component, on every file system that we know of
MAX_PATH_BYTES = 4095
# URL schemes that etils.epath opens through fsspec, the package each needs, and our extra that installs it.
_SCHEMES = {"gs": ("gcsfs", "terdit-jax[gcs]"), "s3": ("s3fs", "s3fs"), "az": ("adlfs", "adlfs")}


def as_path(value: epath.PathLike, name: str = "path") -> epath.Path:
    """The place that a user named, with `~` expanded; relative paths and object-store addresses stay as they are.

    Args:
      value: a local path or SCHEME://... address.
      name: what to call it in an error, such as "--output".

    Raises:
      UserError: an unknown URL scheme, one whose package is not installed, an unknown `~user`, or a path that no file
        system takes.
    """
    text = os.fspath(value)
    scheme, separator, rest = text.partition("://")
    if separator:
        _check_scheme(text, scheme, rest, name)
        return epath.Path(text)
    _check_local(text, name)
    if not text.startswith("~"):
        return epath.Path(text)
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise UserError(
            f"{name}={text}: there is no home directory {text.split('/')[0]}; write ./{text} for a folder so named"
        )
    return epath.Path(expanded)


def local_path(value: epath.PathLike, name: str = "path") -> Path:
    """A place on a file system; else as `as_path`. Raises UserError also for the address of an object store."""
    path = as_path(value, name)
    if is_remote(path):
        raise UserError(f"{name}={os.fspath(path)}: cannot be read from an object store; copy it to this machine first")
    return Path(path)


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is the address of an object store."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The same place, independent of the current directory: Orbax takes no other; links are not followed."""
    return epath.Path(path) if is_remote(path) else epath.Path(os.path.abspath(path))


def define_path(name: str, default: str | None, help: str, **options: Any) -> flags.FlagHolder[str | None]:
    """A flag that names a place; its value is a string that `as_path` has been through."""
    return flags.DEFINE(_PathParser(name), name, default, help, serializer=flags.ArgumentSerializer(), **options)


class _PathParser(flags.ArgumentParser):
    syntactic_help = "a path or an object-store address"

    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def parse(self, argument: str) -> str:
        if not argument.strip():
            raise UserError(f"--{self._name}={argument}: is empty, give a path or leave it out")
        return os.fspath(as_path(argument, f"--{self._name}"))

    def flag_type(self) -> str:
        return "path"


def _check_scheme(text: str, scheme: str, rest: str, name: str) -> None:
    if scheme not in _SCHEMES:
        known = ", ".join(f"{known}://" for known in _SCHEMES)
        raise UserError(f"{name}={text}: {scheme}:// is not supported; give a local path or one of {known}")
    package, extra = _SCHEMES[scheme]
    if not rest.strip("/"):
        raise UserError(f"{name}={text}: names no bucket; write {scheme}://BUCKET/PATH")
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{name}={text}: {scheme}:// needs the package {package}, which is not installed: pip install '{extra}'"
        )


def _check_local(text: str, name: str) -> None:
    encoded = os.fsencode(text)
    if b"\0" in encoded:
        raise UserError(f"{name}={text!r}: a path cannot hold a null character")
    if len(encoded) > MAX_PATH_BYTES or any(len(part) > MAX_NAME_BYTES for part in encoded.split(b"/")):
        shown = text if len(text) <= 60 else f"{text[:40]}...{text[-15:]}"
        raise UserError(
            f"{name}={shown}: too long, a path has at most {MAX_PATH_BYTES} bytes and each name in it {MAX_NAME_BYTES}"
        )
