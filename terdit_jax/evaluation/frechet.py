"""The Frechet distance between two Gaussians, in float64 on the host.

The moments come from `statistics`. Callers choose the network and how many images make a fair comparison.
"""

import numpy as np

from terdit_jax.errors import UserError
from terdit_jax.evaluation.statistics import Statistics


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), at least 0 (Dowson and Landau, 1982).

    With C = F F^T from a symmetric eigendecomposition, the last trace is the sum of the singular values of F_a^T F_b:
    real by construction, and exact to float64 for rank-deficient covariances, which need no added identity.

    Raises:
        UserError: the two feature widths differ.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(f"feature widths {a.mean.size} and {b.mean.size} differ: use one network for both sets")
    overlap = np.linalg.svd(_factor(a.covariance).T @ _factor(b.covariance), compute_uv=False).sum()
    distance = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    return max(0.0, float(distance))


def _factor(covariance: np.ndarray) -> np.ndarray:
    """F (D, rank) with F F^T = covariance; eigenvalues at or below rounding count as 0."""
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    rounding = max(0.0, eigenvalues[-1]) * len(eigenvalues) * np.finfo(np.float64).eps  # of constant features all are
    kept = eigenvalues > rounding  # a root would blow rounding of 1e-16 up to 1e-8
    return eigenvectors[:, kept] * np.sqrt(eigenvalues[kept])
