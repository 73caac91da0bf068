"""The layers of the autoencoder: for each, the shapes of its parameters and the function of them.

Parameters are nested dicts under the names that diffusers gives them, convolutions as (height, width, in, out) and the
attention's maps as (out, in); which layers follow one another is `vae`'s.
"""

import jax
from jax import Array
import jax.numpy as jnp
from jax.typing import DTypeLike

from terdit_jax.model.layers import linear

EPSILON = 1e-6  # of every GroupNorm


def children(params: dict) -> list[dict]:
    """The parameters of a list of layers, which are named "0", "1"..., in order."""
    return [params[str(i)] for i in range(len(params))]


def conv_shapes(in_channels: int, out_channels: int, size: int = 3) -> dict:
    """Of a convolution with square kernels."""
    return {"weight": _float32(size, size, in_channels, out_channels), "bias": _float32(out_channels)}


def norm_shapes(channels: int) -> dict:
    """Of a GroupNorm."""
    return {"weight": _float32(channels), "bias": _float32(channels)}


def resnet_shapes(in_channels: int, out_channels: int) -> dict:
    """Of a residual block, which maps its input by a 1x1 convolution where the widths differ."""
    shapes = {
        "norm1": norm_shapes(in_channels),
        "conv1": conv_shapes(in_channels, out_channels),
        "norm2": norm_shapes(out_channels),
        "conv2": conv_shapes(out_channels, out_channels),
    }
    if in_channels != out_channels:
        shapes["conv_shortcut"] = conv_shapes(in_channels, out_channels, 1)
    return shapes


def attention_shapes(channels: int) -> dict:
    """Of self-attention: a norm and four square maps."""

    def square() -> dict:
        return {"weight": _float32(channels, channels), "bias": _float32(channels)}

    maps = {name: square() for name in ("to_q", "to_k", "to_v")}
    return {"group_norm": norm_shapes(channels), **maps, "to_out": {"0": square()}}


def conv(params: dict, x: Array, stride: int = 1, padding: str = "SAME") -> Array:
    """(B, H, W, in) -> (B, H / stride, W / stride, out), in x's dtype."""
    y = jax.lax.conv_general_dilated(
        x,
        params["weight"].astype(x.dtype),
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_precision(x.dtype),
    )
    return y + params["bias"].astype(x.dtype)


def group_norm(params: dict, x: Array, groups: int) -> Array:
    """Normalises (B, H, W, C) over all pixels of each group of channels (Wu & He, arXiv 1803.08494).

    In float32: the mean is a sum of up to millions of values, the variance one of their squares.
    """
    B, H, W, C = x.shape
    x32 = x.astype(jnp.float32).reshape(B, H * W, groups, C // groups)
    centred = x32 - jnp.mean(x32, axis=(1, 3), keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=(1, 3), keepdims=True)
    normal = (centred * jax.lax.rsqrt(variance + EPSILON)).reshape(B, H, W, C)
    return (normal * params["weight"] + params["bias"]).astype(x.dtype)


def norm_conv(norm: dict, params: dict, x: Array, groups: int) -> Array:
    """GroupNorm, SiLU, convolution."""
    return conv(params, jax.nn.silu(group_norm(norm, x, groups)))


def resnet(params: dict, x: Array, groups: int) -> Array:
    """Residual block (B, H, W, in) -> (B, H, W, out)."""
    h = norm_conv(params["norm1"], params["conv1"], x, groups)
    h = norm_conv(params["norm2"], params["conv2"], h, groups)
    return h + (conv(params["conv_shortcut"], x) if "conv_shortcut" in params else x)


def attention(params: dict, x: Array, groups: int) -> Array:
    """Residual self-attention over the pixels of (B, H, W, C), with one head; softmax in float32."""
    B, H, W, C = x.shape
    tokens = group_norm(params["group_norm"], x, groups).reshape(B, H * W, C)
    q, k, v = (linear(tokens, params[name], x.dtype).astype(x.dtype) for name in ("to_q", "to_k", "to_v"))
    options = {"precision": _precision(x.dtype), "preferred_element_type": jnp.float32}
    scores = jnp.einsum("btc,bsc->bts", q, k, **options) * C**-0.5
    mixed = jnp.einsum("bts,bsc->btc", jax.nn.softmax(scores).astype(x.dtype), v, **options)
    return x + linear(mixed, params["to_out"]["0"], x.dtype).astype(x.dtype).reshape(B, H, W, C)


def downsample(params: dict, x: Array) -> Array:
    """(B, H, W, C) -> (B, H / 2, W / 2, C): a convolution padded at the bottom and the right only."""
    return conv(params["conv"], jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))), stride=2, padding="VALID")


def upsample(params: dict, x: Array) -> Array:
    """(B, H, W, C) -> (B, 2H, 2W, C): the nearest pixel, then a convolution."""
    return conv(params["conv"], x.repeat(2, axis=1).repeat(2, axis=2))


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """Accelerators multiply float32 in fewer bits unless told otherwise."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
