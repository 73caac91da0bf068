"""Scores of a run in training: samples of the averaged weights, judged by the proxy's classifier.

The training loop decides when that happens and what becomes of it.
"""

from collections.abc import Callable
import functools

import numpy as np

from terdit_jax.checkpoints.best import Judge, Judgement
from terdit_jax.data.reader import AnyDataset, Dataset
from terdit_jax.errors import UserError
from terdit_jax.evaluation.classifier import Classifier, train_classifier
from terdit_jax.evaluation.proxy import LabelledImages, classifier_steps, proxy_metrics, sample_labels

DrawImages = Callable[[dict, np.ndarray], np.ndarray]  # EMA parameters, labels (N,) -> (N, H, W, C) in [-1, 1]


def make_proxy_judge(dataset: AnyDataset, num_samples: int, draw: DrawImages, seed: int = 0) -> Judge:
    """A judge by `proxy.proxy_metrics`, whose classifier is trained when it is first called; the best weights have the
    smallest Frechet distance to the held-out images.

    Args:
      dataset: of images.
      num_samples: images drawn each time, always from the same noise.
      draw: draws them.
      seed: of the classifier.

    Raises:
      UserError: a data set of latents, or one without held-out images.
    """
    metadata = dataset.metadata
    if not isinstance(dataset, Dataset) or metadata.codec != "none":
        raise UserError("config.log.score_every needs a data set of images, for a classifier judges them: set it to 0")
    train, heldout = (read_images(dataset, split) for split in ("train", "heldout"))
    labels = sample_labels(heldout.labels, num_samples)

    @functools.cache
    def trained() -> Classifier:
        steps = classifier_steps(len(train.images))
        return train_classifier(train.images, train.labels, metadata.num_classes, seed, steps)

    def judge(step: int, ema_params: dict) -> Judgement:
        del step
        samples = LabelledImages(draw(ema_params, labels), labels)
        figures = proxy_metrics(train, heldout, samples, metadata.num_classes, seed, classifier=trained())
        return Judgement(figures, figures["classifier_frechet_distance"])

    return judge


def read_images(dataset: Dataset, split: str) -> LabelledImages:
    """All images of a split."""
    records = dataset.records(split, in_memory=True)
    batch = records.read(np.arange(len(records)))
    return LabelledImages(batch["mean"].astype(np.float32), batch["label"])
