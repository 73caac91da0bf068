"""Images in tar archives, one archive a class: ImageNet's ILSVRC2012_img_train.tar as it comes, or a folder of tars.

Headers are read once to learn where each image lies; nothing is extracted. Cropping and splitting belong to `sources`.
"""

from collections.abc import Iterator
from concurrent import futures
import io
import os
import pathlib
import tarfile
from typing import NamedTuple

from etils import epath

from terdit_jax.data.crop import check_crop
from terdit_jax.data.image_file import MAX_FILE_BYTES, ImageError
from terdit_jax.data.listing import is_hidden, is_image_name, is_litter
from terdit_jax.data.sources import Item, Source, format_sizes, make_crop_source
from terdit_jax.errors import UserError
from terdit_jax.untrusted import brief

SUFFIX = ".tar"  # in any case
HELDOUT_SHARE = 0.01  # of ImageNet 12,811 images, about 13 a class
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}
COMPRESSED_SUFFIXES = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".zip")
MAX_HEADER_BYTES = 2**20  # of a long name or a pax header; longer ones are damage
MAX_NAME = 4096  # characters, as many as paths have
READERS = 16  # archives indexed at once: their headers lie far apart, so a disk or a network answers one by one


class _Headers(io.FileIO):
    """A tar of which only headers are read: one that announces gigabytes of names is refused before they are there."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


class Stretch(NamedTuple):
    """Bytes `start` to `end` of a file."""

    path: pathlib.Path
    start: int
    end: int


def make_tar_source(
    path: epath.PathLike, *, image_size: int = 256, channels: int = 3, heldout_share: float | None = None
) -> Source:
    """A tar of class tars, or a folder of them, cropped to (image_size, image_size, channels); classes sorted by name.

    A class is called like its archive without `.tar`, in any case; `heldout_share` (default 0.01) of the images is
    held out, spread over the classes. Links, devices and names that begin with a dot are ignored. Of members with one
    name the last counts, as when a tar is extracted.

    Raises:
      UserError: no such archive, a compressed, damaged or incomplete one, no classes, an empty one, images or folders
        beside the archives, or an option that cannot be used.
    """
    check_crop(image_size, channels)
    if "://" in os.fspath(path):
        raise UserError(f"--input={path}: archives are read from a local file system, copy it to one")
    root = pathlib.Path(path)
    try:
        archives, ignored = _find_archives(root)
        with futures.ThreadPoolExecutor(READERS) as pool:
            listings = list(pool.map(_list_images, archives, archives.values()))
    except OSError as error:
        raise UserError(f"--input={error.filename or root}: cannot be read ({error.strerror or error})") from error
    places = {source_id: place for listing, _ in listings for source_id, place in listing.items()}
    for _, ignored_in_class in listings:
        ignored |= ignored_in_class
    return make_crop_source(
        "tar",
        [Item(source_id, label) for label, (listing, _) in enumerate(listings) for source_id in listing],
        None,
        lambda item: (_read(places[item.source_id]), item.label),
        image_size=image_size,
        channels=channels,
        heldout_share=heldout_share,
        default_share=HELDOUT_SHARE,
        class_names=tuple(archives),
        listing=format_sizes({source_id: place.end - place.start for source_id, place in places.items()}),
        ignored=ignored,
    )


def list_members(archive: Stretch, others: dict[str, str] | None = None) -> Iterator[tuple[str, Stretch]]:
    """The regular files of a tar in its order, from its headers alone: names and where their contents lie.

    What is neither a file nor a folder is noted in `others`, by name, with what it is. `tarfile` takes a damaged header
    for the end, so the archive must end in a block of zeros.

    Raises:
      UserError: a compressed, damaged or incomplete archive; names the byte.
    """
    with _Headers(archive.path) as file:
        _refuse_compressed(archive, os.pread(file.fileno(), 8, archive.start))
        file.seek(archive.start)
        position = archive.start
        try:
            with tarfile.TarFile(fileobj=file) as tar:
                for member in tar:
                    position, name = member.offset, member.name
                    end = member.offset_data + (member.size if member.isreg() else 0)
                    if end > archive.end:
                        left = archive.end - member.offset_data
                        raise _damage(archive, position, f"{member.size} bytes announced, {left} left")
                    if member.issparse():
                        raise _damage(archive, position, "a sparse file, which cannot be read in place")
                    if len(name) > MAX_NAME:
                        raise _damage(archive, position, f"a name of {len(name)} characters")
                    if member.isreg():
                        yield name, Stretch(archive.path, member.offset_data, end)
                    elif not member.isdir() and others is not None:
                        others[name] = "a link" if member.issym() or member.islnk() else "no regular file"
                position = tar.offset
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise _damage(archive, position, str(error)) from error
        last = os.pread(file.fileno(), max(min(tarfile.BLOCKSIZE, archive.end - position), 0), position)
        if len(last) < tarfile.BLOCKSIZE:
            raise _damage(archive, position, "the archive ends without its closing block")
        if last.strip(b"\0"):
            raise _damage(archive, position, "no tar header")


def _find_archives(root: pathlib.Path) -> tuple[dict[str, Stretch], dict[str, str]]:
    """The archives of the classes by name of class, sorted, and what lies beside them and is ignored."""
    ignored: dict[str, str] = {}
    if root.is_dir():
        found = _list_directory(root, ignored)
    elif root.is_file():
        found = list(list_members(Stretch(root, 0, root.stat().st_size), ignored))
    else:
        raise UserError(f"--input={root}: no such archive or folder")
    archives: dict[str, Stretch] = {}
    for name, stretch in found:
        base = name.rpartition("/")[2]
        class_name, suffix = base[: -len(SUFFIX)], base[-len(SUFFIX) :]
        if is_litter(name):
            continue
        if is_hidden(name):
            ignored[name] = "hidden"
        elif suffix.lower() != SUFFIX:
            ignored[name] = "no .tar"
        elif class_name in archives:
            raise UserError(f"--input={root}: holds two archives {brief(base)}, a class has one")
        else:
            archives[class_name] = stretch
    if not archives:
        raise UserError(f"--input={root}: holds no .tar files, expected an uncompressed tar a class inside")
    for name in ignored:
        _refuse_class(root, name)
    return dict(sorted(archives.items())), ignored


def _list_directory(root: pathlib.Path, others: dict[str, str]) -> list[tuple[str, Stretch]]:
    """The files of a folder, as `list_members` gives them; folders are noted too."""
    found = []
    for file in sorted(root.iterdir()):
        if file.is_file():
            found.append((file.name, Stretch(file, 0, file.stat().st_size)))
        elif not is_litter(file.name):
            others[f"{file.name}/" if file.is_dir() else file.name] = "no regular file"
    return found


def _refuse_class(root: pathlib.Path, name: str) -> None:
    """Raises UserError if what would be ignored beside the archives is likely to be a class or a part of one."""
    lower = name.lower()
    if is_hidden(name):
        return
    if is_image_name(name) or lower.endswith("/"):
        raise UserError(
            f"--input={root}: {brief(name)} lies beside class archives: pack each class into a .tar or move it away"
        )
    if lower.endswith((SUFFIX, *COMPRESSED_SUFFIXES)):
        raise UserError(
            f"--input={root}: {brief(name)} is no plain .tar as the other classes are: replace it, or move it away"
        )


def _list_images(class_name: str, archive: Stretch) -> tuple[dict[str, Stretch], dict[str, str]]:
    """The images of a class by source_id, and what of its archive is ignored."""
    images: dict[str, Stretch] = {}
    others: dict[str, str] = {}
    for name, place in list_members(archive, others):
        if is_litter(name):
            continue
        if is_hidden(name):
            others[name] = "hidden"
        else:
            images[f"{class_name}/{name.removeprefix('./').removeprefix(f'{class_name}/')}"] = place
    if not images:
        raise UserError(f"--input={archive.path}: the archive of class {brief(class_name)} holds no images")
    return images, {f"{class_name}{SUFFIX}/{name}": why for name, why in others.items() if not is_litter(name)}


def _read(place: Stretch) -> bytes:
    """The bytes of an image. Opened anew each time, so that any number of threads and archives do."""
    if place.end - place.start > MAX_FILE_BYTES:
        raise ImageError(f"has {place.end - place.start:,} bytes, too many for an image")
    try:
        with open(place.path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), place.end - place.start, place.start)
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error
    if len(data) < place.end - place.start:
        raise ImageError(f"cannot be read: {place.path} has become shorter")
    return data


def _refuse_compressed(archive: Stretch, start: bytes) -> None:
    for magic, name in COMPRESSED.items():
        if start.startswith(magic):
            inside = f" (the archive at byte {archive.start})" if archive.start else ""
            raise UserError(f"--input={archive.path}{inside}: is compressed with {name}, decompress it first")


def _damage(archive: Stretch, position: int, why: str) -> UserError:
    return UserError(f"--input={archive.path}: damaged at byte {position} ({why}), fetch it again")
