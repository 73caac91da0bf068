"""The variational autoencoder of Stable Diffusion: images to the posteriors of their latents, latents to images.

It owns the architecture; loading published weights is `interop.vae_weights`'s, scaling latents the caller's.

Sources: Kingma & Welling, arXiv 1312.6114 (the posterior); Rombach et al., arXiv 2112.10752 (the network); the public
AutoencoderKL of diffusers, whose parameter names are ours.
"""

import dataclasses

import chex
import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
import numpy as np

from terdit_jax.batches import fill_up
from terdit_jax.model.vae_layers import (
    attention,
    attention_shapes,
    children,
    conv,
    conv_shapes,
    downsample,
    norm_conv,
    norm_shapes,
    resnet,
    resnet_shapes,
    upsample,
)
from terdit_jax.parallel.sharding import batch_sharding, batch_shards

MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0
_DECODED_PIXELS = 8 * 256 * 256  # that `decode_all` asks for at once


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Attributes, as in diffusers' config.json:

    in_channels, out_channels: of images.
    block_out_channels: width of each resolution, the finest first; each one halves the last.
    layers_per_block: residual blocks a resolution; the decoder has one more.
    latent_channels: of latents.
    norm_num_groups: of every GroupNorm.
    scaling_factor: what latents are multiplied by to have unit variance; not applied here.
    sample_size: pixels a side in training; any other that `downsampling` divides works too.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    sample_size: int = 256

    @property
    def downsampling(self) -> int:
        """Pixels a side of one latent."""
        return 2 ** (len(self.block_out_channels) - 1)


def abstract_params(config: VAEConfig) -> dict:
    """The parameter tree with shapes in place of arrays."""
    widths, latent = config.block_out_channels, config.latent_channels
    down = _stages_shapes(widths, config.layers_per_block, "downsamplers")
    up = _stages_shapes(widths[::-1], config.layers_per_block + 1, "upsamplers")
    return {
        "encoder": {
            "conv_in": conv_shapes(config.in_channels, widths[0]),
            "down_blocks": down,
            "mid_block": _middle_shapes(widths[-1]),
            "conv_norm_out": norm_shapes(widths[-1]),
            "conv_out": conv_shapes(widths[-1], 2 * latent),
        },
        "quant_conv": conv_shapes(2 * latent, 2 * latent, 1),
        "post_quant_conv": conv_shapes(latent, latent, 1),
        "decoder": {
            "conv_in": conv_shapes(latent, widths[-1]),
            "mid_block": _middle_shapes(widths[-1]),
            "up_blocks": up,
            "conv_norm_out": norm_shapes(widths[0]),
            "conv_out": conv_shapes(widths[0], config.out_channels),
        },
    }


def count_params(config: VAEConfig) -> int:
    """Number of parameters, from shapes alone."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


def encode_flops(config: VAEConfig, height: int, width: int) -> int:
    """Work of `encode` on an image of `height` x `width` pixels, from shapes alone: two a multiplication and addition.

    Convolutions and attention only; norms and activations are limited by memory and add less than 1%.
    """

    def weights(*trees: dict) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(trees) if len(leaf.shape) > 1)

    params = abstract_params(config)
    encoder, pixels = params["encoder"], height * width
    products = pixels * weights(encoder["conv_in"])
    for stage in children(encoder["down_blocks"]):
        products += pixels * weights(stage["resnets"])
        if "downsamplers" in stage:
            pixels //= 4
            products += pixels * weights(stage["downsamplers"])
    products += pixels * weights(encoder["mid_block"], encoder["conv_out"], params["quant_conv"])
    return 2 * (products + 2 * pixels**2 * config.block_out_channels[-1])  # two products of scores


def encoder_params(params: dict, dtype: DTypeLike = jnp.float32) -> dict:
    """The part that `encode` reads, its weights in `dtype`.

    `encode` gives the same numbers from these as from all of `params`; cast once, rather than in each call, bfloat16
    weights halve what a device holds. Norms stay float32, in which they are computed.

    Args:
      params: nested dict of arrays, of NumPy or JAX as those returned are.
      dtype: what `encode` will compute in.
    """
    return _cast({name: params[name] for name in ("encoder", "quant_conv")}, dtype)


def decoder_params(params: dict, dtype: DTypeLike = jnp.float32) -> dict:
    """The part that `decode` reads, as `encoder_params`."""
    return _cast({name: params[name] for name in ("decoder", "post_quant_conv")}, dtype)


def encode(config: VAEConfig, params: dict, images: Array, dtype: DTypeLike = jnp.float32) -> tuple[Array, Array]:
    """The posteriors of images' latents, diagonal Gaussians.

    Args:
      config: the architecture.
      params: nested dict of float32 arrays (see `abstract_params`), or `encoder_params` of it.
      images: (B, H, W, in_channels) float in [-1, 1], H and W multiples of `config.downsampling`.
      dtype: of activations, float32 or bfloat16.

    Returns:
      Mean and standard deviation, each (B, H / downsampling, W / downsampling, latent_channels) float32, not scaled.
    """
    chex.assert_shape(images, (None, None, None, config.in_channels))
    chex.assert_is_divisible(images.shape[1], config.downsampling)
    chex.assert_is_divisible(images.shape[2], config.downsampling)
    encoder, groups = params["encoder"], config.norm_num_groups
    x = conv(encoder["conv_in"], images.astype(dtype))
    for stage in children(encoder["down_blocks"]):
        x = _stage(stage, x, groups)
    x = _middle(encoder["mid_block"], x, groups)
    x = norm_conv(encoder["conv_norm_out"], encoder["conv_out"], x, groups)
    moments = conv(params["quant_conv"], x).astype(jnp.float32)  # the exponential multiplies errors
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.exp(0.5 * jnp.clip(logvar, MIN_LOGVAR, MAX_LOGVAR))


def decode(config: VAEConfig, params: dict, latents: Array, dtype: DTypeLike = jnp.float32) -> Array:
    """Images of latents.

    Args:
      config: the architecture.
      params: nested dict of float32 arrays (see `abstract_params`), or `decoder_params` of it.
      latents: (B, H, W, latent_channels) float, as `encode` makes them: those of a diffusion model divided by
        `scaling_factor`.
      dtype: of activations, float32 or bfloat16.

    Returns:
      (B, H * downsampling, W * downsampling, out_channels) float32, in [-1, 1] but not clipped.
    """
    chex.assert_shape(latents, (None, None, None, config.latent_channels))
    decoder, groups = params["decoder"], config.norm_num_groups
    x = conv(params["post_quant_conv"], latents.astype(dtype))
    x = conv(decoder["conv_in"], x)
    x = _middle(decoder["mid_block"], x, groups)
    for stage in children(decoder["up_blocks"]):
        x = _stage(stage, x, groups)
    return norm_conv(decoder["conv_norm_out"], decoder["conv_out"], x, groups).astype(jnp.float32)


def decode_all(
    config: VAEConfig,
    params: dict,
    latents: np.ndarray,
    dtype: DTypeLike = jnp.float32,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Decodes any number of latents on the host, at most `batch_size` at a time on each device of a mesh.

    The devices must all belong to this process; without a mesh the default device does the work.

    All batches have one shape, the last one filled up with zeros, so that one program serves them. The default size
    goes by the images': 8 of 256 px, 2 of 512 px, 1 of more. For either XLA plans 1.3 GB on a GPU in float32, 0.7 GB
    in bfloat16, and 0.2 or 0.1 GB of weights; convolutions may take scratch memory on top.
    """
    count, height, width, _ = latents.shape
    factor = config.downsampling
    if batch_size is None:
        batch_size = _DECODED_PIXELS // max(1, height * width * factor**2)
    shards = batch_shards(mesh) if mesh else 1
    batch_size = shards * max(1, min(batch_size, -(-count // shards)))
    images = np.empty((count, height * factor, width * factor, config.out_channels), np.float32)
    params = jax.device_put(decoder_params(params, dtype), NamedSharding(mesh, PartitionSpec()) if mesh else None)
    for start in range(0, count, batch_size):
        batch = fill_up(latents[start : start + batch_size], batch_size)
        batch = jax.device_put(batch, batch_sharding(mesh)) if mesh else batch
        decoded = _decode(config, params, batch, jnp.dtype(dtype))
        images[start : start + batch_size] = np.asarray(decoded)[: count - start]
    return images


_decode = jax.jit(decode, static_argnums=(0, 3))


def _cast(params: dict, dtype: DTypeLike) -> dict:
    def cast(path: tuple, leaf: Array) -> Array:
        return leaf if "norm" in path[-2].key else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def _stages_shapes(widths: tuple[int, ...], layers: int, samplers: str) -> dict:
    """Shapes of the stages with these widths in order; all but the last end in a change of resolution."""
    stages = {}
    for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
        resnets = {str(j): resnet_shapes(width if j else before, width) for j in range(layers)}
        stages[str(i)] = {"resnets": resnets}
        if i < len(widths) - 1:
            stages[str(i)][samplers] = {"0": {"conv": conv_shapes(width, width)}}
    return stages


def _middle_shapes(width: int) -> dict:
    return {
        "resnets": {str(i): resnet_shapes(width, width) for i in range(2)},
        "attentions": {"0": attention_shapes(width)},
    }


def _stage(params: dict, x: Array, groups: int) -> Array:
    """The residual blocks of one resolution, then the change to the next."""
    for layer in children(params["resnets"]):
        x = resnet(layer, x, groups)
    if "downsamplers" in params:
        x = downsample(params["downsamplers"]["0"], x)
    if "upsamplers" in params:
        x = upsample(params["upsamplers"]["0"], x)
    return x


def _middle(params: dict, x: Array, groups: int) -> Array:
    """Residual block, attention, residual block at the coarsest resolution."""
    first, second = children(params["resnets"])
    x = resnet(first, x, groups)
    x = attention(params["attentions"]["0"], x, groups)
    return resnet(second, x, groups)
