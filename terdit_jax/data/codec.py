"""Codecs turn images into latents: pixel space, which keeps them, and the Stable Diffusion autoencoder.

The builder calls a codec and stores what it returns. Weights are loaded by interop, latents are scaled by training.
"""

from functools import partial
from typing import Protocol

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
import numpy as np

from terdit_jax.batches import fill_up
from terdit_jax.errors import UserError
from terdit_jax.model.vae import VAEConfig, encode, encoder_params


class Codec(Protocol):
    """Encodes images. Equal names must mean equal latents: the name is all that tells two data sets apart."""

    name: str
    latent_scale: float  # training multiplies stored latents by it
    batch_size: int  # images that are best encoded together

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(H, W, C) of the latents of images of the given (H, W, C). Raises UserError if it takes none such."""

    def encode(self, images: np.ndarray) -> tuple[np.ndarray | Array, np.ndarray | Array]:
        """Mean and standard deviation of the posteriors of at most `batch_size` images.

        Images (B, H, W, C) are uint8, or float32 in [-1, 1]. What is returned may still be computed, and may have
        rows beyond B that mean nothing.
        """


class PixelCodec:
    """No encoding: an image is its own latent and has no spread. Float16 keeps 8-bit pixels exactly."""

    name = "none"
    latent_scale = 1.0
    batch_size = 64

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The image's own shape."""
        return image_shape

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The images in [-1, 1], and zeros."""
        if images.dtype == np.uint8:
            images = images / np.float32(127.5) - np.float32(1)
        return images, np.zeros_like(images)


class VAECodec:
    """The Stable Diffusion autoencoder's encoder on all devices of this process, each with its part of a batch.

    Args:
      config: the architecture.
      params: float32 arrays, as `interop.vae_weights.load_vae` returns them.
      identity: of the weights; it becomes part of the name.
      dtype: of activations, float32 or bfloat16; latents leave as float16.
      device_batch: images a device.
    """

    def __init__(
        self, config: VAEConfig, params: dict, identity: str, dtype: DTypeLike = jnp.float32, device_batch: int = 32
    ):
        dtype = jnp.dtype(dtype)
        self.name = f"vae-{identity}-{dtype.name}"
        self.latent_scale = config.scaling_factor
        self.config = config
        devices = jax.local_devices()
        self.batch_size = device_batch * len(devices)
        mesh = Mesh(np.array(devices), ("data",))
        self._rows = NamedSharding(mesh, PartitionSpec("data"))
        self._params = jax.device_put(encoder_params(params, dtype), NamedSharding(mesh, PartitionSpec()))
        self._encode = jax.jit(partial(_encode, config, dtype=dtype), out_shardings=self._rows)

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(H / 8, W / 8, 4) with the published architecture."""
        height, width, channels = image_shape
        factor = self.config.downsampling
        if channels != self.config.in_channels:
            raise UserError(f"--channels={channels}: the autoencoder takes {self.config.in_channels}")
        if height % factor or width % factor:
            raise UserError(f"--image_size={height}: must be a multiple of {factor}, the autoencoder's downsampling")
        return height // factor, width // factor, self.config.latent_channels

    def encode(self, images: np.ndarray) -> tuple[Array, Array]:
        """Encodes as `Codec.encode` says, in float16; all batches are filled up to one size, for one program."""
        return self._encode(self._params, jax.device_put(fill_up(images, self.batch_size), self._rows))


def _encode(config: VAEConfig, params: dict, images: Array, dtype: DTypeLike) -> tuple[Array, Array]:
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 127.5 - 1
    mean, std = encode(config, params, images, dtype)
    return mean.astype(jnp.float16), std.astype(jnp.float16)
