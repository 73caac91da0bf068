"""The suite's figures are those of its parts."""

import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.errors import UserError
from terdit_jax.evaluation import reference as reference_module
from terdit_jax.evaluation.features import FeatureNetwork, collect_features
from terdit_jax.evaluation.frechet import frechet_distance
from terdit_jax.evaluation.image_source import open_images
from terdit_jax.evaluation.inception_score import inception_score
from terdit_jax.evaluation.manifold import precision_recall
from terdit_jax.evaluation.reference import save_reference
from terdit_jax.evaluation.statistics import statistics
from terdit_jax.evaluation.suite import feature_statistics, find_reference, look_at, suite_metrics
from terdit_jax.parallel.mesh import single_device_mesh

RNG = np.random.default_rng(0)
MESH = single_device_mesh()
WEIGHT = RNG.normal(size=(7, 6)).astype(np.float32)


def extract(params, images):
    flat = images.astype(jnp.float32).reshape(len(images), -1) / 64
    return {"pool": flat[:, :6], "spatial": flat[:, 6:10]}


def make_network():
    return FeatureNetwork({"fc": {"weight": WEIGHT}}, extract, "nowhere", "0")


def open_reference(path):
    return look_at(find_reference(path), make_network(), MESH)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Images of samples and of a reference, whose distributions differ; features are 6 and 4 wide."""
    monkeypatch.setattr(reference_module, "KEYS", {"pool": ("mu", "sigma", 6), "spatial": ("mu_s", "sigma_s", 4)})
    for name, high in (("samples", 200), ("reference", 256)):
        np.savez(tmp_path / f"{name}.npz", arr_0=RNG.integers(0, high, (80, 2, 2, 3), np.uint8))
    return tmp_path


def features(path):
    return collect_features(make_network(), open_images(path), MESH)


def rows(path):
    with np.load(path) as arrays:
        flat = arrays["arr_0"].reshape(80, -1) / np.float32(64)
    return flat[:, :6], flat[:, 6:10]


def test_figures_are_those_of_the_parts(places):
    reference = open_reference(places / "reference.npz")
    metrics = suite_metrics(make_network(), features(places / "samples.npz"), reference)
    (pool, spatial), (real, real_spatial) = rows(places / "samples.npz"), rows(places / "reference.npz")
    logits = np.exp(pool.astype(np.float64) @ WEIGHT.T)
    expected = {
        "fid": frechet_distance(statistics(pool), statistics(real)),
        "sfid": frechet_distance(statistics(spatial), statistics(real_spatial)),
        "inception_score": inception_score([logits / logits.sum(axis=1, keepdims=True)]),
        **precision_recall(real, pool)._asdict(),
    }
    assert list(metrics) == list(expected)
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert 0 < metrics["fid"] != metrics["sfid"] > 0 and 0 < metrics["recall"] < 1


def test_a_saved_reference_gives_the_same_figures(places):
    samples = features(places / "samples.npz")
    reference = open_reference(places / "reference.npz")
    with np.load(places / "reference.npz") as arrays:
        save_reference(places / "saved.npz", reference.statistics, arrays["arr_0"])
    saved = open_reference(places / "saved.npz")
    assert suite_metrics(make_network(), samples, saved) == suite_metrics(make_network(), samples, reference)


def test_stored_statistics_are_taken_as_they_are(places):
    """Published files' statistics are of far more images than the ones beside them."""
    samples = features(places / "samples.npz")
    with np.load(places / "reference.npz") as arrays:
        save_reference(places / "saved.npz", feature_statistics(samples), arrays["arr_0"])
    metrics = suite_metrics(make_network(), samples, open_reference(places / "saved.npz"))
    assert metrics["fid"] < 1e-6 and metrics["sfid"] < 1e-6 and metrics["precision"] < 1


def test_a_reference_without_images_gives_no_precision(places):
    samples = features(places / "samples.npz")
    mean, covariance = statistics(RNG.normal(size=(20, 6)))
    np.savez(places / "bare.npz", mu=mean, sigma=covariance)
    metrics = suite_metrics(make_network(), samples, open_reference(places / "bare.npz"))
    assert list(metrics) == ["fid", "inception_score"]


def test_too_few_images_are_refused(places):
    np.savez(places / "few.npz", arr_0=np.zeros((3, 2, 2, 3), np.uint8))
    with pytest.raises(UserError, match="few.npz: 3 images are too few"):
        open_reference(places / "few.npz")


def test_a_file_of_something_else_is_refused(places):
    np.savez(places / "labels.npz", labels=np.zeros(3))
    with pytest.raises(UserError, match="neither images in arr_0 nor statistics of Inception, only .*labels"):
        open_reference(places / "labels.npz")
