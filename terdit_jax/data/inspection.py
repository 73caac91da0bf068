"""A look into a prepared data set: some of its records, and the numbers in which a wrong scale or layout would show.

Images are made of the latents elsewhere; nothing here is needed for training.
"""

import dataclasses

import numpy as np

from terdit_jax.data import schema
from terdit_jax.data.reader import Dataset
from terdit_jax.labels import check_labels


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Records spread evenly over the training split."""

    views: tuple[np.ndarray, ...]  # posterior means of the images and, where stored, of their mirrors, (N, H, W, C)
    spreads: tuple[np.ndarray, ...]  # posterior standard deviations alike
    labels: np.ndarray  # (N,)
    captions: tuple[str, ...]  # class name and source id of each


def inspect(dataset: Dataset, num_samples: int) -> Inspection:
    """Reads `num_samples` records, or all if there are fewer.

    Raises:
      UserError: a record that cannot be read.
    """
    records = dataset.stored("train")
    chosen = np.unique(np.linspace(0, len(records) - 1, min(num_samples, len(records))).astype(int))
    sample = records.examples(chosen)
    metadata = dataset.metadata
    names = schema.array_names(metadata.has_mirror)
    arrays = [np.stack([record[name] for record in sample]).astype(np.float32) for name in names]
    labels = np.array([record["label"] for record in sample])
    check_labels(labels, metadata.num_classes, owner="the data set", prefix=f"{dataset.path}: ")
    captions = tuple(
        f"{record['label']} {metadata.class_names[record['label']]}: {record['source_id'].decode(errors='replace')}"
        for record in sample
    )
    return Inspection(tuple(arrays[::2]), tuple(arrays[1::2]), labels, captions)


def format_report(metadata: schema.Metadata, inspection: Inspection) -> str:
    """The statistics in lines: records, what the metadata claims of each channel, and what the sample shows."""
    train, heldout = (metadata.splits[split] for split in schema.SPLITS)
    height, width, channels = metadata.shape
    lines = [
        f"{train.records:,} training and {heldout.records:,} held-out records of {height}x{width}x{channels}, "
        f"{metadata.num_classes} classes, codec {metadata.codec}, scale {metadata.latent_scale}",
        f"sample: {len(inspection.labels)} records, {len(np.unique(inspection.labels))} classes",
        f"{'channel':>8}{'mean':>10}{'std':>10}{'scaled std':>12}{'sample mean':>13}{'sample std':>12}"
        f"{'lowest':>10}{'highest':>10}{'spread':>10}",
    ]
    means, spreads = inspection.views[0], inspection.spreads[0]
    for channel in range(channels):
        mean, spread = means[..., channel].astype(np.float64), spreads[..., channel].astype(np.float64)
        std = np.sqrt(mean.var() + (spread**2).mean())
        lines.append(
            f"{channel:>8}{metadata.channel_mean[channel]:>10.4f}{metadata.channel_std[channel]:>10.4f}"
            f"{metadata.channel_std[channel] * metadata.latent_scale:>12.4f}{mean.mean():>13.4f}{std:>12.4f}"
            f"{mean.min():>10.3f}{mean.max():>10.3f}{spread.mean():>10.4f}"
        )
    if len(inspection.views) == 2:
        mirrored = inspection.views[1][:, :, ::-1]
        difference = np.sqrt(np.mean((mirrored - means) ** 2) / np.mean(means**2))
        lines.append(f"latents of mirrored images differ from mirrored latents by {difference:.1%} (root mean square)")
    return "\n".join(lines)
