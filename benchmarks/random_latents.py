"""Data sets of random latents, as large as a benchmark wants them and drawn like those of real pictures.

Means have a variance of 25 and deviations are small, so that they compress as little as the autoencoder's.
"""

import dataclasses
import os
import pathlib

from array_record.python.array_record_module import ArrayRecordWriter
import numpy as np
import tensorflow_datasets as tfds

from terdit_jax.data import schema

WRITER_OPTIONS = {"zstd": "group_size:1", "uncompressed": "group_size:1,uncompressed"}


def write_dataset(path: pathlib.Path, shape: tuple[int, int, int], records: int, shards: int, options: str) -> None:
    """Writes a data set of random latents with their mirrors at `path`, which must not exist.

    Args:
      path: the folder to make.
      shape: H, W, C of a record's arrays.
      records: of the training split; the held-out split has one.
      shards: files of the training split.
      options: of the ArrayRecord writer, of `WRITER_OPTIONS`.
    """
    path.mkdir()
    features, generator = schema.make_features(shape, has_mirror=True), np.random.default_rng(0)
    splits = {
        "train": _write_split(path, "train", records, shards, options, features, generator),
        "heldout": _write_split(path, "heldout", 1, 1, options, features, generator),
    }
    infos = [
        tfds.core.SplitInfo(name=name, shard_lengths=[shard.records for shard in split.shards], num_bytes=0)
        for name, split in splits.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=path, features=features, split_infos=infos, version="1.0.0", check_data=False
    )
    (path / schema.METADATA_FILE).write_bytes(schema.encode_metadata(_describe(shape, splits)))


def _write_split(
    path: pathlib.Path,
    split: str,
    num_records: int,
    num_shards: int,
    options: str,
    features: tfds.features.FeaturesDict,
    generator: np.random.Generator,
) -> schema.Split:
    shards, shape = [], features["mean"].shape
    for index in range(num_shards):
        file = path / f"{schema.NAME}-{split}.array_record-{index:05d}-of-{num_shards:05d}"
        start, stop = (k * num_records // num_shards for k in (index, index + 1))
        writer = ArrayRecordWriter(os.fspath(file), options)
        for number in range(start, stop):
            record = {"label": number % 1000, "source_id": f"n01440764/n01440764_{number}.JPEG"}
            for suffix in ("", "_mirror"):
                record[f"mean{suffix}"] = (5 * generator.standard_normal(shape, np.float32)).astype(np.float16)
                record[f"std{suffix}"] = generator.lognormal(-3, 0.5, shape).astype(np.float16)
            writer.write(schema.encode_record(features, record))
        writer.close()
        shards.append(schema.Shard(file.name, stop - start, file.stat().st_size, schema.hash_file(file)))
    return schema.Split(num_records, tuple(shards))


def _describe(shape: tuple[int, ...], splits: dict[str, schema.Split]) -> schema.Metadata:
    metadata = schema.Metadata(
        schema_version=schema.SCHEMA_VERSION,
        source={"kind": "random"},
        codec="random",
        latent_scale=0.2,
        shape=shape,
        num_classes=1000,
        class_names=tuple(str(label) for label in range(1000)),
        has_mirror=True,
        splits=splits,
        channel_mean=(0.0,) * shape[-1],
        channel_std=(5.0,) * shape[-1],
    )
    return dataclasses.replace(metadata, fingerprint=schema.compute_fingerprint(metadata))
