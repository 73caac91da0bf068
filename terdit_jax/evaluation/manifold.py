"""Precision and recall by manifolds of nearest neighbours (Kynkäänniemi et al., arXiv 1904.06991), block by block.

A set's manifold is the union of balls around its features, each reaching to the k-th nearest other one. Precision is
the share of samples within the reference's manifold, recall the share of reference images within the samples'.
"""

from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from terdit_jax.batches import fill_up
from terdit_jax.errors import UserError

NEIGHBOURS = 3
BLOCK = 10_000  # rows and columns of the distances that exist at once, as in the ADM evaluator


class PrecisionRecall(NamedTuple):
    """Both as shares in [0, 1]."""

    precision: float
    recall: float


def precision_recall(reference: np.ndarray, samples: np.ndarray, block: int = BLOCK) -> PrecisionRecall:
    """Precision and recall of features (N, D) and (M, D), both float32.

    Distances are squared Euclidean ones, as |u|^2 - 2 uv + |v|^2. Memory on the device is that of a few blocks of
    `block` by `block` float32 and of two blocks of features, whatever N and M are.

    Args:
      block: images on either side of a block.

    Raises:
      UserError: other widths, values that are not finite, or too few rows for the k-th neighbour.
    """
    for name, features in (("reference", reference), ("samples", samples)):
        if features.ndim != 2 or len(features) <= NEIGHBOURS:
            raise UserError(
                f"{name}: features of shape {features.shape}, but the {NEIGHBOURS} nearest neighbours of precision and"
                f" recall take at least {NEIGHBOURS + 1} images"
            )
        if not np.isfinite(features).all():
            raise UserError(f"{name}: {(~np.isfinite(features)).sum()} of {features.size} features are not finite")
    if reference.shape[1] != samples.shape[1]:
        raise UserError(f"feature widths {reference.shape[1]} and {samples.shape[1]} differ: use one network for both")
    reference_radii, sample_radii = (_radii(features, block) for features in (reference, samples))

    reference_within, samples_within = np.zeros(len(reference), bool), np.zeros(len(samples), bool)
    for i in range(0, len(reference), block):
        rows, row_radii = _padded(reference, i, block), _padded(reference_radii, i, block, -1.0)
        for j in range(0, len(samples), block):
            columns, column_radii = _padded(samples, j, block), _padded(sample_radii, j, block, -1.0)
            of_rows, of_columns = _within(rows, row_radii, columns, column_radii)
            _take_any(reference_within, i, of_rows)
            _take_any(samples_within, j, of_columns)
    return PrecisionRecall(float(samples_within.mean()), float(reference_within.mean()))


def _radii(features: np.ndarray, block: int) -> np.ndarray:
    """(N,) squared distances to the k-th nearest neighbour; each row's own distance to itself is its nearest."""
    radii = np.empty(len(features), np.float32)
    for i in range(0, len(features), block):
        rows = _padded(features, i, block)
        nearest = jnp.full((len(rows), NEIGHBOURS + 1), jnp.inf)
        for j in range(0, len(features), block):
            count = min(block, len(features) - j)
            nearest = _nearest(nearest, rows, _padded(features, j, block), count)
        radii[i : i + block] = np.asarray(nearest[:, -1])[: len(features) - i]
    return radii


@jax.jit
def _nearest(nearest: Array, rows: Array, columns: Array, count: int) -> Array:
    """The smallest distances of each row so far (R, k + 1), ascending, with those to the first `count` columns."""
    distances = jnp.where(jnp.arange(len(columns)) < count, _distances(rows, columns), jnp.inf)
    closest, _ = jax.lax.top_k(-distances, min(NEIGHBOURS + 1, len(columns)))
    return -jax.lax.top_k(jnp.concatenate([-nearest, closest], axis=1), NEIGHBOURS + 1)[0]


@jax.jit
def _within(rows: Array, row_radii: Array, columns: Array, column_radii: Array) -> tuple[Array, Array]:
    """Which rows (R,) lie in a ball of the columns, and which columns (C,) in one of the rows; no ball below 0."""
    distances = _distances(rows, columns)
    return (distances <= column_radii).any(axis=1), (distances <= row_radii[:, None]).any(axis=0)


def _distances(rows: Array, columns: Array) -> Array:
    """(R, D), (C, D) -> (R, C) float32, squared."""
    # Float32 products of fewer bits, the accelerators' default, would be worth no more than float16.
    product = jnp.matmul(rows, columns.T, precision=jax.lax.Precision.HIGHEST)
    row_norms, column_norms = jnp.square(rows).sum(axis=1), jnp.square(columns).sum(axis=1)
    return jnp.maximum(row_norms[:, None] - 2 * product + column_norms, 0)


def _padded(rows: np.ndarray, start: int, block: int, value: float = 0.0) -> np.ndarray:
    """The rows of a block, of one shape; sets smaller than a block keep their size."""
    return fill_up(rows[start : start + block], min(block, len(rows)), value)


def _take_any(within: np.ndarray, start: int, found: Array) -> None:
    part = within[start : start + len(found)]
    part |= np.asarray(found)[: len(part)]
