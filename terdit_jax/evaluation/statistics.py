"""The first two moments of a feature set, in float64 on the host, taken in portions and merged.

Which network the features come from, and what is made of the moments, is left to others.
"""

from typing import NamedTuple

import numpy as np

from terdit_jax.errors import UserError

CHUNK = 4096  # rows that are held in float64 at once


class Statistics(NamedTuple):
    """The first two moments of a feature set."""

    mean: np.ndarray  # (D,) float64
    covariance: np.ndarray  # (D, D) float64, ddof 1
    count: int


class Moments:
    """Takes features in any portions; memory is one (D, D) matrix, however many there are.

    Portions are merged by the update of Chan, Golub and LeVeque (1979), which subtracts means before it squares: a
    mean far from zero costs no digits.
    """

    def __init__(self, width: int):
        self.count = 0
        self.mean = np.zeros(width)
        self.scatter = np.zeros((width, width))  # sum of outer products around the mean

    @classmethod
    def of(cls, count: int, mean: np.ndarray, scatter: np.ndarray) -> "Moments":
        """Those with these attributes."""
        moments = cls(len(mean))
        moments.count, moments.mean, moments.scatter = count, mean, scatter
        return moments

    def add(self, features: np.ndarray) -> "Moments":
        """Takes (N, D) more rows. Raises UserError for another width or values that are not finite."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise UserError(f"features of shape {features.shape}: expected (N, {len(self.mean)})")
        for start in range(0, len(features), CHUNK):
            rows = np.asarray(features[start : start + CHUNK], np.float64)
            if not np.isfinite(rows).all():
                raise UserError(f"{(~np.isfinite(rows)).sum()} of {rows.size} feature values are not finite")
            mean = rows.mean(axis=0)
            centred = rows - mean
            self._merge(len(rows), mean, centred.T @ centred)
        return self

    def merge(self, other: "Moments") -> "Moments":
        """Takes what another has taken."""
        if other.count:
            self._merge(other.count, other.mean, other.scatter)
        return self

    def statistics(self) -> Statistics:
        """Of everything so far. Raises UserError for fewer than two rows."""
        if self.count < 2:
            raise UserError(f"{self.count} rows of features: a covariance needs at least 2")
        return Statistics(self.mean.copy(), self.scatter / (self.count - 1), self.count)

    def _merge(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self.count + count
        step = mean - self.mean
        self.scatter += scatter + np.outer(step, step) * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total


def statistics(features: np.ndarray) -> Statistics:
    """Mean and covariance (ddof 1, as in the ADM evaluator) of `features` (N, D), in float64.

    Raises:
        UserError: fewer than two rows, or values that are not finite.
    """
    features = np.asarray(features)
    if features.ndim != 2 or len(features) < 2:
        raise UserError(f"features of shape {features.shape}: a covariance needs (N, D) with N of at least 2")
    return Moments(features.shape[1]).add(features).statistics()
