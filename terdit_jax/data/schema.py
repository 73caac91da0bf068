"""The record of a prepared data set, its metadata file `latents.json`, and the fingerprint of both.

The builder fills the records; the reader makes batches of them.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import shlex
from typing import Any, NamedTuple

from etils import epath
from google.protobuf.message import DecodeError
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from terdit_jax.errors import UserError
from terdit_jax.labels import is_class_name
from terdit_jax.untrusted import is_count, is_number, parse_json, reading, short

SCHEMA_VERSION = 1
NAME = "latents"
METADATA_FILE = f"{NAME}.json"
UNFINISHED_FOLDER = ".unfinished"
SPLITS = ("train", "heldout")
MAX_SIDE, MAX_NUMBERS, MAX_CLASSES = 1 << 14, 1 << 28, 1 << 20  # of an array, and of a data set
_MAX_BYTES, _MAX_MOMENT = 1 << 53, 1e5  # of a file, and of float16 numbers
_MAX_LABEL = np.iinfo(np.int32).max
_SHARD_NAME = re.compile(rf"{NAME}-({'|'.join(SPLITS)})\.array_record-\d{{5,9}}-of-\d{{5,9}}", re.ASCII)
_SHA256 = re.compile("[0-9a-f]{64}")


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
    codec: str  # "none" where records are the images themselves, in [-1, 1]
    latent_scale: float
    shape: tuple[int, int, int]  # H, W, C
    num_classes: int
    class_names: tuple[str, ...]
    has_mirror: bool  # records also hold the latent of the mirrored image
    splits: dict[str, Split]
    channel_mean: tuple[float, ...]  # C
    channel_std: tuple[float, ...]  # C
    fingerprint: str = ""


def array_names(has_mirror: bool) -> tuple[str, ...]:
    """The fields of a record that hold (H, W, C) float16 arrays."""
    return ("mean", "std", "mean_mirror", "std_mirror") if has_mirror else ("mean", "std")


def make_features(shape: tuple[int, int, int], has_mirror: bool) -> tfds.features.FeaturesDict:
    """The record as TFDS describes it: float16 arrays of `shape` (H, W, C), an int64 label and the image's name.

    A latent of a mirrored image is not the mirrored latent, hence the second pair of arrays; where records are
    images, mirroring the array is exact and the pair is left out.
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


class View(NamedTuple):
    """One of a record's two views: the bytes of mean and std, (H, W, C) little-endian float16, and the label."""

    mean: bytes
    std: bytes
    label: int


def decode_view(data: bytes, shape: tuple[int, int, int], has_mirror: bool, mirrored: bool) -> View:
    """The image's view of a record, or its mirror's.

    Raises:
      ValueError: the bytes are no record of this shape.
    """
    try:
        fields = tf_example_pb2.Example.FromString(data).features.feature
    except DecodeError as error:
        raise ValueError("not a tf.train.Example") from error
    size = 2 * math.prod(shape)
    for name in array_names(has_mirror):
        if [len(value) for value in fields[name].bytes_list.value] != [size]:
            raise ValueError(f"its {name} is not an array of {size} bytes")
    labels = fields["label"].int64_list.value
    if len(labels) != 1 or not 0 <= labels[0] <= _MAX_LABEL:
        raise ValueError("its label is not the number of a class")
    mean, std = array_names(has_mirror)[2:] if mirrored else array_names(has_mirror)[:2]
    return View(fields[mean].bytes_list.value[0], fields[std].bytes_list.value[0], labels[0])


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


def encode_metadata(metadata: Metadata) -> bytes:
    """The content of `latents.json`."""
    return (json.dumps(dataclasses.asdict(metadata), indent=2, ensure_ascii=False) + "\n").encode()


def read_metadata(path: epath.PathLike) -> Metadata:
    """Reads `latents.json` and checks that every shard is there with its recorded size; `verify` checks contents.

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
    what = f"{path / METADATA_FILE}"
    with reading(f"{what} is damaged: prepare the data set again"):
        raw = parse_json((path / METADATA_FILE).read_bytes(), f"{what} is damaged, prepare it again: it", dict)
        version = raw["schema_version"]
    if version is True or version != SCHEMA_VERSION:
        version = short(version)
        raise UserError(f"{path} has schema version {version}, this code reads {SCHEMA_VERSION}: prepare it again")
    with reading(f"{what} is damaged: prepare the data set again"):
        metadata = _parse(raw)
        fingerprint = compute_fingerprint(metadata)
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
    """Metadata of untrusted JSON. Raises ValueError, KeyError or TypeError for what no data set says of itself."""
    splits = {name: _parse_split(name, raw["splits"][name]) for name in SPLITS}
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
    shape, classes = metadata.shape, metadata.num_classes
    _expect(all(is_count(n, 1, MAX_SIDE) for n in shape), "shape", shape)
    _expect(math.prod(shape) <= MAX_NUMBERS, "shape", shape)
    _expect(is_count(classes, 1, MAX_CLASSES), "num_classes", classes)
    _expect(is_number(metadata.latent_scale, 1e-6, 1e6), "latent_scale", metadata.latent_scale)
    _expect(isinstance(metadata.has_mirror, bool), "has_mirror", metadata.has_mirror)
    _expect(isinstance(metadata.source, dict) and isinstance(metadata.source.get("kind"), str), "source", raw["source"])
    for name in ("codec", "fingerprint"):
        _expect(_is_line(raw[name]), name, raw[name])
    _expect(all(map(is_class_name, metadata.class_names)), "class_names", raw["class_names"])
    for name in ("channel_mean", "channel_std"):
        lowest, values = 0 if name == "channel_std" else -_MAX_MOMENT, getattr(metadata, name)
        _expect(len(values) == channels, name, raw[name])
        _expect(all(is_number(value, lowest, _MAX_MOMENT) for value in values), name, raw[name])
    if len(metadata.class_names) != classes:
        raise ValueError(f"{len(metadata.class_names)} class names for {classes} classes")
    return metadata


def _parse_split(name: str, raw: dict[str, Any]) -> Split:
    split = Split(raw["records"], tuple(map(parse_shard, raw["shards"])))
    if len({shard.file for shard in split.shards}) != len(split.shards):
        raise ValueError(f"a shard of {name} is listed twice")
    if not is_count(split.records, 1, _MAX_BYTES) or split.records != sum(shard.records for shard in split.shards):
        raise ValueError(f"the shards of {name} do not hold {short(split.records)} records")
    return split


def parse_shard(raw: dict[str, Any]) -> Shard:
    """A shard of untrusted JSON. Its name has no folder in it: a data set reads no file from anywhere else.

    Raises:
      ValueError, TypeError: what no shard is.
    """
    shard = Shard(**raw)
    _expect(isinstance(shard.file, str) and bool(_SHARD_NAME.fullmatch(shard.file)), "file", shard.file)
    _expect(is_count(shard.bytes, 0, _MAX_BYTES), "bytes", shard.bytes)
    _expect(is_count(shard.records, 0, shard.bytes), "records", shard.records)  # a record takes a byte and more
    _expect(isinstance(shard.sha256, str) and bool(_SHA256.fullmatch(shard.sha256)), "sha256", shard.sha256)
    return shard


def _expect(sound: bool, name: str, value: object) -> None:
    if not sound:
        shown = ", ".join(map(short, value)) if isinstance(value, tuple) and len(value) <= 3 else short(value)
        raise ValueError(f"{name} is {shown}")


def _is_line(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 200 and value.isprintable()


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
    output = shlex.quote(f"--output={os.fspath(path)}")
    return f"run `python -m terdit_jax.prepare --source=digits {output}`, or with --source=folder --input=FOLDER"
