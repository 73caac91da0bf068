"""From sampled latents to pictures in [-1, 1], by the codec that made the data."""

import numpy as np


def to_pictures(latents: np.ndarray, latent_scale: float) -> np.ndarray:
    """Pictures of latents (N, H, W, C) as the model draws them.

    Pixel-space models (C is 1 or 3) draw the pictures themselves. For the latents of an autoencoder the first three
    channels are shown, each stretched to its own range: a preview of what is where, not of colours.

    Args:
      latents: scaled as in training.
      latent_scale: what training multiplied by.

    Returns:
      (N, H, W, 1 or 3) float32, pixels in [-1, 1] but not clipped.
    """
    if latents.shape[-1] in (1, 3):
        return latents / latent_scale
    shown = latents[..., : 3 if latents.shape[-1] > 2 else 1]
    low, high = shown.min(axis=(0, 1, 2)), shown.max(axis=(0, 1, 2))
    return 2 * (shown - low) / np.maximum(high - low, 1e-6) - 1
