"""The Frechet distance against the ADM evaluator's and closed forms."""

import numpy as np
import pytest

from terdit_jax.errors import UserError
from terdit_jax.evaluation.frechet import frechet_distance
from terdit_jax.evaluation.statistics import Statistics, statistics
from tests.golden_models import golden_arrays


def _rotation(dim, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]


def _gaussian(mean, eigenvalues, rotation):
    return Statistics(np.asarray(mean, float), rotation @ np.diag(eigenvalues) @ rotation.T)


def test_golden_features_have_the_evaluators_distance():
    golden = golden_arrays("adm_metrics")
    expected = pytest.approx(float(golden["fid"]), rel=1e-6)
    assert frechet_distance(statistics(golden["real"]), statistics(golden["fake"])) == expected
    stored = (Statistics(golden[f"mu_{name}"], golden[f"sigma_{name}"]) for name in ("real", "fake"))
    assert frechet_distance(*stored) == expected


def test_commuting_covariances_match_closed_form():
    rotation = _rotation(6, 1)
    a_values, b_values = np.array([1, 2, 3, 4, 5, 6.0]), np.array([6, 1, 0.5, 4, 9, 2.0])
    a, b = _gaussian(np.zeros(6), a_values, rotation), _gaussian(np.arange(6), b_values, rotation)
    expected = np.square(np.arange(6)).sum() + np.square(np.sqrt(a_values) - np.sqrt(b_values)).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_two_by_two_covariances_that_do_not_commute_match_closed_form():
    # In two dimensions tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)), and det(A B) = det A det B.
    a = Statistics(np.zeros(2), np.array([[2.0, 0.7], [0.7, 1.0]]))
    b = Statistics(np.ones(2), np.array([[1.0, -0.4], [-0.4, 3.0]]))
    product = a.covariance @ b.covariance
    overlap = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = 2 + np.trace(a.covariance + b.covariance) - 2 * overlap
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-12)


def test_rank_deficient_covariances_match_closed_form():
    rotation = _rotation(64, 2)
    a_values, b_values = np.zeros(64), np.zeros(64)
    a_values[:3], b_values[2:5] = 1e4, 1e4  # they share one direction; the other four stand alone
    distance = frechet_distance(
        _gaussian(np.zeros(64), a_values, rotation), _gaussian(np.zeros(64), b_values, rotation)
    )
    assert distance == pytest.approx(4e4, abs=1e-6)


@pytest.mark.parametrize("dim", [32, 512])
def test_ill_conditioned_covariances_match_closed_form(dim):
    """Rotated alike, with eigenvalues from 1e-12 to 1, for the second in another order."""
    rotation, rng = _rotation(dim, 5), np.random.default_rng(6)
    values = np.logspace(-12, 0, dim)
    other = rng.permutation(values)
    mean = 1e-3 * rng.normal(size=dim)
    expected = np.square(mean).sum() + np.square(np.sqrt(values) - np.sqrt(other)).sum()
    a, b = _gaussian(np.zeros(dim), values, rotation), _gaussian(mean, other, rotation)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) < 1e-6
    half = np.where(np.arange(dim) % 2, 0.0, values)  # and of half the rank
    expected = np.square(mean).sum() + np.square(np.sqrt(half) - np.sqrt(other)).sum()
    assert frechet_distance(_gaussian(np.zeros(dim), half, rotation), b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rows", [10, 500])
def test_distance_to_itself_is_zero(rows):
    features = statistics(30 * np.random.default_rng(3).normal(size=(rows, 64)) @ _rotation(64, 4) + 100)
    assert 0 <= frechet_distance(features, features) < 1e-6


def test_unusable_features_are_refused():
    with pytest.raises(UserError, match="widths 2 and 3"):
        frechet_distance(_gaussian(np.zeros(2), np.ones(2), np.eye(2)), _gaussian(np.zeros(3), np.ones(3), np.eye(3)))
    with pytest.raises(UserError, match=r"\(1, 4\)"):
        statistics(np.zeros((1, 4)))
    with pytest.raises(UserError, match="1 of 8"):
        statistics(np.array([[1, 2, 3, np.nan], [1, 2, 3, 4]]))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e-20, -3e7])
def test_constant_features_have_no_spread(value):
    """Their covariance is zero up to rounding, with eigenvalues on either side of it."""
    other = statistics(np.random.default_rng(0).normal(size=(50, 8)))
    constant = statistics(np.full((7, 8), value, np.float32))
    for spread in (constant.covariance, -1e-40 * np.eye(8), np.zeros((8, 8))):
        found = frechet_distance(Statistics(constant.mean, spread), other)
        expected = np.square(constant.mean - other.mean).sum() + np.trace(other.covariance)
        assert found == pytest.approx(expected, rel=1e-6)
        assert frechet_distance(Statistics(constant.mean, spread), constant) == pytest.approx(0, abs=1e-9)
