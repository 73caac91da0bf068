"""The FID Inception network (TensorFlow's graph of 2015-12-05), images in, pool and spatial features and logits out.

Images are resized within it, as the graph does. Loading weights belongs to `inception_weights`. Parameters are nested
dicts under the names of the common PyTorch port, each convolution with its batch norm folded in.
"""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from terdit_jax.evaluation.resize import legacy_bilinear

SIDE = 299  # pixels of the network's own input
POOL_FEATURES = 2048
SPATIAL_CHANNELS = 7  # of those of the block's first branch, on 17 x 17 places
SPATIAL_FEATURES = 17 * 17 * SPATIAL_CHANNELS
CLASSES = 1008


class Features(NamedTuple):
    """The features that the ADM evaluator reads of the network."""

    pool: Array  # (B, 2048) float32, of FID, precision and recall
    spatial: Array  # (B, 2023) float32, of sFID
    logits: Array  # (B, 1008) float32, without the bias, of the inception score


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution with batch norm and ReLU."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)  # height, width
    stride: int = 1
    padding: str = "SAME"


Pool = Callable[[Array], Array]
Chain = list["Conv | Pool | Fork"]  # layers, one after the other
Fork = tuple[Chain, ...]  # chains with one input, whose outputs are concatenated


def extract(params: dict, images: Array) -> Features:
    """Features of images (B, H, W, 3) of any size, uint8 or float in [0, 255], as the ADM evaluator feeds them."""
    x = legacy_bilinear(images.astype(jnp.float32), SIDE, SIDE)
    return network(params, (x - 128) / 128)


def network(params: dict, x: Array) -> Features:
    """Features of (B, 299, 299, 3) float32 in [-1, 1)."""
    assert x.ndim == 4 and x.shape[-1] == 3 and x.dtype == jnp.float32, (x.shape, x.dtype)
    x = spatial = run(STEM, params, x)  # spatial is replaced below
    for name, block in BLOCKS.items():
        if name == "Mixed_6d":
            spatial = run(block[0], params[name], x)[..., :SPATIAL_CHANNELS]
        x = run([block], params[name], x)
    pool = x.mean(axis=(1, 2))
    logits = jnp.matmul(pool, params["fc"]["weight"].T, precision=jax.lax.Precision.HIGHEST)
    return Features(pool, spatial.reshape(len(x), -1), logits)


def run(layers: Chain, params: dict, x: Array) -> Array:
    """The output of layers, (B, H, W, C) to (B, H', W', C'); float32 throughout, also on accelerators."""
    for layer in layers:
        if isinstance(layer, Conv):
            weight, bias, strides = params[layer.name]["weight"], params[layer.name]["bias"], (layer.stride,) * 2
            layout, precision = ("NHWC", "OHWI", "NHWC"), jax.lax.Precision.HIGHEST
            y = jax.lax.conv_general_dilated(
                x, weight, strides, layer.padding, dimension_numbers=layout, precision=precision
            )
            x = jax.nn.relu(y + bias)
        elif isinstance(layer, tuple):
            x = jnp.concatenate([run(branch, params, x) for branch in layer], axis=-1)
        else:
            x = layer(x)
    return x


def kernels() -> dict[str, tuple[int, int, int, int]]:
    """Every convolution, named as in the PyTorch port, in order: (out, in, height, width)."""
    shapes, width = _shapes(STEM, 3, "")
    for name, block in BLOCKS.items():
        of_block, width = _shapes([block], width, f"{name}.")
        shapes |= of_block
    return shapes


def _shapes(layers: Chain, width: int, prefix: str) -> tuple[dict[str, tuple[int, int, int, int]], int]:
    """The convolutions of layers that take `width` channels, and how many channels come out."""
    shapes = {}
    for layer in layers:
        if isinstance(layer, Conv):
            shapes[prefix + layer.name] = (layer.channels, width, *layer.kernel)
            width = layer.channels
        elif isinstance(layer, tuple):
            branches = [_shapes(branch, width, prefix) for branch in layer]
            width = sum(out for _, out in branches)
            for of_branch, _ in branches:
                shapes |= of_branch
    return shapes, width


def _max_pool(x: Array, stride: int = 2, padding: str = "VALID") -> Array:
    """Over 3 x 3."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _max_in_place(x: Array) -> Array:
    return _max_pool(x, 1, "SAME")


def _average_pool(x: Array) -> Array:
    """Over 3 x 3; places beyond the edge do not count, as in TensorFlow."""

    def total(x: Array) -> Array:
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")

    return total(x) / total(jnp.ones((1, *x.shape[1:3], 1), x.dtype))


def _shrinking(name: str, channels: int) -> Conv:
    return Conv(name, channels, (3, 3), 2, "VALID")


def _chain(name: str, *sizes: tuple[int, int, int]) -> list[Conv]:
    """Convolutions `name`_1, `name`_2, ... of these output channels, heights and widths."""
    return [Conv(f"{name}_{i}", channels, (height, width)) for i, (channels, height, width) in enumerate(sizes, 1)]


def _inception_a(pooled: int) -> Fork:
    """35 x 35 places."""
    return (
        [Conv("branch1x1", 64)],
        [*_chain("branch5x5", (48, 1, 1), (64, 5, 5))],
        [*_chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3))],
        [_average_pool, Conv("branch_pool", pooled)],
    )


def _inception_c(middle: int) -> Fork:
    """17 x 17 places."""
    return (
        [Conv("branch1x1", 192)],
        [*_chain("branch7x7", (middle, 1, 1), (middle, 1, 7), (192, 7, 1))],
        [*_chain("branch7x7dbl", (middle, 1, 1), (middle, 7, 1), (middle, 1, 7), (middle, 7, 1), (192, 1, 7))],
        [_average_pool, Conv("branch_pool", 192)],
    )


def _inception_e(pool: Pool) -> Fork:
    """8 x 8 places."""

    def ends(name: str) -> Fork:
        return [Conv(f"{name}a", 384, (1, 3))], [Conv(f"{name}b", 384, (3, 1))]

    return (
        [Conv("branch1x1", 320)],
        [Conv("branch3x3_1", 384), ends("branch3x3_2")],
        [*_chain("branch3x3dbl", (448, 1, 1), (384, 3, 3)), ends("branch3x3dbl_3")],
        [pool, Conv("branch_pool", 192)],
    )


STEM: Chain = [
    _shrinking("Conv2d_1a_3x3", 32),
    Conv("Conv2d_2a_3x3", 32, (3, 3), padding="VALID"),
    Conv("Conv2d_2b_3x3", 64, (3, 3)),
    _max_pool,
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3), padding="VALID"),
    _max_pool,
]
BLOCKS: dict[str, Fork] = {
    "Mixed_5b": _inception_a(32),
    "Mixed_5c": _inception_a(64),
    "Mixed_5d": _inception_a(64),
    "Mixed_6a": (  # from 35 x 35 places to 17 x 17
        [_shrinking("branch3x3", 384)],
        [*_chain("branch3x3dbl", (64, 1, 1), (96, 3, 3)), _shrinking("branch3x3dbl_3", 96)],
        [_max_pool],
    ),
    "Mixed_6b": _inception_c(128),
    "Mixed_6c": _inception_c(160),
    "Mixed_6d": _inception_c(160),
    "Mixed_6e": _inception_c(192),
    "Mixed_7a": (  # from 17 x 17 places to 8 x 8
        [Conv("branch3x3_1", 192), _shrinking("branch3x3_2", 320)],
        [*_chain("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1)), _shrinking("branch7x7x3_4", 192)],
        [_max_pool],
    ),
    "Mixed_7b": _inception_e(_average_pool),
    "Mixed_7c": _inception_e(_max_in_place),  # the graph takes the maximum where its neighbours average
}
