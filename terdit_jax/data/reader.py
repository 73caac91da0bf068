"""Reads prepared data sets: training batches through Grain, held-out batches in a fixed order.

What a record holds is the schema's; batches stay NumPy arrays, and what training makes of them is its own.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
from typing import Protocol

from etils import epath
import grain
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import decode

from terdit_jax.data import schema
from terdit_jax.errors import UserError

Batch = dict[str, np.ndarray]
READ_CHUNK = 256  # records at a time when a whole split is read
MAX_POSITION = 2**52  # of the training stream: no run comes near, and Grain's float division is exact below


class Records(Protocol):
    """The records of a split, by index."""

    def __len__(self) -> int:
        """How many there are."""

    def read(self, indices: np.ndarray) -> Batch:
        """The records at `indices` (B,): arrays (B, H, W, C) float16 and `label` (B,) int32."""


class AnyDataset(Protocol):
    """What batches are made from: a prepared data set, or a synthetic one."""

    metadata: schema.Metadata

    def records(self, split: str, *, in_memory: bool = False) -> Records:
        """The records of "train" or "heldout"."""


@dataclasses.dataclass(frozen=True)
class MemoryRecords:
    """Records held as arrays (N, ...)."""

    arrays: Batch

    def __len__(self) -> int:
        return len(self.arrays["label"])

    def read(self, indices: np.ndarray) -> Batch:
        """As `Records.read`, copied out of the arrays."""
        return {name: array[indices] for name, array in self.arrays.items()}


@dataclasses.dataclass(frozen=True)
class StoredRecords:
    """Records in ArrayRecord shards, decoded as they are read."""

    path: epath.Path  # of the data set
    data_source: Sequence[bytes]  # serialized records
    metadata: schema.Metadata

    def __len__(self) -> int:
        return len(self.data_source)

    def read(self, indices: np.ndarray) -> Batch:
        """As `Records.read`. Raises UserError where a shard is damaged."""
        # One by one: ArrayRecord's batched read starts threads at every call and is half as fast on local disks.
        try:
            serialized = [self.data_source[index] for index in indices.tolist()]
        except RuntimeError as error:  # ArrayRecord's only exception; it checks a hash of each block
            raise UserError(f"{self.path} cannot be read, copy or prepare it again: {error}") from error
        return schema.decode_records(serialized, self.metadata.shape, self.metadata.has_mirror)

    def load(self) -> MemoryRecords:
        """All of them in memory."""
        chunks = [
            self.read(np.arange(start, min(start + READ_CHUNK, len(self)))) for start in range(0, len(self), READ_CHUNK)
        ]
        return MemoryRecords({name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]})


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared data set whose files are all there."""

    path: epath.Path
    metadata: schema.Metadata

    @functools.cached_property
    def _builder(self) -> tfds.core.DatasetBuilder:
        return tfds.builder_from_directory(self.path)

    def data_source(self, split: str, **kwargs) -> Sequence:
        """The split as TFDS's random-access source of dicts; keyword arguments go to `as_data_source`."""
        return self._builder.as_data_source(split, **kwargs)

    def records(self, split: str, *, in_memory: bool = False) -> Records:
        """The records of a split, in the order of its shards."""
        raw = decode.DeserializeMethod.RAW_BYTES
        stored = StoredRecords(self.path, self.data_source(split, deserialize_method=raw), self.metadata)
        if len(stored) != self.metadata.splits[split].records:
            raise UserError(f"{self.path}: dataset_info.json and {schema.METADATA_FILE} disagree, prepare it again")
        return stored.load() if in_memory else stored


def open_dataset(path: epath.PathLike) -> Dataset:
    """Opens a data set after checking its metadata and the presence and size of every shard.

    Raises:
      UserError: as `schema.read_metadata`.
    """
    return Dataset(epath.Path(path), schema.read_metadata(path))


def make_batches(
    dataset: AnyDataset,
    *,
    seed: int,
    batch_size: int,
    start_step: int,
    process_index: int,
    process_count: int,
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
      in_memory: read the training split once and keep it; the batches are the same.
      read_threads: threads that assemble batches ahead of time, of which `prefetch` at most can be busy.
      prefetch: batches kept ready.

    Returns:
      Batches of b = batch_size / process_count records: `mean`, `std` (b, H, W, C) float16, `mean_mirror` and
      `std_mirror` alike where stored, `label` (b,) int32, and `position` (b,) int64, the place in the stream.

    Raises:
      UserError: a batch size that the processes cannot share, a seed out of range, a shard found damaged as it is read.
    """
    block_size = _block_size(batch_size, process_count)
    if not 0 <= seed < 2**32:
        raise UserError(f"config.seed={seed}: must lie in [0, 2**32)")
    records = dataset.records("train", in_memory=in_memory)

    def read_block(block: int, indices: np.ndarray) -> Batch:
        position = block * block_size + np.arange(block_size, dtype=np.int64)
        return {**records.read(indices), "position": position}

    # Block k of the stream belongs to step k // process_count and process k % process_count.
    # A finite number of epochs, because Grain's endless repeat() overflows when it is batched by one.
    num_epochs = MAX_POSITION // len(records)
    blocks = grain.MapDataset.range(len(records)).shuffle(seed=seed).repeat(num_epochs).batch(block_size)
    mine = blocks.map_with_index(read_block)[process_index::process_count][start_step:]
    options = grain.ReadOptions(num_threads=min(read_threads, prefetch), prefetch_buffer_size=prefetch)
    return iter(mine.to_iter_dataset(options))


def heldout_batches(
    dataset: AnyDataset, *, batch_size: int, num_batches: int, process_index: int, process_count: int
) -> Iterator[Batch]:
    """This process's part of the first `num_batches` held-out batches, as in `make_batches` but always the same.

    The split is read from its beginning and over again where it is too small.

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
