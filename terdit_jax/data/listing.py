"""Lines about files that are left out when a folder or an archive is listed: nothing is dropped in silence.

Sources decide which files are images of which class.
"""

from collections.abc import Mapping
import os

from etils import epath

from terdit_jax.errors import printable
from terdit_jax.paths import is_remote
from terdit_jax.untrusted import brief

# By these a folder of samples is told from its side files; a data set's images are told by their content instead.
IMAGE_SUFFIXES = (
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".pnm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
_LITTER = ("__macosx", ".ds_store", "thumbs.db", "desktop.ini")  # what file managers write by themselves
_NAMED = 3  # of what is left out, in a line


def is_litter(name: str) -> bool:
    """Whether a path within a source is nobody's file: of a file manager's own making, at any depth."""
    return any(part.startswith("._") or part.lower() in _LITTER for part in name.split("/"))


def is_hidden(name: str) -> bool:
    """Whether a part of a path within a source begins with a dot, or ends with ~ as editors' copies do."""
    return any(part.endswith("~") or part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def is_image_name(name: str) -> bool:
    """Whether the suffix, in any case, is one of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_dangling(path: epath.PathLike) -> bool:
    """Whether there is a link at a path that leads nowhere."""
    return not is_remote(path) and os.path.islink(path) and not os.path.exists(path)


def describe_ignored(place: epath.PathLike, ignored: Mapping[str, str]) -> str:
    """A line that counts and names what was left out: `ignored` holds names and reasons."""
    named = [f"{printable(brief(name))} ({reason})" for name, reason in list(ignored.items())[:_NAMED]]
    if more := len(ignored) - len(named):
        named.append(f"{more:,} more")
    what = "1 entry is" if len(ignored) == 1 else f"{len(ignored):,} entries are"
    return f"{os.fspath(place)}: {what} IGNORED: {', '.join(named)}"
