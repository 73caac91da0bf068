"""The proxy's classifier learns, repeats itself, and gives the proxy metrics their meaning."""

import re

import numpy as np
import pytest
from sklearn import datasets

from terdit_jax.errors import UserError
from terdit_jax.evaluation import proxy
from terdit_jax.evaluation.classifier import BATCH_SIZE, train_classifier
from terdit_jax.evaluation.proxy import LabelledImages, proxy_metrics, sample_labels

CLASSES = 10


@pytest.fixture(scope="module")
def digits():
    """(train, heldout): 1,437 and 360 digits."""
    source = datasets.load_digits()
    images = (source.images[..., None] / 8 - 1).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    return tuple(LabelledImages(images[part], source.target[part]) for part in (order[360:], order[:360]))


def test_learns_digits(digits):
    train, heldout = digits
    classifier = train_classifier(train.images, train.labels, CLASSES, num_steps=100)
    logits = classifier.logits(heldout.images)
    assert logits.shape == (360, CLASSES) and logits.dtype == np.float32
    assert np.mean(logits.argmax(axis=1) == heldout.labels) > 0.95
    features = classifier.features(heldout.images)
    assert features.shape == (360, 64) and features.dtype == np.float32
    # 360 is no multiple of the batch: the filled-up last batch must not change an answer.
    assert 360 % BATCH_SIZE
    np.testing.assert_allclose(classifier.features(heldout.images[-3:]), features[-3:], rtol=1e-5, atol=1e-5)


def test_seed_decides_everything(digits):
    train, heldout = digits
    first, again, other = (train_classifier(train.images, train.labels, CLASSES, seed, 3) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.logits(heldout.images), again.logits(heldout.images))
    assert not np.allclose(first.logits(heldout.images), other.logits(heldout.images))


@pytest.mark.parametrize("shape", [(28, 28, 3), (3, 5, 1)])
def test_takes_images_of_any_size(shape):
    images = np.random.default_rng(0).uniform(-1, 1, size=(6, *shape)).astype(np.float32)
    classifier = train_classifier(images, np.arange(6), 6, num_steps=1)
    assert classifier.features(images).shape == (6, 64)
    assert np.isfinite(classifier.logits(images)).all()


def test_unusable_images_are_refused():
    images = np.zeros((4, 8, 8, 1), np.float32)
    with pytest.raises(UserError, match="label 3 is out of range: the classifier has classes 0 to 2"):
        train_classifier(images, np.arange(4), 3)
    with pytest.raises(UserError, match=r"\(3,\)"):
        train_classifier(images, np.arange(3), 3)


def test_sample_labels_keep_the_classes_proportions():
    labels = sample_labels(np.array([2, 0, 1, 2, 2, 1]), 600)
    assert np.bincount(labels).tolist() == [100, 200, 300]
    assert np.bincount(sample_labels(np.arange(10), 25)).tolist() == pytest.approx([2.5] * 10, abs=0.5)


def test_proxy_metrics_tell_good_samples_from_bad(digits):
    train, heldout = digits
    labels = sample_labels(heldout.labels, 300)
    chosen = [np.flatnonzero(train.labels == k)[: (labels == k).sum()] for k in range(CLASSES)]
    # `labels` is sorted, so image i of the concatenation has class labels[i].
    real = train.images[np.concatenate(chosen)]
    noisy = real + 0.5 * np.random.default_rng(0).normal(size=real.shape).astype(np.float32)
    means = np.stack([train.images[train.labels == k].mean(axis=0) for k in range(CLASSES)])[labels]
    half_wrong = np.where(np.arange(300) % 2, labels, (labels + 1) % CLASSES)

    def judge(images, asked):
        return proxy_metrics(train, heldout, LabelledImages(images, asked), CLASSES, num_steps=100)

    good, noise, collapse = judge(real, labels), judge(noisy, labels), judge(means, half_wrong)
    assert good["classifier_heldout_accuracy"] > 0.95 and good["classifier_agreement"] > 0.95
    # Training images in the samples' place score near the floor, which is only the bias of small sets.
    assert good["classifier_frechet_ratio"] < 1.5 * good["classifier_frechet_ratio_floor"] < 10
    assert noise["classifier_frechet_distance"] > 2 * good["classifier_frechet_distance"]
    # A class's mean image is always read as that class; only the distance sees that it is the same one every time.
    assert collapse["classifier_agreement"] == pytest.approx(0.5, abs=0.02)
    assert collapse["classifier_frechet_distance"] > 5 * good["classifier_frechet_distance"]


def test_proxy_refuses_unusable_samples(digits):
    train, heldout = digits
    images = heldout.images[:20].copy()
    with pytest.raises(UserError, match=r"\(4, 8, 1\)"):
        proxy_metrics(train, heldout, LabelledImages(images[:, :4], heldout.labels[:20]), CLASSES)
    images[3, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match="1 of 1280"):
        proxy_metrics(train, heldout, LabelledImages(images, heldout.labels[:20]), CLASSES)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(5, 15), "label 10 is out of range: the data set has classes 0 to 9"),
        (np.arange(10)[:, None], "10 samples with labels of shape"),
        (np.arange(9), "10 samples with labels of shape"),
    ],
)
def test_labels_are_checked_before_a_classifier_is_trained(digits, monkeypatch, labels, message):
    train, heldout = digits
    monkeypatch.setattr(proxy, "train_classifier", None)  # whoever calls it fails
    with pytest.raises(UserError, match=re.escape(message)):
        proxy_metrics(train, heldout, LabelledImages(heldout.images[:10], labels), CLASSES)


def test_what_cannot_be_compared_is_refused_before_a_classifier_is_trained(digits, monkeypatch):
    train, heldout = digits
    monkeypatch.setattr(proxy, "train_classifier", None)
    seven = LabelledImages(heldout.images[:4], np.full(4, 7))
    without = LabelledImages(train.images[train.labels != 7], train.labels[train.labels != 7])
    with pytest.raises(UserError, match="0 training images of the samples' classes"):
        proxy_metrics(without, heldout, seven, CLASSES)
    with pytest.raises(UserError, match="1 samples are too few"):
        proxy_metrics(train, heldout, LabelledImages(seven.images[:1], seven.labels[:1]), CLASSES)
    with pytest.raises(UserError, match="1 held-out images"):
        proxy_metrics(train, LabelledImages(heldout.images[:1], heldout.labels[:1]), seven, CLASSES)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_constant_samples_are_judged(digits, value):
    train, heldout = digits
    samples = LabelledImages(np.full((20, 8, 8, 1), value, np.float32), np.arange(20) % CLASSES)
    found = proxy_metrics(train, heldout, samples, CLASSES, num_steps=3)
    assert all(np.isfinite(list(found.values()))) and found["classifier_agreement"] == pytest.approx(0.1)


def test_a_data_set_of_equal_images_is_refused(digits):
    flat = LabelledImages(np.zeros((40, 8, 8, 1), np.float32), np.arange(40) % CLASSES)
    with pytest.raises(UserError, match="all look the same to the classifier"):
        proxy_metrics(flat, flat, digits[1], CLASSES, num_steps=1)
