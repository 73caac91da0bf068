"""Images to be judged, as uint8 in portions and in order: from an npz, a folder of files, or a prepared data set.

A set larger than memory passes through portion by portion. What is computed of it belongs to others.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import math
import os
from pathlib import Path
from typing import IO
import zipfile

from absl import logging
from etils import epath
import numpy as np

from terdit_jax.data.image_file import ImageError, decode_image, read_file
from terdit_jax.data.listing import IMAGE_SUFFIXES, describe_ignored, is_hidden, is_image_name, is_litter
from terdit_jax.data.reader import open_dataset
from terdit_jax.data.schema import METADATA_FILE
from terdit_jax.errors import UserError
from terdit_jax.inference.images import in_color, to_uint8
from terdit_jax.paths import as_path
from terdit_jax.untrusted import find_array, read_array_header, reading

ARRAY = "arr_0"
_SIDE_FILES = ("settings.json", "labels.json")  # that `sample` writes beside its images
_SIDE_ARRAYS = ("labels", "mu", "sigma", "mu_s", "sigma_s")  # that samples and references have beside their images
_READ_AT_ONCE = 256  # records of a data set, and what is skipped of an array
_THREADS = 16  # that decode files


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """A set of images in a fixed order. Attributes:

    name: where it is, for messages.
    count: images.
    shape: (H, W, 3) of each.
    stream: called with the first image, one past the last and a size: yields (n, H, W, 3) uint8, n that size or, at
      the end, less.
    """

    name: str
    count: int
    shape: tuple[int, int, int]
    stream: Callable[[int, int, int], Iterator[np.ndarray]]

    def take(self, indices: np.ndarray) -> np.ndarray:
        """The images at sorted `indices` (N,), in one pass over all."""
        taken, first = [], 0
        for portion in self.stream(0, self.count, _READ_AT_ONCE):
            taken.append(portion[indices[(indices >= first) & (indices < first + len(portion))] - first])
            first += len(portion)
        return np.concatenate(taken)


def open_images(path: str | os.PathLike) -> ImageSource:
    """The images at a path: `arr_0` of an .npz, a prepared data set's training split, or a folder of image files.

    A folder may hold its images in folders of its own, such as one a class. What is ignored is named loudly.

    Raises:
      UserError: nothing there, values that are not uint8, another shape than (N, H, W, 3), images of several sizes, a
        damaged file, a folder with images beside folders of images, or a data set of latents.
    """
    place = as_path(path)
    if (place / METADATA_FILE).exists():
        return _open_dataset(place)
    if place.is_dir():
        return _open_folder(Path(place))
    if not place.exists():
        raise UserError(f"{place} does not exist: give an .npz with {ARRAY}, a folder of images, or a data set")
    return _open_npz(Path(place))


def _open_npz(path: Path) -> ImageSource:
    with reading(f"{path}: not an npz with images in {ARRAY}"):
        with zipfile.ZipFile(path) as archive:
            shape, column_major, dtype = find_array(archive, ARRAY)
            names = [name.removesuffix(".npy") for name in archive.namelist()]
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3) or 0 in shape:
        raise UserError(
            f"{path}: {ARRAY} is {str(dtype)[:60]} {str(shape)[:60]}, expected uint8 (N, H, W, 3) with values from 0 to"
            " 255: images in [-1, 1] become that as round((x + 1) * 127.5)"
        )
    if ignored := {name: f"not {ARRAY}" for name in names if name not in (ARRAY, *_SIDE_ARRAYS)}:
        logging.warning("%s", describe_ignored(path, ignored))
    read = _read_column_major if column_major else _read_rows

    def stream(first: int, stop: int, size: int) -> Iterator[np.ndarray]:
        with reading(f"{path}: {ARRAY} is damaged"):
            with zipfile.ZipFile(path) as archive, archive.open(f"{ARRAY}.npy") as member:
                read_array_header(member)
                for images in read(member, shape, first, stop, size):
                    yield in_color(images)

    return ImageSource(str(path), shape[0], (*shape[1:3], 3), stream)


def _read_rows(
    member: IO[bytes], shape: tuple[int, ...], first: int, stop: int, size: int
) -> Iterator[np.ndarray]:  # n, H, W, C
    """Portions of an array as it lies in a file, one image after another."""
    row = math.prod(shape[1:])
    for start in range(0, first, _READ_AT_ONCE):
        _read_exactly(member, row * min(_READ_AT_ONCE, first - start))
    for start in range(first, stop, size):
        count = min(size, stop - start)
        yield np.frombuffer(_read_exactly(member, row * count), np.uint8).reshape(count, *shape[1:])


def _read_column_major(
    member: IO[bytes], shape: tuple[int, ...], first: int, stop: int, size: int
) -> Iterator[np.ndarray]:  # n, H, W, C
    """The same where the pixels of one place lie together in the file: all that is asked for is held in memory."""
    places, chosen = math.prod(shape[1:]), np.empty((*shape[:0:-1], stop - first), np.uint8)  # C, W, H, n
    for place in chosen.reshape(places, -1):
        place[:] = np.frombuffer(_read_exactly(member, shape[0]), np.uint8)[first:stop]
    for start in range(0, stop - first, size):
        yield np.ascontiguousarray(chosen[..., start : start + size].T)


def _read_exactly(member: IO[bytes], size: int) -> bytes:
    content = member.read(size)
    if len(content) != size:
        raise EOFError("it ends too early")
    return content


def _open_folder(path: Path) -> ImageSource:
    files = _list_images(path)
    shape = _read_image(files[0]).shape

    def stream(first: int, stop: int, size: int) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(_THREADS) as pool:
            for start in range(first, stop, size):
                part = files[start : min(start + size, stop)]
                images = list(pool.map(_read_image, part))
                for file, image in zip(part, images, strict=True):
                    if image.shape != shape:
                        raise UserError(f"{file} is {image.shape[:2]} (height, width), others are {shape[:2]}")
                yield np.stack(images)

    return ImageSource(str(path), len(files), shape, stream)


def _list_images(path: Path) -> list[Path]:
    """The image files of a folder, or of the folders in it, in the order of their names; names loudly what is ignored.

    Raises:
      UserError: none, or images at several depths, of which only one can be meant.
    """
    files: list[Path] = []
    ignored: dict[str, str] = {}
    for folder, subfolders, names in os.walk(path, followlinks=True, onerror=_refuse_unreadable):
        _refuse_loop(path, Path(folder))
        subfolders.sort()
        for name in sorted(names):
            relative = os.path.relpath(os.path.join(folder, name), path)
            if is_litter(relative) or relative in _SIDE_FILES:
                continue
            if is_image_name(name) and not is_hidden(relative):
                files.append(path / relative)
            else:
                ignored[relative] = "hidden" if is_hidden(relative) else "no image by its suffix"
    if not files:
        raise UserError(f"{path} holds no {', '.join(IMAGE_SUFFIXES)}, and is no prepared data set")
    by_depth = {len(file.parts): file for file in files}
    if len(by_depth) > 1:
        first, second, *_ = (by_depth[depth].relative_to(path) for depth in sorted(by_depth))
        raise UserError(
            f"{path} holds {first} and, a folder deeper, {second}: name the folder with the images that count"
        )
    if ignored:
        logging.warning("%s", describe_ignored(path, ignored))
    return sorted(files)


def _refuse_loop(path: Path, folder: Path) -> None:
    above = (os.path.realpath(path / parent) for parent in folder.relative_to(path).parents)
    if os.path.realpath(folder) in above:
        raise UserError(f"{folder} is a link to a folder above it: name the folder with the images that count")


def _refuse_unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read ({error.strerror})") from error


def _read_image(file: Path) -> np.ndarray:
    try:
        return np.asarray(decode_image(read_file(file), channels=3))
    except ImageError as error:
        raise UserError(f"{file} is no image that can be read ({error})") from error


def _open_dataset(path: epath.Path) -> ImageSource:
    dataset = open_dataset(path)
    if dataset.metadata.codec != "none":
        raise UserError(f"{path} holds latents ({dataset.metadata.codec}): give images, which a reference is made of")
    records, (height, width, _) = dataset.records("train"), dataset.metadata.shape

    def stream(first: int, stop: int, size: int) -> Iterator[np.ndarray]:
        for start in range(first, stop, size):
            batch = records.read(np.arange(start, min(start + size, stop)))
            yield in_color(to_uint8(batch["mean"].astype(np.float32)))

    return ImageSource(str(path), len(records), (height, width, 3), stream)
