"""The layers of the autoencoder: for each, the shapes of its parameters and the function of them.

Parameters are nested dicts under the names that diffusers gives them, convolutions as (out, height, width, in) and the
attention's maps as (out, in); `vae` says which layers follow one another.
"""

from collections.abc import Callable, Sequence

import jax
from jax import Array
import jax.numpy as jnp
from jax.typing import DTypeLike

EPSILON = 1e-6  # of every GroupNorm


def children(params: dict) -> list[dict]:
    """The parameters of a list of layers, which are named "0", "1"..., in order."""
    return [params[str(i)] for i in range(len(params))]


def conv_shapes(in_channels: int, out_channels: int, size: int = 3) -> dict:
    """Shapes of a convolution with square kernels."""
    return {"weight": _float32(out_channels, size, size, in_channels), "bias": _float32(out_channels)}


def norm_shapes(channels: int) -> dict:
    """Shapes of a GroupNorm."""
    return {"weight": _float32(channels), "bias": _float32(channels)}


def resnet_shapes(in_channels: int, out_channels: int) -> dict:
    """Shapes of a residual block, which maps its input by a 1x1 convolution where the widths differ."""
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
    """Shapes of self-attention: a norm and four square maps."""

    def square() -> dict:
        return {"weight": _float32(channels, channels), "bias": _float32(channels)}

    maps = {name: square() for name in ("to_q", "to_k", "to_v")}
    return {"group_norm": norm_shapes(channels), **maps, "to_out": {"0": square()}}


def conv(params: dict, x: Array, stride: int = 1, padding: str | Sequence[tuple[int, int]] = "SAME") -> Array:
    """(B, H, W, in) -> (B, H / stride, W / stride, out), in x's dtype."""
    y = jax.lax.conv_general_dilated(
        x,
        params["weight"].astype(x.dtype),
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "OHWI", "NHWC"),
        precision=_precision(x.dtype),
    )
    return y + params["bias"].astype(x.dtype)


def linear(params: dict, x: Array) -> Array:
    """(..., in) -> (..., out), in x's dtype."""
    options = {"precision": _precision(x.dtype), "preferred_element_type": jnp.float32}
    y = jnp.einsum("...i,oi->...o", x, params["weight"].astype(x.dtype), **options)
    return (y + params["bias"].astype(x.dtype)).astype(x.dtype)


def group_norm(
    params: dict, x: Array, groups: int, activation: Callable[[Array], Array] = lambda normal: normal
) -> Array:
    """Normalises (B, H, W, C) over all pixels of each group of channels (Wu & He, arXiv 1803.08494).

    In float32, the activation included: the mean is a sum of up to millions of values, the variance one of their
    squares. Both sums are taken in one pass, of what each channel differs from its first pixel: squares of the values
    themselves would cancel where the mean is far from zero.
    """
    B, _, _, C = x.shape
    x32, first = x.astype(jnp.float32), x[:, :1, :1].astype(jnp.float32)
    shifted = x32 - first
    mean, square = jnp.mean(shifted, axis=(1, 2)), jnp.mean(jnp.square(shifted), axis=(1, 2))  # (B, C)
    variance = (square - jnp.square(mean)).reshape(B, groups, -1)
    mean = (mean + first[:, 0, 0]).reshape(B, groups, -1)
    group_mean = jnp.mean(mean, axis=-1, keepdims=True)  # (B, groups, 1)
    group_variance = jnp.mean(variance + jnp.square(mean - group_mean), axis=-1, keepdims=True)

    def pixels(statistic: Array) -> Array:
        return jnp.broadcast_to(statistic, mean.shape).reshape(B, 1, 1, C)

    normal = (x32 - pixels(group_mean)) * pixels(jax.lax.rsqrt(group_variance + EPSILON))
    return activation(normal * params["weight"] + params["bias"]).astype(x.dtype)


def norm_conv(norm: dict, params: dict, x: Array, groups: int) -> Array:
    """GroupNorm, SiLU, convolution."""
    return conv(params, group_norm(norm, x, groups, jax.nn.silu))


def resnet(params: dict, x: Array, groups: int) -> Array:
    """Residual block (B, H, W, in) -> (B, H, W, out)."""
    h = norm_conv(params["norm1"], params["conv1"], x, groups)
    h = norm_conv(params["norm2"], params["conv2"], h, groups)
    return h + (conv(params["conv_shortcut"], x) if "conv_shortcut" in params else x)


def attention(params: dict, x: Array, groups: int) -> Array:
    """Residual self-attention over the pixels of (B, H, W, C), with one head; softmax in float32.

    It makes (B, H W, H W) float32 scores, 4 MB of a 256 px image (1,024 pixels here) and 67 MB of one of 512 px: less
    than the finest layers' activations. No flash kernel takes a head as wide as this one, 512.
    """
    B, H, W, C = x.shape
    tokens = group_norm(params["group_norm"], x, groups).reshape(B, H * W, C)
    q, k, v = (linear(params[name], tokens) for name in ("to_q", "to_k", "to_v"))
    options = {"precision": _precision(x.dtype), "preferred_element_type": jnp.float32}
    scores = jnp.einsum("btc,bsc->bts", q, k, **options) * C**-0.5
    mixed = jnp.einsum("bts,bsc->btc", jax.nn.softmax(scores).astype(x.dtype), v, **options).astype(x.dtype)
    return x + linear(params["to_out"]["0"], mixed).reshape(B, H, W, C)


def downsample(params: dict, x: Array) -> Array:
    """(B, H, W, C) -> (B, H / 2, W / 2, C): a convolution padded at the bottom and the right only; H and W are even.

    Padding by two on every side and cutting the first row and column is the same, and spares GPUs a padded copy of x:
    cuDNN pads both sides alike.
    """
    return conv(params["conv"], x, stride=2, padding=((2, 2), (2, 2)))[:, 1:, 1:]


def upsample(params: dict, x: Array) -> Array:
    """(B, H, W, C) -> (B, 2H, 2W, C): the nearest pixel, then a convolution."""
    return conv(params["conv"], x.repeat(2, axis=1).repeat(2, axis=2))


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """Accelerators multiply float32 in fewer bits unless told otherwise."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
