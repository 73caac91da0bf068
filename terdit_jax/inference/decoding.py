"""From sampled latents to images in [-1, 1], by the codec that made the data."""

from jax.sharding import Mesh
from jax.typing import DTypeLike
import numpy as np

from terdit_jax.errors import UserError
from terdit_jax.model.vae import VAEConfig, decode_all

VAE = tuple[VAEConfig, dict]  # of `terdit_jax.interop.vae_weights.load_vae`


def to_images(
    latents: np.ndarray,
    latent_scale: float,
    vae: VAE | None = None,
    dtype: DTypeLike = np.float32,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Images of latents (N, H, W, C) as the model draws them.

    Pixel-space models (C is 1 or 3) draw the images themselves. Latents are decoded by their autoencoder; without it
    the first three channels are shown, each stretched to its own range: a preview of what is where, not of colours.

    Args:
      latents: scaled as in training.
      latent_scale: what training multiplied by.
      vae: the autoencoder that made the latents.
      dtype: in which it computes, float32 or bfloat16.
      mesh: the devices that share the decoding; the default one does it if left out, or if some are of other processes.

    Returns:
      (N, H, W, 1 or 3) float32, pixels in [-1, 1] but not clipped; with an autoencoder H and W are those of the images.

    Raises:
      UserError: an autoencoder of other latents than these.
    """
    if vae:
        check_vae(vae, latents.shape[-1])
        local = mesh if mesh and not mesh.is_multi_process else None
        return decode_all(*vae, latents / latent_scale, dtype, mesh=local)
    if latents.shape[-1] in (1, 3):
        return latents / latent_scale
    shown = latents[..., : 3 if latents.shape[-1] > 2 else 1]
    known = np.isfinite(shown)  # what is not stays so, in its own image
    low = shown.min(axis=(0, 1, 2), where=known, initial=np.inf)
    high = shown.max(axis=(0, 1, 2), where=known, initial=-np.inf)
    return 2 * (shown - low) / np.maximum(high - low, 1e-6) - 1


def check_vae(vae: VAE, channels: int) -> None:
    """Raises UserError if an autoencoder does not decode latents of `channels` channels."""
    if vae[0].latent_channels != channels:
        raise UserError(f"the autoencoder's latents have {vae[0].latent_channels} channels, the model draws {channels}")
