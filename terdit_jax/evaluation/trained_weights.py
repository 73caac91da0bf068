"""Tensors of networks that others trained: looked up by name and checked, batch norms folded into convolutions.

Which names a network has is left to its own module.
"""

from collections.abc import Mapping

import numpy as np

from terdit_jax.errors import UserError
from terdit_jax.interop.published import FLOATS

NORM = ("weight", "bias", "running_mean", "running_var")  # PyTorch's names of a batch norm's tensors
EPSILON = 1e-3  # of every batch norm of the networks here


def read_tensor(arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], source: str) -> np.ndarray:
    """The tensor itself.

    Raises:
      UserError: naming `source`, for a tensor that is missing, of another shape or dtype, not finite, or a variance
        below 0.
    """
    if name not in arrays:
        raise UserError(f"{source}: lacks tensor {name!r}, so it is another network")
    array = arrays[name]
    if array.shape != shape or array.dtype not in FLOATS:
        raise UserError(f"{source}: tensor {name!r} is {array.dtype} {array.shape}, expected floats {shape}")
    if not np.isfinite(array).all():
        raise UserError(f"{source}: tensor {name!r} holds values that are not finite")
    if name.endswith(("running_var", "moving_variance")) and (array < 0).any():
        raise UserError(f"{source}: tensor {name!r} holds negative variances")
    return array


def fold(weight: np.ndarray, gain: np.ndarray, bias: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> dict:
    """A convolution (out, height, width, in) and the batch norm behind it as one, in float64 until it is made.

    Returns:
      `weight` of the same shape and `bias` (out,), float32.
    """
    scale = gain.astype(np.float64) / np.sqrt(variance.astype(np.float64) + EPSILON)
    return {
        "weight": np.ascontiguousarray(weight * scale[:, None, None, None], np.float32),
        "bias": (bias - mean * scale).astype(np.float32),
    }
