"""The inception score (Salimans et al., arXiv 1606.03498) of class probabilities, split by split as they come.

Which network the probabilities come from is left to the caller.
"""

import numpy as np

from terdit_jax.errors import UserError

SPLIT = 5000  # images, in the order in which they come


class InceptionScore:
    """Takes probabilities (N, K) in any portions and remembers K numbers a split."""

    def __init__(self, split: int = SPLIT):
        self._split = split
        self._scores: list[float] = []
        self._start()

    def add(self, probabilities: np.ndarray) -> "InceptionScore":
        """Takes the next rows, each a distribution over K classes.

        Raises:
          UserError: values below 0 or not finite.
        """
        rows = np.asarray(probabilities, np.float64)
        if not (np.isfinite(rows).all() and (rows >= 0).all()):
            raise UserError("probabilities hold values below 0 or not finite: the features are not the network's")
        while len(rows):
            taken, rows = rows[: self._split - self._count], rows[self._split - self._count :]
            self._count += len(taken)
            self._sum = self._sum + taken.sum(axis=0)
            self._negative_entropy += _x_log_x(taken)
            if self._count == self._split:
                self._finish()
        return self

    def score(self) -> float:
        """The mean over splits, a last shorter one included, of exp(mean KL(p || mean of p))."""
        if self._count:
            self._finish()
        if not self._scores:
            raise UserError("no probabilities: an inception score needs images")
        return float(np.mean(self._scores))

    def _start(self) -> None:
        self._count, self._sum, self._negative_entropy = 0, np.zeros(()), 0.0

    def _finish(self) -> None:
        # mean KL(p || q) = mean of sum p log p - sum q log q, for q is the mean of p.
        self._scores.append(float(np.exp(self._negative_entropy / self._count - _x_log_x(self._sum / self._count))))
        self._start()


def inception_score(probabilities: np.ndarray, split: int = SPLIT) -> float:
    """Of probabilities (N, K) in order. Raises UserError as `InceptionScore` does."""
    return InceptionScore(split).add(probabilities).score()


def _x_log_x(x: np.ndarray) -> float:
    """Summed; 0 log 0 is 0."""
    return float((x * np.log(np.where(x > 0, x, 1))).sum())
