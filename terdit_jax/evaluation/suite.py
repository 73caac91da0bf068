"""The ADM suite: FID, sFID, inception score, precision and recall of samples against a reference."""

from collections.abc import Callable
import os
from pathlib import Path
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from terdit_jax.choices import FEATURE_BATCH_SIZE
from terdit_jax.errors import UserError
from terdit_jax.evaluation import inception
from terdit_jax.evaluation.features import FeatureNetwork, ImageFeatures, collect_features
from terdit_jax.evaluation.frechet import frechet_distance
from terdit_jax.evaluation.image_source import ARRAY, ImageSource, open_images
from terdit_jax.evaluation.inception_score import SPLIT, inception_score
from terdit_jax.evaluation.inception_weights import load_inception
from terdit_jax.evaluation.manifold import NEIGHBOURS, precision_recall
from terdit_jax.evaluation.reference import read_statistics, stored_keys
from terdit_jax.evaluation.statistics import Statistics

MIN_IMAGES = NEIGHBOURS + 1
PUBLISHED_COUNT = 50_000  # samples that published figures are of


class StoredReference(NamedTuple):
    """A reference as it is found, before a network looks at its images."""

    name: str
    statistics: dict[str, Statistics]  # by feature
    images: ImageSource | None


class Reference(NamedTuple):
    """The set that samples are compared with."""

    name: str
    statistics: dict[str, Statistics]  # by feature
    pool: np.ndarray | None  # (N, D) float32; None if there are no images


def inception_network(path: str | os.PathLike | None = None) -> FeatureNetwork:
    """The FID network with the weights at a path, or fetched. Raises UserError as `load_inception` does."""
    loaded = load_inception(path)
    return FeatureNetwork(loaded.params, inception_extract, loaded.source, loaded.sha256)


def inception_extract(params: dict, images: Array) -> dict[str, Array]:
    """The features of images (B, H, W, 3) that the suite keeps: `pool`, from which classes follow, and `spatial`."""
    features = inception.extract(params, images)
    return {"pool": features.pool, "spatial": features.spatial}


def find_reference(path: str | os.PathLike) -> StoredReference:
    """The reference at a path: an npz of statistics, images or both, a folder of images, or a prepared data set.

    Statistics in a file are taken as they are.

    Raises:
      UserError: as `open_images` and `read_statistics`; too few images.
    """
    statistics: dict[str, Statistics] = {}
    if Path(path).is_file():
        keys = stored_keys(path)
        statistics = read_statistics(path)
        if ARRAY not in keys:
            if not statistics:
                there = sorted(key[:20] for key in keys)[:8]
                raise UserError(f"{path} holds neither images in {ARRAY} nor statistics of Inception, only {there}")
            return StoredReference(str(path), statistics, None)
    return StoredReference(str(path), statistics, check_count(open_images(path)))


def look_at(
    stored: StoredReference,
    network: FeatureNetwork,
    mesh: Mesh,
    batch_size: int = FEATURE_BATCH_SIZE,
    say: Callable[[str], None] = lambda line: None,
) -> Reference:
    """The reference with the statistics that it lacks, those of its images, and with their features."""
    if stored.images is None:
        return Reference(stored.name, stored.statistics, None)
    features = collect_features(network, stored.images, mesh, batch_size, say)
    return Reference(stored.name, feature_statistics(features) | stored.statistics, features.pool)


def feature_statistics(features: ImageFeatures) -> dict[str, Statistics]:
    """The statistics of every feature."""
    return {name: moments.statistics() for name, moments in features.moments.items()}


def check_count(source: ImageSource) -> ImageSource:
    """The source itself. Raises UserError if it has too few images for any figure."""
    if source.count < MIN_IMAGES:
        raise UserError(
            f"{source.name}: {source.count} images are too few, the least is {MIN_IMAGES} and published figures are"
            f" of {PUBLISHED_COUNT:,}"
        )
    return source


def suite_metrics(network: FeatureNetwork, samples: ImageFeatures, reference: Reference) -> dict[str, float]:
    """The figures of samples.

    Args:
      network: whose features these are.
      samples: features of the samples, in order.
      reference: of the same network.

    Returns:
      `fid`, `sfid`, `inception_score`, `precision`, `recall`; of a reference without images not the last two.

    Raises:
      UserError: features of other widths, or too few.
    """
    statistics = feature_statistics(samples)
    metrics = {
        {"pool": "fid", "spatial": "sfid"}[name]: frechet_distance(statistics[name], reference.statistics[name])
        for name in statistics
        if name in reference.statistics
    }
    metrics["inception_score"] = _inception_score(network.params, samples.pool)
    if reference.pool is not None:
        metrics |= precision_recall(reference.pool, samples.pool)._asdict()
    return metrics


def _inception_score(params: dict, pool: np.ndarray) -> float:
    weight = jnp.asarray(params["fc"]["weight"])
    return inception_score(
        np.asarray(_probabilities(weight, pool[start : start + SPLIT])) for start in range(0, len(pool), SPLIT)
    )


@jax.jit
def _probabilities(weight: Array, pool: Array) -> Array:
    return jax.nn.softmax(jnp.matmul(pool, weight.T, precision=jax.lax.Precision.HIGHEST))
