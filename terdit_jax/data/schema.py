"""The record of a prepared data set, its metadata file `latents.json`, and the fingerprint of both.

What fills the records is the builder's affair and how they become batches the reader's.
"""

import dataclasses
import hashlib
import json
import os
from typing import Any

from etils import epath
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from terdit_jax.errors import UserError

SCHEMA_VERSION = 1
NAME = "latents"
METADATA_FILE = f"{NAME}.json"
UNFINISHED_FOLDER = ".unfinished"
SPLITS = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file: its name inside the data set, its records, its size in bytes, its SHA-256 in hex."""

    file: str
    records: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Split:
    """The records of one split, in the order of its shards."""

    records: int
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Metadata:
    """Everything that `latents.json` says about a data set.

    Records hold unscaled latents; training multiplies them by `latent_scale`. Channel statistics are those of an
    unscaled draw from the training split's posteriors: its mean, and the root of the variance of `mean` plus the
    average of `std` squared.
    """

    schema_version: int
    source: dict[str, Any]  # what was prepared and with which options: equal sources give equal data sets
    codec: str  # "none" where records are the pictures themselves, in [-1, 1]
    latent_scale: float
    shape: tuple[int, int, int]  # H, W, C
    num_classes: int
    class_names: tuple[str, ...]
    has_mirror: bool  # records also hold the latent of the mirrored picture
    splits: dict[str, Split]
    channel_mean: tuple[float, ...]  # C
    channel_std: tuple[float, ...]  # C
    fingerprint: str = ""


def array_names(has_mirror: bool) -> tuple[str, ...]:
    """The fields of a record that hold (H, W, C) float16 arrays."""
    return ("mean", "std", "mean_mirror", "std_mirror") if has_mirror else ("mean", "std")


def make_features(shape: tuple[int, int, int], has_mirror: bool) -> tfds.features.FeaturesDict:
    """The record as TFDS describes it: float16 arrays of `shape` (H, W, C), an int64 label and the picture's name.

    A latent of a mirrored picture is not the mirrored latent, hence the second pair of arrays; where records are
    pictures, mirroring the array is exact and the pair is left out.
    """
    arrays = {
        name: tfds.features.Tensor(shape=shape, dtype=np.float16, encoding="bytes") for name in array_names(has_mirror)
    }
    return tfds.features.FeaturesDict(
        {**arrays, "label": tfds.features.Scalar(np.int64), "source_id": tfds.features.Text()}
    )


def encode_record(features: tfds.features.FeaturesDict, record: dict[str, Any]) -> bytes:
    """The record as `tf.train.Example` bytes, the same in every process."""
    # TFDS writes the fields in hash order, which changes from one process to the next; this writes them sorted.
    example = tf_example_pb2.Example.FromString(features.serialize_example(record))
    return example.SerializeToString(deterministic=True)


def compute_fingerprint(metadata: Metadata) -> str:
    """SHA-256 in hex over what determines the training stream: record layout, scale, classes, and every shard."""
    determining = {
        "schema_version": metadata.schema_version,
        "codec": metadata.codec,
        "latent_scale": metadata.latent_scale,
        "shape": metadata.shape,
        "num_classes": metadata.num_classes,
        "has_mirror": metadata.has_mirror,
        "splits": {name: dataclasses.asdict(split) for name, split in metadata.splits.items()},
    }
    return hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()


def write_metadata(path: epath.PathLike, metadata: Metadata) -> None:
    """Writes `latents.json` into the directory `path`."""
    text = json.dumps(dataclasses.asdict(metadata), indent=2, ensure_ascii=False)
    (epath.Path(path) / METADATA_FILE).write_text(text + "\n")


def read_metadata(path: epath.PathLike) -> Metadata:
    """Reads `latents.json` and checks that every shard is there with its recorded size; contents are `verify`'s.

    Raises:
      UserError: no data set there, metadata that is damaged or of another version, a shard missing or cut short.
    """
    if not os.fspath(path):
        raise UserError(f"no data set is named: {_how_to_prepare('data/digits')}")
    path = epath.Path(path)
    if not path.is_dir():
        raise UserError(f"no data set at {path}: {_how_to_prepare(path)}")
    if not (path / METADATA_FILE).exists():
        if (path / UNFINISHED_FOLDER).exists():
            raise UserError(f"the data set at {path} is not finished: run the command that prepares it again")
        raise UserError(f"{path} holds no {METADATA_FILE}, so it is not a prepared data set: {_how_to_prepare(path)}")
    try:
        raw = json.loads((path / METADATA_FILE).read_text())
        version = raw["schema_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path / METADATA_FILE} is damaged ({error}): prepare the data set again") from error
    if version != SCHEMA_VERSION:
        raise UserError(f"{path} has schema version {version!r}, this code reads {SCHEMA_VERSION}: prepare it again")
    try:
        metadata = _parse(raw)
        fingerprint = compute_fingerprint(metadata)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path / METADATA_FILE} is damaged ({error!r}): prepare the data set again") from error
    if fingerprint != metadata.fingerprint:
        raise UserError(f"{path / METADATA_FILE} does not match its own fingerprint: prepare the data set again")
    _check_files(path, metadata)
    return metadata


def verify(path: epath.PathLike) -> Metadata:
    """Reads every shard and compares its SHA-256 with the recorded one, after the checks of `read_metadata`.

    Raises:
      UserError: as `read_metadata`, or a shard whose content changed.
    """
    metadata = read_metadata(path)
    for split in metadata.splits.values():
        for shard in split.shards:
            if hash_file(epath.Path(path) / shard.file) != shard.sha256:
                raise UserError(f"{epath.Path(path) / shard.file} has changed since it was prepared: prepare it again")
    return metadata


def hash_file(path: epath.Path) -> str:
    """SHA-256 of the file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(raw: dict[str, Any]) -> Metadata:
    splits = {
        name: Split(raw["splits"][name]["records"], tuple(Shard(**shard) for shard in raw["splits"][name]["shards"]))
        for name in SPLITS
    }
    for name, split in splits.items():
        if split.records != sum(shard.records for shard in split.shards):
            raise ValueError(f"the shards of {name} do not hold {split.records} records")
    height, width, channels = raw["shape"]
    metadata = Metadata(
        **{
            **raw,
            "splits": splits,
            "shape": (height, width, channels),
            "class_names": tuple(raw["class_names"]),
            "channel_mean": tuple(raw["channel_mean"]),
            "channel_std": tuple(raw["channel_std"]),
        }
    )
    if len(metadata.class_names) != metadata.num_classes:
        raise ValueError(f"{len(metadata.class_names)} class names for {metadata.num_classes} classes")
    return metadata


def _check_files(path: epath.Path, metadata: Metadata) -> None:
    for name in ("dataset_info.json", "features.json"):
        if not (path / name).exists():
            raise UserError(f"{path / name} is missing: prepare the data set again")
    for split in metadata.splits.values():
        for shard in split.shards:
            file = path / shard.file
            if not file.exists():
                raise UserError(f"{file} is missing: copy it again or prepare the data set again")
            size = file.stat().length
            if size != shard.bytes:
                raise UserError(f"{file} has {size} bytes instead of {shard.bytes}: copy it again or prepare it again")


def _how_to_prepare(path: epath.PathLike) -> str:
    return f"run `python -m terdit_jax.prepare --source=digits --output={path}`, or --source=folder for your pictures"
