"""Writes a source as a TFDS data set of latents in ArrayRecord shards: encoded, counted, hashed, renamed at the end.

Sources list and decode pictures, codecs encode them, the schema says what a record is; reading back is the reader's.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent import futures
import dataclasses
import os
from typing import Any

from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
import numpy as np
import tensorflow_datasets as tfds

from terdit_jax.data import schema
from terdit_jax.data.codec import Codec
from terdit_jax.data.sources import Item, PictureError, Source
from terdit_jax.errors import UserError

SHARD_BYTES = 256 * 2**20  # of arrays, before compression
CHUNK = 64  # pictures decoded and encoded together; two chunks are in memory at a time

Decoded = tuple[Item, futures.Future]  # the future holds a picture (H, W, C) float32 or raises PictureError


def find_prepared(source: Source, output: epath.PathLike, *, codec: Codec, mirror: bool) -> schema.Metadata | None:
    """The data set at `output` if it is the one that `build` would write there, None if nothing is there yet.

    Raises:
      UserError: something else is there, or that data set is damaged.
    """
    output = epath.Path(output)
    if not output.exists():
        return None
    if not output.is_dir():
        raise UserError(f"--output={output}: is a file, name a directory")
    if not any(output.iterdir()):
        return None
    if not (output / schema.METADATA_FILE).exists():
        raise UserError(f"--output={output}: holds other files, name an empty or new directory")
    metadata = schema.read_metadata(output)
    found, asked = metadata.source, _describe(source, codec, mirror)
    for key in sorted(found.keys() | asked.keys()):
        if found.get(key) != asked.get(key):
            raise UserError(
                f"--output={output}: holds another data set, whose {key} is {found.get(key)!r} and not "
                f"{asked.get(key)!r}; name another directory or delete that one"
            )
    return metadata


def build(
    source: Source,
    output: epath.PathLike,
    *,
    codec: Codec,
    mirror: bool = False,
    max_bad_share: float = 0.01,
    shard_bytes: int = SHARD_BYTES,
    report: Callable[[str], None] = logging.info,
) -> schema.Metadata:
    """Writes the source as a data set into the directory `output` and returns its metadata.

    The same source and options give byte-identical shards. Everything is written to `<output>.incomplete` and renamed
    once whole, so an interrupted run leaves nothing under the final name. Pictures that do not decode are skipped with
    a warning each.

    Args:
      source: the pictures.
      output: a directory that does not exist or is empty.
      codec: how pictures become latents.
      mirror: also store the latent of each mirrored picture; needless where the codec keeps pixels.
      max_bad_share: the run is aborted once more than this share of the pictures cannot be used.
      shard_bytes: size of a shard's arrays before compression.
      report: receives a line for each finished shard.

    Raises:
      UserError: `output` is taken or cannot be written, or too many pictures are unusable.
    """
    output = epath.Path(output)
    if not 0 <= max_bad_share < 1:
        raise UserError(f"--max_bad_share={max_bad_share}: must be at least 0 and below 1")
    if find_prepared(source, output, codec=codec, mirror=mirror) is not None:
        raise UserError(f"--output={output}: already holds this data set")
    partial = output.parent / f"{output.name}.incomplete"
    try:
        if partial.exists():
            partial.rmtree()
        partial.mkdir(parents=True)
        try:
            metadata = _Writer(source, partial, codec, mirror, max_bad_share, shard_bytes, report).write()
            if output.exists():
                output.rmdir()
            partial.rename(output)
        except BaseException:
            partial.rmtree()
            raise
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written ({error})") from error
    return metadata


@dataclasses.dataclass
class _Writer:
    """One run of `build`: its arguments, the directory that it fills, and what it has counted so far."""

    source: Source
    path: epath.Path
    codec: Codec
    mirror: bool
    max_bad_share: float
    shard_bytes: int
    report: Callable[[str], None]
    num_bad: int = 0

    def __post_init__(self):
        self.shape = self.codec.latent_shape(self.source.shape)
        self.features = schema.make_features(self.shape, self.mirror)
        self.statistics = _ChannelStatistics(self.shape[-1])

    def write(self) -> schema.Metadata:
        with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            splits = {split: self._write_split(pool, split) for split in schema.SPLITS}
        split_infos = [
            tfds.core.SplitInfo(
                name=name,
                shard_lengths=[shard.records for shard in split.shards],
                num_bytes=sum(shard.bytes for shard in split.shards),
            )
            for name, split in splits.items()
        ]
        tfds.folder_dataset.write_metadata(
            data_dir=self.path, features=self.features, split_infos=split_infos, version="1.0.0", check_data=False
        )
        channel_mean, channel_std = self.statistics.result()
        metadata = schema.Metadata(
            schema_version=schema.SCHEMA_VERSION,
            source=_describe(self.source, self.codec, self.mirror),
            codec=self.codec.name,
            latent_scale=self.codec.latent_scale,
            shape=self.shape,
            num_classes=len(self.source.class_names),
            class_names=self.source.class_names,
            has_mirror=self.mirror,
            splits=splits,
            channel_mean=channel_mean,
            channel_std=channel_std,
        )
        metadata = dataclasses.replace(metadata, fingerprint=schema.compute_fingerprint(metadata))
        schema.write_metadata(self.path, metadata)
        return metadata

    def _write_split(self, pool: futures.Executor, split: str) -> schema.Split:
        items = self.source.splits[split]
        record_bytes = 2 * int(np.prod(self.shape)) * len(schema.array_names(self.mirror))
        num_shards = min(-(-len(items) * record_bytes // self.shard_bytes), len(items))
        shards = []
        for index in range(num_shards):
            file = f"{schema.NAME}-{split}.array_record-{index:05d}-of-{num_shards:05d}"
            start, stop = (k * len(items) // num_shards for k in (index, index + 1))
            shards.append(self._write_shard(pool, split, file, items[start:stop]))
            self.report(f"{file}: {shards[-1].records:,} records, {shards[-1].bytes:,} bytes")
        num_records = sum(shard.records for shard in shards)
        if num_records == 0:
            raise UserError(f"none of the {len(items)} pictures of the {split} split can be used")
        return schema.Split(num_records, tuple(shards))

    def _write_shard(self, pool: futures.Executor, split: str, file: str, items: list[Item]) -> schema.Shard:
        path = self.path / file
        writer = ArrayRecordWriter(os.fspath(path), "group_size:1")  # one record a read, for random access
        num_records = 0
        for chunk in _decode_ahead(pool, self.source, items):
            usable = list(self._skip_unusable(chunk))
            if not usable:
                continue
            arrays = self._encode(np.stack([picture for _, picture in usable]))
            if split == "train":
                self.statistics.add(arrays["mean"], arrays["std"])
            for row, (item, _) in enumerate(usable):
                record = {name: array[row] for name, array in arrays.items()}
                if not all(np.isfinite(array).all() for array in record.values()):
                    raise UserError(f"{item.source_id}: its latent does not fit float16")
                record |= {"label": item.label, "source_id": item.source_id}
                writer.write(schema.encode_record(self.features, record))
            num_records += len(usable)
        writer.close()
        return schema.Shard(file, num_records, path.stat().length, schema.hash_file(path))

    def _encode(self, pictures: np.ndarray) -> dict[str, np.ndarray]:
        """Pictures (B, H, W, C) float32 to the float16 arrays of their records."""
        views = [pictures, pictures[:, :, ::-1]] if self.mirror else [pictures]
        arrays = [array.astype(np.float16) for view in views for array in self.codec.encode(view)]
        return dict(zip(schema.array_names(self.mirror), arrays, strict=True))

    def _skip_unusable(self, chunk: list[Decoded]) -> Iterator[tuple[Item, np.ndarray]]:
        num_pictures = sum(len(items) for items in self.source.splits.values())
        for item, picture in chunk:
            try:
                yield item, picture.result()
            except PictureError as error:
                self.num_bad += 1
                logging.warning("skipped %s: %s", item.source_id, error)
                if self.num_bad > self.max_bad_share * num_pictures:
                    raise UserError(
                        f"{self.num_bad} of {num_pictures} pictures cannot be used, more than "
                        f"--max_bad_share={self.max_bad_share}; the last is {item.source_id} ({error})"
                    ) from error


class _ChannelStatistics:
    """Running moments, in float64, of draws from the posteriors of a stream of records."""

    def __init__(self, num_channels: int):
        self.count = 0
        self.total = np.zeros(num_channels)
        self.total_square = np.zeros(num_channels)

    def add(self, mean: np.ndarray, std: np.ndarray) -> None:
        """Adds latents (B, H, W, C)."""
        mean, std = mean.astype(np.float64), std.astype(np.float64)
        self.count += mean[..., 0].size
        self.total += mean.sum(axis=(0, 1, 2))
        self.total_square += (mean**2 + std**2).sum(axis=(0, 1, 2))

    def result(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation, C numbers each."""
        mean = self.total / self.count
        variance = np.maximum(self.total_square / self.count - mean**2, 0)
        return tuple(mean.tolist()), tuple(np.sqrt(variance).tolist())


def _decode_ahead(pool: futures.Executor, source: Source, items: list[Item]) -> Iterator[list[Decoded]]:
    """Yields the pictures chunk by chunk, in order, while the pool decodes the next chunk."""
    chunks = deque()
    for start in range(0, len(items), CHUNK):
        chunks.append([(item, pool.submit(source.load, item.source_id)) for item in items[start : start + CHUNK]])
        if len(chunks) == 2:
            yield chunks.popleft()
    yield from chunks


def _describe(source: Source, codec: Codec, mirror: bool) -> dict[str, Any]:
    return {**source.description, "codec": codec.name, "mirror": mirror}
