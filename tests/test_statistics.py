"""Moments taken in portions and merged are those of the whole, also where float64 is needed for it."""

import numpy as np
import pytest

from terdit_jax.errors import UserError
from terdit_jax.evaluation import statistics as statistics_module
from terdit_jax.evaluation.statistics import Moments, statistics


@pytest.fixture(scope="module")
def features():
    rng = np.random.default_rng(0)
    return (1e3 + rng.normal(size=(700, 9)) @ rng.normal(size=(9, 9))).astype(np.float32)


def assert_same(found, expected):
    assert found.covariance.dtype == np.float64
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-13)
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=0, atol=1e-12 * expected.covariance.max())


def test_they_are_mean_and_unbiased_covariance(features, monkeypatch):
    monkeypatch.setattr(statistics_module, "CHUNK", 64)
    exact = features.astype(np.float64)
    centred = exact - exact.mean(axis=0)
    found = statistics(features)
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, centred.T @ centred / 699, rtol=1e-9)
    np.testing.assert_allclose(found.covariance, np.cov(exact.T), rtol=1e-9)


@pytest.mark.parametrize("cuts", [[], [1], [0, 5, 5, 699], list(range(0, 700, 100))])
def test_portions_are_the_whole(features, cuts):
    moments = Moments(9)
    for portion in np.split(features, cuts):
        moments.add(portion)
    assert_same(moments.statistics(), statistics(features))


def test_parts_of_several_hosts_are_merged(features):
    parts = [Moments(9).add(part) for part in np.split(features, [100, 100, 450])]
    whole = Moments(9)
    for part in parts:
        whole.merge(part.count, part.mean, part.scatter)
    assert whole.count == 700
    assert_same(whole.statistics(), statistics(features))
    # A second use of a part would show whether merging took it apart.
    assert_same(parts[0].statistics(), statistics(features[:100]))


def test_statistics_taken_before_the_end_stay_as_they_are(features):
    moments = Moments(9).add(features[:100])
    early = moments.statistics()
    moments.add(features[100:])
    assert_same(early, statistics(features[:100]))


def test_unusable_features_are_refused():
    with pytest.raises(UserError, match=r"\(5, 8\): expected \(N, 9\)"):
        Moments(9).add(np.zeros((5, 8)))
    with pytest.raises(UserError, match="1 rows"):
        Moments(9).add(np.zeros((1, 9))).statistics()
    with pytest.raises(UserError, match="2 of 18"):
        Moments(9).add(np.where(np.arange(18).reshape(2, 9) % 9 == 4, np.inf, 0))
