"""Reads prepared data sets: training batches through Grain, held-out batches in a fixed order.

The content of a record belongs to `schema`, the draw of records to `draws`.
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
from functools import partial
import os
from typing import Any, Protocol, TypeVar

from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
import grain
import numpy as np

from terdit_jax.data import schema
from terdit_jax.data.draws import ShuffledStream, draw_mirrored
from terdit_jax.errors import UserError, in_a_line
from terdit_jax.paths import as_path

T = TypeVar("T")
Batch = dict[str, np.ndarray]
READ_CHUNK = 256  # records at a time when a whole split is read
MAX_POSITION = 2**52  # of the training stream: no run comes near


class Records(Protocol):
    """The records of a split, by index."""

    def __len__(self) -> int:
        """How many there are."""

    def read(self, indices: np.ndarray, mirrored: np.ndarray | None = None) -> Batch:
        """One view of each record at `indices` (B,): `mean`, `std` (B, H, W, C) float16 and `label` (B,) int32.

        Rows where `mirrored` (B,) bool is set, none if it is left out, show the mirrored image: what is stored for
        it, or else the arrays mirrored along the width, which is exact where records are the images themselves.
        """


class AnyDataset(Protocol):
    """A data set that batches are made from: a prepared one, or a synthetic one."""

    @property
    def metadata(self) -> schema.Metadata:
        """Its description."""

    def records(self, split: str, *, in_memory: bool = False) -> Records:
        """The records of "train" or "heldout"."""


@dataclasses.dataclass(frozen=True)
class MemoryRecords:
    """Records held as arrays, with their mirrors (V = 2) or without (V = 1)."""

    mean: np.ndarray  # (V, N, H, W, C) float16
    std: np.ndarray  # (V, N, H, W, C) float16
    label: np.ndarray  # (N,) int32

    def __len__(self) -> int:
        return len(self.label)

    def read(self, indices: np.ndarray, mirrored: np.ndarray | None = None) -> Batch:
        """Copies records out of the arrays, as `Records.read`."""
        has_mirror = len(self.mean) > 1
        rows = indices if mirrored is None or not has_mirror else indices + mirrored * len(self)
        views = {name: array.reshape(-1, *array.shape[2:]) for name, array in (("mean", self.mean), ("std", self.std))}
        batch = {name: view.take(rows, axis=0) for name, view in views.items()}
        if mirrored is not None and not has_mirror:
            _mirror_rows(batch, mirrored)
        return {**batch, "label": self.label[indices]}


class StoredRecords:
    """Records in ArrayRecord shards, parsed as they are read; any number of threads may read."""

    def __init__(self, path: epath.Path, split: schema.Split, metadata: schema.Metadata):
        """The records of `split` in the data set at `path`; shards are opened when first read."""
        self._path, self._shards, self._metadata = path, split.shards, metadata
        self._starts = np.cumsum([0] + [shard.records for shard in split.shards])
        self._readers: list[ArrayRecordReader | None] = [None] * len(split.shards)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, indices: np.ndarray, mirrored: np.ndarray | None = None) -> Batch:
        """Reads as `Records.read`. Raises UserError where a shard or a record is damaged."""
        shape, has_mirror = self._metadata.shape, self._metadata.has_mirror
        decoders = [partial(schema.decode_view, shape=shape, has_mirror=has_mirror, mirrored=m) for m in (False, True)]
        which = mirrored if mirrored is not None and has_mirror else np.zeros(len(indices), bool)
        shards, places = self._locate(indices)
        # One by one: a read of many starts threads, which costs twice the processor time and, in a shuffled stream over
        # many shards, meets few neighbours.
        rows = zip(shards.tolist(), places.tolist(), which.tolist(), strict=True)
        views = [self._read_one(shard, place, decoders[view]) for shard, place, view in rows]
        batch = {"mean": self._stack(view.mean for view in views), "std": self._stack(view.std for view in views)}
        if mirrored is not None and not has_mirror:
            _mirror_rows(batch, mirrored)
        labels = np.array([view.label for view in views], np.int32)  # decode_view lets none below 0 pass
        if labels.max(initial=0) >= self._metadata.num_classes:  # the next one is the model's null class
            row = int(labels.argmax())
            raise UserError(
                f"{self._path / self._shards[shards[row]].file}: record {places[row]} has label {labels[row]}, and "
                f"the data set classes 0 to {self._metadata.num_classes - 1}: prepare it again"
            )
        return {**batch, "label": labels}

    def load(self) -> MemoryRecords:
        """All of them in memory."""
        num_views = 2 if self._metadata.has_mirror else 1
        size = (num_views, len(self), *self._metadata.shape)
        loaded = MemoryRecords(np.empty(size, np.float16), np.empty(size, np.float16), np.empty(len(self), np.int32))
        for start in range(0, len(self), READ_CHUNK):
            indices = np.arange(start, min(start + READ_CHUNK, len(self)))
            for view in range(num_views):
                batch = self.read(indices, np.full(len(indices), bool(view)))
                loaded.mean[view, indices], loaded.std[view, indices] = batch["mean"], batch["std"]
                loaded.label[indices] = batch["label"]
        return loaded

    def examples(self, indices: np.ndarray) -> list[dict[str, Any]]:
        """The whole records at `indices` (B,): the fields of `schema.make_features`, whatever the files of TFDS say."""
        decode = schema.make_features(self._metadata.shape, self._metadata.has_mirror).deserialize_example_np
        shards, places = self._locate(indices)
        rows = zip(shards.tolist(), places.tolist(), strict=True)
        return [self._read_one(shard, place, decode) for shard, place in rows]

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard of each record, and its place there."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        return shards, indices - self._starts[shards]

    def _read_one(self, shard: int, place: int, decode: Callable[[bytes], T]) -> T:
        try:
            reader = self._readers[shard] or self._open(shard)
            return decode(reader.read((place,))[0])
        except Exception as error:
            raise UserError(
                f"{self._path / self._shards[shard].file}: record {place} cannot be read, copy the file again or "
                f"prepare the data set again: {in_a_line(error)}"
            ) from error

    def _open(self, shard: int) -> ArrayRecordReader:
        # Nothing is read ahead. Threads that come here together each open the file, and one reader stays.
        reader = ArrayRecordReader(
            os.fspath(self._path / self._shards[shard].file), "readahead_buffer_size:0,max_parallelism:0"
        )
        if reader.num_records() != self._shards[shard].records:
            raise ValueError(f"the file holds {reader.num_records()} records, not {self._shards[shard].records}")
        self._readers[shard] = reader
        return reader

    def _stack(self, arrays: Iterable[bytes]) -> np.ndarray:
        """Arrays (H, W, C) of little-endian float16 as (B, H, W, C), writable."""
        return np.frombuffer(bytearray().join(arrays), "<f2").reshape(-1, *self._metadata.shape)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared data set whose files are all there."""

    path: epath.Path
    metadata: schema.Metadata

    def stored(self, split: str) -> StoredRecords:
        """The records of a split, in the order of its shards."""
        return StoredRecords(self.path, self.metadata.splits[split], self.metadata)

    def records(self, split: str, *, in_memory: bool = False) -> Records:
        """The records of a split, stored or read into memory."""
        return self.stored(split).load() if in_memory else self.stored(split)


def open_dataset(path: epath.PathLike) -> Dataset:
    """Opens a data set after checking its metadata and the presence and size of every shard.

    Raises:
      UserError: as `schema.read_metadata`.
    """
    path = as_path(path)
    return Dataset(path, schema.read_metadata(path))


def make_batches(
    dataset: AnyDataset,
    *,
    seed: int,
    batch_size: int,
    start_step: int,
    process_index: int,
    process_count: int,
    horizontal_flip: bool,
    in_memory: bool,
    read_threads: int,
    prefetch: int,
) -> Iterator[Batch]:
    """This process's part of the training batches from `start_step` on, without end.

    The training stream is every record once an epoch, each epoch in an order of its own that `seed` decides. Global
    batch s holds the stream's positions [s * batch_size, (s + 1) * batch_size) and process p the p-th contiguous block
    of it, so the position follows from the step alone and any number of processes sees the same batches.

    Args:
      dataset: a prepared or synthetic data set.
      seed: of the order; 0 <= seed < 2**32.
      batch_size: records over all processes.
      start_step: the first global batch.
      process_index: this process, of `process_count`.
      process_count: processes that share each batch.
      horizontal_flip: half of the rows, by `draws.draw_mirrored`, show the mirrored image; of a record that holds
        both views only the one shown is used.
      in_memory: read the training split once and keep it; the batches are the same.
      read_threads: threads that assemble batches ahead of time, of which `prefetch` at most can be busy.
      prefetch: batches kept ready.

    Returns:
      Batches of b = batch_size / process_count records: `mean`, `std` (b, H, W, C) float16, `label` (b,) int32, and
      `position` (b,) int64, the place in the stream.

    Raises:
      UserError: a batch size that the processes cannot share, a seed out of range, a shard found damaged as it is read.
    """
    block_size = _block_size(batch_size, process_count)
    if not 0 <= seed < 2**32:
        raise UserError(f"config.seed={seed}: must lie in [0, 2**32)")
    records = dataset.records("train", in_memory=in_memory)
    stream = ShuffledStream(seed, len(records))

    def read_block(block: int) -> Batch:
        position = block * block_size + np.arange(block_size, dtype=np.int64)
        mirrored = draw_mirrored(seed, position) if horizontal_flip else None
        return {**records.read(stream.indices(position), mirrored), "position": position}

    # Block k of the stream belongs to step k // process_count and process k % process_count.
    blocks = grain.MapDataset.range(MAX_POSITION // block_size)[process_index::process_count][start_step:]
    options = grain.ReadOptions(num_threads=min(read_threads, prefetch), prefetch_buffer_size=prefetch)
    return iter(blocks.map(read_block).to_iter_dataset(options))


def heldout_batches(
    dataset: AnyDataset, *, batch_size: int, num_batches: int, process_index: int, process_count: int
) -> Iterator[Batch]:
    """This process's part of the first `num_batches` held-out batches, as in `make_batches` but always the same.

    The split is read from its beginning and over again where it is too small; no record is mirrored.

    Raises:
      UserError: a batch size that the processes cannot share.
    """
    block_size = _block_size(batch_size, process_count)
    records = dataset.records("heldout")
    for step in range(num_batches):
        position = (step * process_count + process_index) * block_size + np.arange(block_size, dtype=np.int64)
        yield {**records.read(position % len(records)), "position": position}


def _block_size(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"config.train.batch_size={batch_size}: must be a multiple of the {process_count} processes")
    return batch_size // process_count


def _mirror_rows(batch: Batch, mirrored: np.ndarray) -> None:
    for array in batch.values():  # (B, H, W, C)
        array[mirrored] = array[mirrored, :, ::-1]
