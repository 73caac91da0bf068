"""What a source of pictures is, and the two plain ones: scikit-learn's digits, and a folder with a folder a class.

A source lists its pictures, splits them and decodes one at a time; archives and TFDS data sets have modules of their
own, encoding and writing belong to the builder.
"""

from collections.abc import Callable
import dataclasses
import hashlib
import math
from typing import Any, NamedTuple

from etils import epath
import numpy as np

from terdit_jax.data.crop import check_crop, decode_picture
from terdit_jax.data.image_file import PictureError
from terdit_jax.errors import UserError
from terdit_jax.paths import as_path


class Item(NamedTuple):
    """One picture of a source: its name there and the index of its class, None where only `load` can tell it."""

    source_id: str
    label: int | None


@dataclasses.dataclass(frozen=True)
class Source:
    """Pictures with classes, listed but not read.

    Each split is ordered by the SHA-256 of `source_id`, so that any stretch of it is a fair sample of the classes.
    """

    description: dict[str, Any]  # JSON values; equal for equal pictures and options
    shape: tuple[int, int, int]  # H, W, C of a picture
    class_names: tuple[str, ...]
    splits: dict[str, list[Item]]  # "train" and "heldout"
    # The picture (H, W, C), uint8 or float32 in [-1, 1], and its class; raises PictureError; many threads may call it.
    load: Callable[[Item], tuple[np.ndarray, int]]


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
    """A folder of class folders of pictures, cropped to (image_size, image_size, channels); classes sorted by name.

    Where the folder holds `train/` and `val/` (or `test/`) with class folders inside, that is the split; otherwise
    `heldout_share` (default 0.1) of the pictures is held out, spread over the classes.

    Raises:
      UserError: no such folder, no class folders, an empty one, or an option that cannot be used.
    """
    check_crop(image_size, channels)
    root = as_path(path)
    if not root.is_dir():
        raise UserError(f"--input={root}: no such folder")
    held = next((name for name in ("val", "test") if _class_folders(root / "train") and (root / name).is_dir()), None)
    class_names = _class_folders(root / "train" if held else root)
    if held:
        if heldout_share is not None:
            raise UserError(f"--heldout_share={heldout_share}: {root} brings its own held-out pictures in {held}/")
        train, train_sizes = _list_pictures(root, "train/", class_names)
        heldout, heldout_sizes = _list_pictures(root, f"{held}/", class_names)
        sizes = train_sizes | heldout_sizes
    else:
        heldout_share = 0.1 if heldout_share is None else heldout_share
        items, sizes = _list_pictures(root, "", class_names)
        train, heldout = split_heldout(items, heldout_share)
    listing = "".join(f"{source_id}\t{sizes[source_id]}\n" for source_id in sorted(sizes))
    return Source(
        description={
            "kind": "folder",
            "image_size": image_size,
            "channels": channels,
            "heldout_share": heldout_share,
            "pictures": len(sizes),
            "listing_sha256": hash_text(listing),
        },
        shape=(image_size, image_size, channels),
        class_names=class_names,
        splits={"train": hash_ordered(train), "heldout": hash_ordered(heldout)},
        load=lambda item: (_load_picture(root / item.source_id, image_size, channels), item.label),
    )


def split_heldout(items: list[Item], share: float) -> tuple[list[Item], list[Item]]:
    """Splits into (train, heldout): every 1/share-th picture of a list sorted by class and then by hash is held out.

    Raises:
      UserError: a share outside (0, 1), or one that leaves a split empty.
    """
    if not 0 < share < 1:
        raise UserError(f"--heldout_share={share}: must lie between 0 and 1")
    ranked = sorted(items, key=lambda item: (item.label, hash_text(item.source_id)))
    train, heldout = [], []
    for rank, item in enumerate(ranked):
        (heldout if math.floor((rank + 1) * share) > math.floor(rank * share) else train).append(item)
    if not train or not heldout:
        raise UserError(f"--heldout_share={share}: leaves no picture of {len(items)} for one of the splits")
    return train, heldout


def hash_ordered(items: list[Item]) -> list[Item]:
    """The order of a split: by the SHA-256 of `source_id`."""
    return sorted(items, key=lambda item: hash_text(item.source_id))


def hash_text(text: str) -> str:
    """SHA-256 of a name or a list of names, in hexadecimal. Raises UserError where a name is not UTF-8."""
    try:
        return hashlib.sha256(text.encode()).hexdigest()
    except UnicodeEncodeError as error:
        name = text[max(error.start - 40, 0) : error.end]
        raise UserError(f"{name!a}: rename it, file names must be UTF-8") from error


def _load_picture(path: epath.Path, size: int, channels: int) -> np.ndarray:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PictureError(f"cannot be read: {error.strerror or error}") from error
    return decode_picture(data, size, channels)


def _class_folders(path: epath.Path) -> tuple[str, ...]:
    if not path.is_dir():
        return ()
    return tuple(sorted(child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")))


def _list_pictures(root: epath.Path, prefix: str, class_names: tuple[str, ...]) -> tuple[list[Item], dict[str, int]]:
    """The pictures below `root/prefix`, named relative to `root`, and their sizes in bytes."""
    found = _class_folders(root / prefix)
    if not found:
        raise UserError(f"{root / prefix} holds no class folders: expected one folder of pictures a class")
    unknown = sorted(set(found) - set(class_names))
    if unknown:
        raise UserError(f"{root / prefix / unknown[0]} is a class that {root / 'train'} does not have")
    items, sizes = [], {}
    for class_name in found:
        label = class_names.index(class_name)
        files = [file for file in (root / prefix / class_name).iterdir() if not file.name.startswith(".")]
        files = [file for file in files if file.is_file()]
        if not files:
            raise UserError(f"class folder {root / prefix / class_name} holds no pictures")
        for file in files:
            source_id = f"{prefix}{class_name}/{file.name}"
            items.append(Item(source_id, label))
            sizes[source_id] = file.stat().length
    return items, sizes
