"""The first two moments of a feature set, in float64 on the host, taken in portions and merged.

Callers decide which network the features come from and what is made of the moments.
"""

from typing import NamedTuple

import numpy as np

from terdit_jax.errors import UserError

CHUNK = 4096  # rows that are held in float64 at once


class Statistics(NamedTuple):
    """The first two moments of a feature set."""

    mean: np.ndarray  # (D,) float64
    covariance: np.ndarray  # (D, D) float64, ddof 1


class Moments:
    """Takes features in any portions; memory is one (D, D) matrix, however many there are.

    Portions are merged by the update of Chan, Golub and LeVeque (1979), which subtracts means before it squares: a
    mean far from zero costs no digits.
    """

    def __init__(self, width: int):
        self.count = 0
        self.mean = np.zeros(width)
        self.scatter = np.zeros((width, width))  # sum of outer products around the mean

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
            self.merge(len(rows), mean, centred.T @ centred)
        return self

    def merge(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> "Moments":
        """Takes rows by their number, mean (D,) and scatter (D, D), such as another's attributes."""
        if count:
            total = self.count + count
            step = mean - self.mean
            self.scatter += scatter + np.outer(step, step) * (self.count * count / total)
            self.mean = self.mean + step * (count / total)
            self.count = total
        return self

    def statistics(self) -> Statistics:
        """The statistics so far. Raises UserError for fewer than two rows."""
        if self.count < 2:
            raise UserError(f"{self.count} rows of features: a covariance needs at least 2")
        return Statistics(self.mean.copy(), self.scatter / (self.count - 1))


def statistics(features: np.ndarray) -> Statistics:
    """Mean and covariance (ddof 1, as in the ADM evaluator) of `features` (N, D), in float64.

    Raises:
        UserError: fewer than two rows, or values that are not finite.
    """
    features = np.asarray(features)
    if features.ndim != 2 or len(features) < 2:
        raise UserError(f"features of shape {features.shape}: a covariance needs (N, D) with N of at least 2")
    return Moments(features.shape[1]).add(features).statistics()
