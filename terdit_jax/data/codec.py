"""What turns pictures into latents: the interface, and the codec of pixel space, which keeps them as they are.

The builder calls a codec and stores what it returns; scaling latents is training's.
"""

from typing import Protocol

import numpy as np


class Codec(Protocol):
    """Encodes pictures. Equal names must mean equal latents: the name is all that tells two data sets apart."""

    name: str
    latent_scale: float  # training multiplies stored latents by it

    def latent_shape(self, picture_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(H, W, C) of the latents of pictures of the given (H, W, C)."""

    def encode(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pictures (B, H, W, C) float32 in [-1, 1], any B, to the mean and standard deviation of their posteriors."""


class PixelCodec:
    """No encoding: a picture is its own latent and has no spread. Float16 keeps 8-bit pixels exactly."""

    name = "none"
    latent_scale = 1.0

    def latent_shape(self, picture_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The picture's own shape."""
        return picture_shape

    def encode(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pictures, and zeros."""
        return pictures, np.zeros_like(pictures)
