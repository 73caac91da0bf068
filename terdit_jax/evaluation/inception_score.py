"""The inception score (Salimans et al., arXiv 1606.03498) of class probabilities, split by split as they come.

The caller decides which network the probabilities come from.
"""

from collections.abc import Iterable

import numpy as np

from terdit_jax.errors import UserError

SPLIT = 5000  # images, in the order in which they come


def inception_score(splits: Iterable[np.ndarray]) -> float:
    """The mean over splits of exp(mean KL(p || mean of p)).

    Args:
      splits: probabilities (N, K), of `SPLIT` images each and of what is left in a last one. One is held at a time.

    Raises:
      UserError: no probabilities, or values below 0 or not finite.
    """
    scores = []
    for split in splits:
        rows = np.asarray(split, np.float64)
        if not (np.isfinite(rows).all() and (rows >= 0).all()):
            raise UserError("probabilities hold values below 0 or not finite: the features are not the network's")
        # mean KL(p || q) = mean of sum p log p - sum q log q, for q is the mean of p.
        scores.append(np.exp(_x_log_x(rows) / len(rows) - _x_log_x(rows.sum(axis=0) / len(rows))))
    if not scores:
        raise UserError("no probabilities: an inception score needs images")
    return float(np.mean(scores))


def _x_log_x(x: np.ndarray) -> float:
    """Summed; 0 log 0 is 0."""
    return float((x * np.log(np.where(x > 0, x, 1))).sum())
