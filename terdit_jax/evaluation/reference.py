"""Reference statistics in the ADM evaluator's npz: read, checked, and written.

`mu` and `sigma` are of Inception's pool features, `mu_s` and `sigma_s` of its spatial ones, `arr_0` is images, of
which precision and recall take the features.
"""

import os
from typing import Any
import zipfile

import numpy as np

from terdit_jax.errors import UserError
from terdit_jax.evaluation.image_source import ARRAY
from terdit_jax.evaluation.inception import POOL_FEATURES, SPATIAL_FEATURES
from terdit_jax.evaluation.statistics import Statistics
from terdit_jax.files import new_file, refusing
from terdit_jax.untrusted import load_arrays, reading

KEYS = {"pool": ("mu", "sigma", POOL_FEATURES), "spatial": ("mu_s", "sigma_s", SPATIAL_FEATURES)}
STORED_IMAGES = 10_000  # that a reference keeps, as the published ones do
_LARGEST = 1e9  # no mean or covariance of Inception's features comes near it
_ASYMMETRY = 1e-6  # of a covariance, over its largest value: float32 files are off by rounding


def stored_keys(path: str | os.PathLike) -> set[str]:
    """The names of the arrays in an npz. Raises UserError if it is none."""
    with reading(f"{path}: not an npz"), zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def read_statistics(path: str | os.PathLike) -> dict[str, Statistics]:
    """ "pool" and "spatial", each as far as the npz has it.

    Raises:
      UserError: one array of a pair without the other, other shapes, values that are not finite, or a covariance that
        is not symmetric with variances of at least 0.
    """
    keys, found = stored_keys(path), {}
    for feature, (mean_key, covariance_key, width) in KEYS.items():
        given = [key for key in (mean_key, covariance_key) if key in keys]
        if len(given) == 1:
            raise UserError(f"{path}: has {given[0]} but not its pair: {mean_key} and {covariance_key}")
        if given:
            mean, covariance = load_arrays(path, (mean_key, covariance_key), f"{path}: not a reference").values()
            _check(f"{path}: {mean_key}", mean, (width,))
            _check(f"{path}: {covariance_key}", covariance, (width, width))
            _check_covariance(f"{path}: {covariance_key}", covariance)
            found[feature] = Statistics(mean.astype(np.float64), covariance.astype(np.float64))
    return found


def save_reference(path: str | os.PathLike, statistics: dict[str, Statistics], images: np.ndarray) -> None:
    """Writes the statistics and the images (N, H, W, 3) uint8; the file appears whole or not at all."""
    arrays: dict[str, Any] = {ARRAY: images}  # `savez` takes flags by keyword too, of other types
    for feature, (mean_key, covariance_key, _) in KEYS.items():
        arrays |= {mean_key: statistics[feature].mean, covariance_key: statistics[feature].covariance}
    with refusing(path, "--save_reference"), new_file(path, replace=False) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def stored_indices(count: int) -> np.ndarray:
    """Which of `count` images a reference keeps: all, or `STORED_IMAGES` at equal distances."""
    kept = min(count, STORED_IMAGES)
    return np.arange(kept) * count // kept


def _check(what: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape or array.dtype.kind != "f":
        raise UserError(f"{what} is {array.dtype} {array.shape}, Inception's is floats {shape}: another network's?")
    if not np.isfinite(array).all() or float(np.abs(array).max()) > _LARGEST:
        raise UserError(f"{what} holds values that are not finite, or larger than any of Inception's")


def _check_covariance(what: str, covariance: np.ndarray) -> None:
    largest = np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > _ASYMMETRY * largest or np.diagonal(covariance).min() < 0:
        raise UserError(f"{what} is no covariance: it is not symmetric, or has variances below 0")
