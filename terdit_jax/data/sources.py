"""Sources of images: their definition, scikit-learn's digits, and a folder with a folder a class.

A source lists its images, splits them and decodes one at a time. Archives and TFDS data sets have modules of their own;
encoding and writing belong to the builder.
"""

from collections.abc import Callable, Mapping
import dataclasses
import hashlib
import math
import pathlib
from typing import Any, NamedTuple, TypeAlias

from etils import epath
import numpy as np

from terdit_jax.data.crop import check_crop, decode_crop
from terdit_jax.data.image_file import read_file
from terdit_jax.data.listing import is_dangling, is_hidden, is_litter
from terdit_jax.errors import UserError
from terdit_jax.paths import as_path, is_remote

AnyPath: TypeAlias = pathlib.Path | epath.Path
UNLABELLED = -1


class Item(NamedTuple):
    """One image of a source: its name there and the index of its class, UNLABELLED where only `load` can tell it."""

    source_id: str
    label: int


@dataclasses.dataclass(frozen=True)
class Source:
    """Images with classes, listed but not read.

    Each split is ordered by the SHA-256 of `source_id`, so that any stretch of it is a fair sample of the classes.
    """

    description: dict[str, Any]  # JSON values; equal for equal images and options
    shape: tuple[int, int, int]  # H, W, C of an image
    class_names: tuple[str, ...]
    splits: dict[str, list[Item]]  # "train" and "heldout"
    # The image (H, W, C), uint8 or float32 in [-1, 1], and its class; raises ImageError; many threads may call it.
    load: Callable[[Item], tuple[np.ndarray, int]]
    # Names of what lies among the images and is none of them, with the reason; never a class. `build` says it.
    ignored: dict[str, str] = dataclasses.field(default_factory=dict)


def make_digits_source(heldout_share: float | None = None) -> Source:
    """The 1,797 handwritten digits of scikit-learn: 8x8, grey, 17 levels scaled to [-1, 1]; a fifth held out.

    Raises:
      UserError: a share outside (0, 1).
    """
    from sklearn import datasets  # a second of import time that only this source pays

    share = 0.2 if heldout_share is None else heldout_share
    digits = datasets.load_digits()
    items = [Item(f"digits-{index:04d}", int(label)) for index, label in enumerate(digits.target)]
    train, heldout = split_heldout(items, share)

    def load(item: Item) -> tuple[np.ndarray, int]:
        pixels = digits.images[int(item.source_id.removeprefix("digits-"))]
        return (pixels[..., None] / 8 - 1).astype(np.float32), item.label

    return Source(
        description={"kind": "digits", "heldout_share": share},
        shape=(8, 8, 1),
        class_names=tuple(str(name) for name in digits.target_names),
        splits={"train": hash_ordered(train), "heldout": hash_ordered(heldout)},
        load=load,
    )


def make_folder_source(
    path: epath.PathLike, *, image_size: int = 32, channels: int = 3, heldout_share: float | None = None
) -> Source:
    """A folder of class folders of images, cropped to (image_size, image_size, channels); classes sorted by name.

    Where the folder holds `train/` and `val/` (or `test/`) with class folders inside, that is the split; otherwise
    `heldout_share` (default 0.1) of the images is held out, spread over the classes. What lies beside the class
    folders, and hidden files, are ignored. Links to nothing are images that cannot be read.

    Raises:
      UserError: no such folder, no class folders, an empty one, one with a folder inside, a link to nothing among them,
        or an option that cannot be used.
    """
    check_crop(image_size, channels)
    root = as_path(path)
    if not root.is_dir():
        raise UserError(f"--input={root}: no such folder")
    if not is_remote(root):
        root = pathlib.Path(root)  # epath takes a pipe for a file, and leaves out names that end with ~
    listing = _FolderListing(root)
    try:
        held = listing.read()
    except OSError as error:
        raise UserError(f"--input={error.filename or root}: cannot be read ({error.strerror or error})") from error
    return make_crop_source(
        "folder",
        listing.items["train/" if held else ""],
        listing.items[f"{held}/"] if held else None,
        lambda item: (read_file(root / item.source_id), item.label),
        image_size=image_size,
        channels=channels,
        heldout_share=heldout_share,
        class_names=listing.class_names,
        listing=format_sizes(listing.sizes),
        ignored=listing.ignored,
    )


def make_crop_source(
    kind: str,
    train: list[Item],
    heldout: list[Item] | None,
    read: Callable[[Item], tuple[bytes, int]],
    *,
    image_size: int,
    channels: int,
    heldout_share: float | None,
    default_share: float = 0.1,
    class_names: tuple[str, ...],
    listing: str,
    ignored: dict[str, str],
    **facts: str,
) -> Source:
    """A source of image files, cropped at their centres; without `heldout` a share of `train` is held out.

    `read` gives a file's content and class, or raises ImageError. `listing` is a text that changes with the files;
    `facts` are added to the description.

    Raises:
      UserError: a share that leaves a split empty, or that is asked for beside `heldout`.
    """
    if heldout is None:
        heldout_share = default_share if heldout_share is None else heldout_share
        train, heldout = split_heldout(train, heldout_share)
    elif heldout_share is not None:
        raise UserError(f"--heldout_share={heldout_share}: the {kind} brings its own held-out images, leave it out")

    def load(item: Item) -> tuple[np.ndarray, int]:
        data, label = read(item)
        return decode_crop(data, image_size, channels), label

    description = {
        "kind": kind, "image_size": image_size, "channels": channels, "heldout_share": heldout_share, **facts,
        "pictures": len(train) + len(heldout), "listing_sha256": hash_text(listing),
    }  # fmt: skip
    splits = {"train": hash_ordered(train), "heldout": hash_ordered(heldout)}
    return Source(description, (image_size, image_size, channels), class_names, splits, load, ignored)


def split_heldout(items: list[Item], share: float) -> tuple[list[Item], list[Item]]:
    """Splits into (train, heldout): every 1/share-th image of a list sorted by class and then by hash is held out.

    Raises:
      UserError: a share outside (0, 1), or one that leaves a split empty.
    """
    if not 0 < share < 1:
        raise UserError(f"--heldout_share={share}: must lie between 0 and 1")
    ranked = sorted(items, key=lambda item: (item.label, hash_text(item.source_id)))
    is_heldout = [math.floor((rank + 1) * share) > math.floor(rank * share) for rank in range(len(ranked))]
    train = [item for item, held in zip(ranked, is_heldout, strict=True) if not held]
    heldout = [item for item, held in zip(ranked, is_heldout, strict=True) if held]
    if not train or not heldout:
        raise UserError(f"--heldout_share={share}: leaves no image of {len(items)} for one of the splits")
    return train, heldout


def hash_ordered(items: list[Item]) -> list[Item]:
    """The order of a split: by the SHA-256 of `source_id`."""
    return sorted(items, key=lambda item: hash_text(item.source_id))


def format_sizes(sizes: Mapping[str, int]) -> str:
    """A line for each file, in the order of their names: its name and its bytes."""
    return "".join(f"{source_id}\t{size}\n" for source_id, size in sorted(sizes.items()))


def hash_text(text: str) -> str:
    """SHA-256 of a name or a list of names, in hexadecimal. Raises UserError where a name is not UTF-8."""
    try:
        return hashlib.sha256(text.encode()).hexdigest()
    except UnicodeEncodeError as error:
        name = text[max(error.start - 40, 0) : error.end]
        raise UserError(f"{name!a}: rename it, file names must be UTF-8") from error


class _FolderListing:
    """The images of a folder of class folders, by split; a split's key is the path to it, `train/`, or nothing."""

    def __init__(self, root: AnyPath):
        self.root = root
        self.class_names: tuple[str, ...] = ()
        self.items: dict[str, list[Item]] = {}
        self.sizes: dict[str, int] = {}  # in bytes, by source_id
        self.ignored: dict[str, str] = {}

    def read(self) -> str | None:
        """Lists everything; returns the name of the folder that is held out, if there is one."""
        train = _class_folders(self.root / "train")
        held = next((name for name in ("val", "test") if train and (self.root / name).is_dir()), None)
        if held:
            self._ignore("", f"beside train/ and {held}/", kept=("train", held))
        self.class_names = train if held else _class_folders(self.root)
        for prefix in ("train/", f"{held}/") if held else ("",):
            self._list_split(prefix)
        return held

    def _list_split(self, prefix: str) -> None:
        folder = self.root / prefix
        found = _class_folders(folder)
        if not found:
            raise UserError(f"{folder} holds no class folders: expected one folder of images a class")
        unknown = sorted(set(found) - set(self.class_names))
        if unknown:
            raise UserError(f"{folder / unknown[0]} is a class that {self.root / 'train'} does not have")
        self._ignore(prefix, "beside the class folders", kept=found)
        self.items[prefix] = []
        for class_name in found:
            self._list_class(prefix, class_name)

    def _list_class(self, prefix: str, class_name: str) -> None:
        folder, label, before = self.root / prefix / class_name, self.class_names.index(class_name), len(self.sizes)
        for file in folder.iterdir():
            source_id = f"{prefix}{class_name}/{file.name}"
            if is_litter(file.name):
                continue
            if is_hidden(file.name):
                self.ignored[source_id] = "hidden"
            elif (is_file := file.is_file()) or is_dangling(file):  # the latter fails when it is loaded, by name
                self.items[prefix].append(Item(source_id, label))
                self.sizes[source_id] = _size(file) if is_file else 0
            elif file.is_dir():
                raise UserError(
                    f"{file} is a folder within a class folder: a class's images lie directly in its folder, so move "
                    "them there or away; a folder of splits calls them train/ and val/ or test/"
                )
            else:
                self.ignored[source_id] = "no regular file"
        if len(self.sizes) == before:
            raise UserError(f"class folder {folder} holds no images")

    def _ignore(self, prefix: str, reason: str, kept: tuple[str, ...]) -> None:
        """Notes all entries of a folder but those kept; a link to nothing may have been a class, and is refused."""
        for entry in sorted((self.root / prefix).iterdir()):
            if entry.name in kept or is_litter(entry.name):
                continue
            if is_dangling(entry):
                raise UserError(f"{entry} is a link to nothing, perhaps to a class: mend it or remove it")
            self.ignored[f"{prefix}{entry.name}"] = "hidden" if is_hidden(entry.name) else reason


def _size(file: AnyPath) -> int:
    return file.stat().st_size if isinstance(file, pathlib.Path) else file.stat().length


def _class_folders(path: AnyPath) -> tuple[str, ...]:
    if not path.is_dir():
        return ()
    return tuple(
        sorted(
            child.name
            for child in path.iterdir()
            if not is_hidden(child.name) and not is_litter(child.name) and child.is_dir()
        )
    )
