"""Bilinear resizing as TensorFlow 1 did it by default, which the FID graph has inside.

It differs from every other library's: output pixel i lies at i * in / out, the grids' first pixels on each other, and
no filter widens when an image shrinks (`align_corners=False`, `half_pixel_centers=False`).
"""

from jax import Array
import jax.numpy as jnp
import numpy as np


def legacy_bilinear(x: Array, height: int, width: int) -> Array:
    """(B, H, W, C) float32 to (B, height, width, C) float32."""
    top, bottom, down = _neighbours(x.shape[1], height)
    left, right, along = _neighbours(x.shape[2], width)
    down, along = down[:, None, None], along[:, None]

    def row(i: np.ndarray) -> Array:
        rows = x[:, i]
        return rows[:, :, left] + (rows[:, :, right] - rows[:, :, left]) * along

    upper = row(top)
    return upper + (row(bottom) - upper) * down


def _neighbours(size: int, wanted: int) -> tuple[np.ndarray, np.ndarray, Array]:
    """For each output pixel the input pixels on either side of it, and how far it is from the first."""
    place = np.arange(wanted, dtype=np.float32) * (np.float32(size) / np.float32(wanted))
    first = place.astype(np.int32)  # which rounds down
    return first, np.minimum(first + 1, size - 1), jnp.asarray(place - first)
