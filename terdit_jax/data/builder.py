"""Writes a source as a TFDS data set of latents in ArrayRecord shards: decoded, encoded, counted, hashed.

Sources list and decode images, codecs encode them, `schema` defines a record, `unfinished` remembers what is done, and
`reader` reads it back.
"""

from collections.abc import Callable, Iterator
from concurrent import futures
import dataclasses
from functools import partial
import json
import os
import tempfile
import time
from typing import Any

from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
import numpy as np
import tensorflow_datasets as tfds

from terdit_jax.batches import in_flight
from terdit_jax.data import schema
from terdit_jax.data.codec import Codec
from terdit_jax.data.image_file import ImageError
from terdit_jax.data.listing import describe_ignored
from terdit_jax.data.sources import Item, Source
from terdit_jax.data.unfinished import FinishedShard, Unfinished, check_free, totals
from terdit_jax.errors import UserError
from terdit_jax.paths import as_path
from terdit_jax.progress import Progress
from terdit_jax.untrusted import difference

SHARD_BYTES = 256 * 2**20  # of arrays, before compression
SKIPPED_FILE = "skipped.json"  # by split, and under IGNORED what the source ignored: names and reasons
IGNORED = "ignored"
POLL_SECONDS = 2.0
REPORT_SECONDS = 60.0  # between lines of progress within a shard

Decoded = tuple[Item, futures.Future]  # the future holds an image and its class, or raises ImageError


def find_prepared(source: Source, output: epath.PathLike, *, codec: Codec, mirror: bool) -> schema.Metadata | None:
    """The data set at `output` if it is the one that `build` would write there, None if it is not there or unfinished.

    Raises:
      UserError: something else is there, or that data set is damaged.
    """
    output = as_path(output)
    if not (output / schema.METADATA_FILE).exists():
        check_free(output)
        return None
    metadata = schema.read_metadata(output)
    if change := difference(metadata.source, _describe(source, codec, mirror)):
        raise UserError(
            f"--output={output}: holds another data set, whose {change}; name another directory or delete that one"
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
    worker: tuple[int, int] = (0, 1),
    wait: bool = False,
    report: Callable[[str], None] = logging.info,
) -> schema.Metadata | None:
    """Writes the source, or one worker's part of it, as a data set into the directory `output`.

    Workers share nothing but that directory. Worker k of n makes those of the shards k, k + n, k + 2n, ... that are
    missing, and who finds all of them there completes the data set. So killed workers can be started again, in any
    number, and redo only shards that were not finished; the bytes are the same whatever happened on the way.
    Until the metadata is there, nothing reads the directory as a data set. Images that do not decode are skipped,
    counted and named in `skipped.json`, and so is what the source ignores.

    Args:
      source: the images.
      output: a directory that does not exist, is empty, or holds a part of this data set.
      codec: how images become latents.
      mirror: also store the latent of each mirrored image; needless where the codec keeps pixels.
      max_bad_share: the run ends once more than this share of the images cannot be used.
      shard_bytes: size of a shard's arrays before compression.
      worker: k and n.
      wait: do not return before the other workers are done too.
      report: receives a line for each finished shard, and on long ways in between.

    Returns:
      The metadata; None where shards of other workers are still missing.

    Raises:
      UserError: `output` is taken or cannot be written, or too many images are unusable. Finished shards are kept.
    """
    output = as_path(output)
    if not 0 <= max_bad_share < 1:
        raise UserError(f"--max_bad_share={max_bad_share}: must be at least 0 and below 1")
    if find_prepared(source, output, codec=codec, mirror=mirror) is not None:
        raise UserError(f"--output={output}: already holds this data set")
    if source.ignored:
        logging.warning("%s", describe_ignored("the input", source.ignored))
    find = partial(find_prepared, source, output, codec=codec, mirror=mirror)
    try:
        run = _Run(source, output, codec, mirror, max_bad_share, shard_bytes, report)
        run.write_shards(*worker)
        metadata = run.complete() or find()
        while metadata is None and wait:
            time.sleep(POLL_SECONDS)
            metadata = run.complete() or find()
    except (OSError, UserError) as error:
        if metadata := find():  # another worker has completed the data set, and `.unfinished` went away under this one
            return metadata
        raise _cannot_write(output, error) if isinstance(error, OSError) else error from error
    return metadata


@dataclasses.dataclass
class _Run:
    """One worker's run of `build`: its arguments, and what it has counted so far."""

    source: Source
    path: epath.Path
    codec: Codec
    mirror: bool
    max_bad_share: float
    shard_bytes: int
    report: Callable[[str], None]

    def __post_init__(self):
        self.shape = self.codec.latent_shape(self.source.shape)
        self.features = schema.make_features(self.shape, self.mirror)
        self.parts = {split: self._divide(split) for split in schema.SPLITS}
        num_shards = {split: len(parts) for split, parts in self.parts.items()}
        plan = _describe(self.source, self.codec, self.mirror) | {"shards": num_shards}
        self.unfinished = Unfinished(self.path, plan)
        self.classes = range(len(self.source.class_names))
        self.num_bad = 0

    def write_shards(self, worker: int, num_workers: int) -> None:
        """Makes this worker's share of the shards that are missing."""
        shards = [shard for parts in self.parts.values() for shard in parts.items()]
        finished = [self.unfinished.finished(file) for file, _ in shards]
        self.num_bad = sum(len(shard.skipped) for shard in finished if shard)
        if already := sum(shard is not None for shard in finished):
            self.report(f"{already} of {len(shards)} shards are there already")
        mine = list(zip(shards, finished, strict=True))[worker::num_workers]
        count = sum(len(items) for (_, items), found in mine if not found)
        # Several workers may share a terminal, and two bars would draw over each other.
        self.progress = Progress(count, self.report, seconds=REPORT_SECONDS, show=num_workers == 1)
        with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                for (file, items), found in mine:
                    if not found:
                        shard = self._write_shard(pool, file, items)
                        self.report(f"{file}: {shard.records:,} records, {shard.bytes:,} bytes")
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def complete(self) -> schema.Metadata | None:
        """Writes what makes the shards a data set, if none is missing."""
        finished: dict[str, list[FinishedShard]] = {}
        for split, parts in self.parts.items():
            finished[split] = [shard for shard in map(self.unfinished.finished, parts) if shard]
            if len(finished[split]) < len(parts):
                return None
        skipped = {split: [entry for shard in shards for entry in shard.skipped] for split, shards in finished.items()}
        self.num_bad = sum(len(entries) for entries in skipped.values())
        if self.num_bad:
            self._check_bad(*next(entries[-1] for entries in skipped.values() if entries))
        splits = {}
        for split, shards in finished.items():
            splits[split] = schema.Split(sum(s.shard.records for s in shards), tuple(s.shard for s in shards))
            if not splits[split].records:
                num_items = len(self.source.splits[split])
                raise UserError(f"none of the {num_items} images of the {split} split can be used")
        channel_mean, channel_std = totals(finished["train"])
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
        self._write_metadata(metadata, skipped)
        self.unfinished.remove()
        return metadata

    def _write_metadata(self, metadata: schema.Metadata, skipped: dict[str, list[tuple[str, str]]]) -> None:
        """Every file but the shards, the one that makes the data set readable last."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = epath.Path(scratch)
            _write_tfds_metadata(folder, self.features, metadata)
            files = {name: (folder / name).read_bytes() for name in ("dataset_info.json", "features.json")}
            left_out = {name: dict(entries) for name, entries in skipped.items()} if self.num_bad else {}
            if self.source.ignored:
                left_out[IGNORED] = self.source.ignored
            if left_out:
                files[SKIPPED_FILE] = json.dumps(left_out, indent=1).encode()
        files[schema.METADATA_FILE] = schema.encode_metadata(metadata)
        for name, content in files.items():
            with self.unfinished.new_file(name) as file:
                file.write_bytes(content)

    def _divide(self, split: str) -> dict[str, list[Item]]:
        """The file names of a split's shards and the images of each."""
        items = self.source.splits[split]
        record_bytes = 2 * int(np.prod(self.shape)) * len(schema.array_names(self.mirror))
        count = min(-(-len(items) * record_bytes // self.shard_bytes), len(items))
        bounds = [k * len(items) // count for k in range(count + 1)]
        return {
            f"{schema.NAME}-{split}.array_record-{k:05d}-of-{count:05d}": items[bounds[k] : bounds[k + 1]]
            for k in range(count)
        }

    def _write_shard(self, pool: futures.Executor, file: str, items: list[Item]) -> schema.Shard:
        skipped: list[tuple[str, str]] = []
        num_records, total, total_square = 0, np.zeros(self.shape[-1]), np.zeros(self.shape[-1])
        with self.unfinished.new_file(file) as path:
            try:
                writer = ArrayRecordWriter(os.fspath(path), "group_size:1")  # one record a read, for random access
                # While a batch is written, the devices encode the next one and the pool decodes those after it.
                for usable, arrays in in_flight(self._encode_all(pool, items, skipped)):
                    arrays = {name: np.asarray(array)[: len(usable)] for name, array in arrays.items()}
                    mean, std = (arrays[name].astype(np.float64) for name in ("mean", "std"))
                    total += mean.sum(axis=(0, 1, 2))
                    total_square += (mean**2 + std**2).sum(axis=(0, 1, 2))
                    for row, (source_id, label) in enumerate(usable):
                        record = {name: array[row] for name, array in arrays.items()}
                        if not all(np.isfinite(array).all() for array in record.values()):
                            raise UserError(f"{source_id}: its latent does not fit float16")
                        record |= {"label": label, "source_id": source_id}
                        writer.write(schema.encode_record(self.features, record))
                    num_records += len(usable)
                writer.close()
            except RuntimeError as error:  # ArrayRecord's only exception
                raise _cannot_write(self.path, error) from error
            shard = schema.Shard(file, num_records, path.stat().length, schema.hash_file(path))
        count = num_records * int(np.prod(self.shape[:-1]))  # of latent vectors
        moments = tuple(total.tolist()), tuple(total_square.tolist())
        self.unfinished.add(FinishedShard(shard, count, *moments, tuple(skipped)))
        return shard

    def _encode_all(
        self, pool: futures.Executor, items: list[Item], skipped: list[tuple[str, str]]
    ) -> Iterator[tuple[list[tuple[str, int]], dict[str, Any]]]:
        """Yields (source_id, label) of usable images and their arrays, which may still be on their way."""
        size = self.codec.batch_size
        chunks = (items[start : start + size] for start in range(0, len(items), size))
        decoding = ([(item, pool.submit(self.source.load, item)) for item in chunk] for chunk in chunks)
        for decoded in in_flight(decoding, 2):
            usable = list(self._skip_unusable(decoded, skipped))
            if usable:
                names = [(item.source_id, label) for item, _, label in usable]
                yield names, self._encode(np.stack([image for _, image, _ in usable]))

    def _encode(self, images: np.ndarray) -> dict[str, Any]:
        """Images (B, H, W, C) to the float16 arrays of their records."""
        views = [images, images[:, :, ::-1]] if self.mirror else [images]
        arrays = [array.astype(np.float16) for view in views for array in self.codec.encode(view)]
        return dict(zip(schema.array_names(self.mirror), arrays, strict=True))

    def _skip_unusable(
        self, chunk: list[Decoded], skipped: list[tuple[str, str]]
    ) -> Iterator[tuple[Item, np.ndarray, int]]:
        for item, decoded in chunk:
            self.progress.reached(self.progress.done + 1)
            try:
                image, label = decoded.result()
            except ImageError as error:
                self.num_bad += 1
                skipped.append((item.source_id, str(error)))
                logging.warning("skipped %s: %s", item.source_id, error)
                self._check_bad(item.source_id, str(error))
            else:
                if label not in self.classes:
                    raise UserError(f"{item.source_id}: its class is {label!r}, the source has {len(self.classes)}")
                yield item, image, label

    def _check_bad(self, source_id: str, reason: str) -> None:
        num_images = sum(len(items) for items in self.source.splits.values())
        if self.num_bad > self.max_bad_share * num_images:
            raise UserError(
                f"{self.num_bad} of {num_images} images cannot be used, more than "
                f"--max_bad_share={self.max_bad_share}; the last is {source_id} ({reason})"
            )


def _write_tfds_metadata(folder: epath.Path, features: tfds.features.FeaturesDict, metadata: schema.Metadata) -> None:
    """Writes the two files that TFDS reads a data set by; it takes the shards' names from the folder."""
    for split in metadata.splits.values():
        for shard in split.shards:
            (folder / shard.file).touch()
    split_infos = [
        tfds.core.SplitInfo(
            name=name,
            shard_lengths=[shard.records for shard in split.shards],
            num_bytes=sum(shard.bytes for shard in split.shards),
        )
        for name, split in metadata.splits.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=split_infos, version="1.0.0", check_data=False
    )


def _cannot_write(path: epath.Path, error: Exception) -> UserError:
    return UserError(f"--output={path}: cannot be written ({error}); finished shards are kept, run again to go on")


def _describe(source: Source, codec: Codec, mirror: bool) -> dict[str, Any]:
    return {**source.description, "codec": codec.name, "mirror": mirror}
