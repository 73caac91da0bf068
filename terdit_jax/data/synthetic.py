"""A data set of random latents of any shape, for bring-up and benchmarks where no data is at hand.

It stands in for a prepared data set in front of the reader; nothing is read or written.
"""

import dataclasses

import numpy as np

from terdit_jax.data import schema
from terdit_jax.data.reader import Batch, MemoryRecords

NUM_RECORDS = 1_281_167  # as many as ImageNet has, so that shuffling costs the same
POOL_SIZE = 256  # different ones, repeated


@dataclasses.dataclass(frozen=True)
class SyntheticRecords:
    """Random records, the same in every process, drawn once; record i is the pool's i % POOL_SIZE."""

    pool: MemoryRecords

    def __len__(self) -> int:
        return NUM_RECORDS

    def read(self, indices: np.ndarray, mirrored: np.ndarray | None = None) -> Batch:
        """Reads as `reader.Records.read`; the mirrored views are mirrored along the width."""
        return self.pool.read(indices % POOL_SIZE, mirrored)


@dataclasses.dataclass(frozen=True)
class SyntheticDataset:
    """Random records in place of both splits of a prepared data set."""

    metadata: schema.Metadata

    def records(self, split: str, *, in_memory: bool = True) -> SyntheticRecords:
        """The records, the same for either split; they are always in memory."""
        del split, in_memory
        generator = np.random.default_rng(0)
        size = (1, POOL_SIZE, *self.metadata.shape)
        return SyntheticRecords(
            MemoryRecords(
                mean=generator.standard_normal(size, np.float32).astype(np.float16),
                std=np.full(size, 0.1, np.float16),
                label=generator.integers(self.metadata.num_classes, size=POOL_SIZE, dtype=np.int32),
            )
        )


def make_synthetic(shape: tuple[int, int, int], num_classes: int) -> SyntheticDataset:
    """Random latents of `shape` (H, W, C), normal with unit variance, and uniform labels below `num_classes`."""
    height, width, channels = shape
    return SyntheticDataset(
        schema.Metadata(
            schema_version=schema.SCHEMA_VERSION,
            source={"kind": "synthetic"},
            codec="none",
            latent_scale=1.0,
            shape=shape,
            num_classes=num_classes,
            class_names=tuple(str(label) for label in range(num_classes)),
            has_mirror=False,
            splits={split: schema.Split(NUM_RECORDS, ()) for split in schema.SPLITS},
            channel_mean=(0.0,) * channels,
            channel_std=(1.0,) * channels,
            fingerprint=f"synthetic-{height}x{width}x{channels}-{num_classes}",
        )
    )
