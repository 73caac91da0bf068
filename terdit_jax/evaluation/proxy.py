"""Scores of generated images by a classifier trained on the real ones, for data sets and machines without Inception.

The command draws the samples and reads the data set. Scores are comparable only among samples judged on one data set
with one seed, and are never an FID.
"""

from typing import NamedTuple

import numpy as np

from terdit_jax.errors import UserError
from terdit_jax.evaluation.classifier import Classifier, train_classifier
from terdit_jax.evaluation.frechet import frechet_distance
from terdit_jax.evaluation.statistics import statistics
from terdit_jax.labels import check_labels


class LabelledImages(NamedTuple):
    """Images and their classes."""

    images: np.ndarray  # (N, H, W, C) float32 in [-1, 1]
    labels: np.ndarray  # (N,) integers


def sample_labels(heldout_labels: np.ndarray, num_samples: int) -> np.ndarray:
    """Labels (num_samples,) to draw, sorted, each class as frequent as among the held-out images.

    Class counts that differ by chance would move the means of the two sets apart and drown everything else in the
    Frechet distance of a classifier's features, in which classes are far apart.
    """
    positions = (2 * np.arange(num_samples) + 1) * len(heldout_labels) // (2 * num_samples)
    return np.sort(heldout_labels)[positions]


def proxy_metrics(
    train: LabelledImages,
    heldout: LabelledImages,
    samples: LabelledImages,
    num_classes: int,
    seed: int = 0,
    num_steps: int | None = None,
    classifier: Classifier | None = None,
) -> dict[str, float]:
    """Trains a classifier on `train` and judges `samples` against `heldout` with it.

    A Frechet distance between N and M images has a bias that falls as 1/N + 1/M, so the distance of the samples is
    given beside two of real images: between two halves of all of them, and with training images of the same classes
    in the samples' place, as far as there are enough. The last is what perfect samples would score.

    Args:
      train: real images that the classifier learns.
      heldout: real images that it does not.
      samples: generated images with the labels that were asked for; see `sample_labels`.
      num_classes: labels lie in [0, num_classes).
      seed: of the classifier and of the splits of real images.
      num_steps: of the classifier; None chooses 400 to 2,000 by the number of training images.
      classifier: one that was trained so before, to judge more samples with it.

    Returns:
      `classifier_heldout_accuracy` and `classifier_agreement` (share of samples read as the label asked for), in
      [0, 1]; `classifier_frechet_distance` (samples and held-out), `..._floor` (training and held-out images) and
      `..._halves`; `classifier_frechet_ratio` = distance / halves; `classifier_frechet_ratio_floor` = floor / halves.

    Raises:
      UserError: samples of another shape than the real images, values that are not finite, labels that do not fit.
    """
    check_samples(samples, train.images.shape[1:], num_classes)
    rng = np.random.default_rng(seed)
    first, second = _halves(np.concatenate([train.labels, heldout.labels]), rng)
    alike = _same_classes(train.labels, samples.labels, rng)
    if min(len(alike), len(heldout.labels), len(second)) < 2:
        raise UserError(
            f"{len(heldout.labels)} held-out images and {len(alike)} training images of the samples' classes: a "
            "comparison needs at least 2 of each"
        )

    if classifier is None:
        num_steps = num_steps or classifier_steps(len(train.images))
        classifier = train_classifier(train.images, train.labels, num_classes, seed, num_steps)
    of_train, of_heldout, of_samples = (classifier.features(images) for images, _ in (train, heldout, samples))
    real = np.concatenate([of_train, of_heldout])
    distance, floor = _distance(of_samples, of_heldout), _distance(of_train[alike], of_heldout)
    halves = _distance(real[first], real[second])
    if not halves:
        raise UserError("the data set's images all look the same to the classifier: nothing can be judged by them")
    return {
        "classifier_heldout_accuracy": _share_read_as_labelled(classifier, heldout),
        "classifier_agreement": _share_read_as_labelled(classifier, samples),
        "classifier_frechet_distance": distance,
        "classifier_frechet_distance_floor": floor,
        "classifier_frechet_distance_halves": halves,
        "classifier_frechet_ratio": distance / halves,
        "classifier_frechet_ratio_floor": floor / halves,
    }


def check_samples(samples: LabelledImages, shape: tuple[int, ...], num_classes: int, prefix: str = "") -> None:
    """Raises UserError unless samples have the `shape` (H, W, C) of real images, finite values and a class each."""
    images, labels = samples
    if images.shape[1:] != tuple(shape):
        raise UserError(f"{prefix}samples are {images.shape[1:]}, the data set's images {tuple(shape)} (H, W, C)")
    if labels.shape != images.shape[:1]:
        raise UserError(f"{prefix}{len(images)} samples with labels of shape {labels.shape}: expected one each")
    if len(images) < 2:
        raise UserError(f"{prefix}{len(images)} samples are too few, the least is 2")
    check_labels(labels, num_classes, owner="the data set", prefix=prefix)
    if not np.isfinite(images).all():
        raise UserError(f"{prefix}{(~np.isfinite(images)).sum()} of {images.size} sample values are not finite")


def classifier_steps(num_images: int) -> int:
    """For how many steps a classifier of `num_images` images is trained."""
    return min(2000, max(400, num_images // 10))


def _share_read_as_labelled(classifier: Classifier, labelled: LabelledImages) -> float:
    return float(np.mean(classifier.logits(labelled.images).argmax(axis=1) == labelled.labels))


def _distance(features: np.ndarray, others: np.ndarray) -> float:
    return frechet_distance(statistics(features), statistics(others))


def _halves(labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices of two random halves with equally many of each class, give or take one."""
    by_class = np.lexsort((rng.random(len(labels)), labels))
    return by_class[::2], by_class[1::2]


def _same_classes(labels: np.ndarray, wanted: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Indices of random images, of each class as many as `wanted` has, or all where there are fewer."""
    classes, counts = np.unique(wanted, return_counts=True)
    chosen = [rng.permutation(np.flatnonzero(labels == k))[:n] for k, n in zip(classes, counts, strict=True)]
    return np.concatenate(chosen)
