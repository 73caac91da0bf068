"""The FID Inception network (TensorFlow's graph of 2015-12-05), images in, pool and spatial features and logits out.

Images are resized within it, as the graph does. Where the weights come from is `inception_weights`'s. Parameters are
nested dicts under the names of the common PyTorch port, each convolution with its batch norm folded in.
"""

from collections.abc import Callable
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

# A convolution by name: output and input channels, height and width of its kernel. In the order of the computation.
_Kernels = dict[str, tuple[int, int, int, int]]


class Features(NamedTuple):
    """What the ADM evaluator reads of the network."""

    pool: Array  # (B, 2048) float32, of FID, precision and recall
    spatial: Array  # (B, 2023) float32, of sFID
    logits: Array  # (B, 1008) float32, without the bias, of the inception score


def extract(params: dict, images: Array) -> Features:
    """Features of images (B, H, W, 3) of any size, uint8 or float in [0, 255], as the ADM evaluator feeds them."""
    x = legacy_bilinear(images.astype(jnp.float32), SIDE, SIDE)
    return network(params, (x - 128) / 128)


def network(params: dict, x: Array) -> Features:
    """Features of (B, 299, 299, 3) float32 in [-1, 1)."""
    assert x.ndim == 4 and x.shape[-1] == 3 and x.dtype == jnp.float32, (x.shape, x.dtype)
    x = _conv(params["Conv2d_1a_3x3"], x, 2, "VALID")
    x = _conv(params["Conv2d_2a_3x3"], x, padding="VALID")
    x = _conv(params["Conv2d_2b_3x3"], x)
    x = _max_pool(x, 2, "VALID")
    x = _conv(params["Conv2d_3b_1x1"], x)
    x = _conv(params["Conv2d_4a_3x3"], x, padding="VALID")
    x = _max_pool(x, 2, "VALID")
    spatial = x  # replaced below
    for name, block in BLOCKS.items():
        if name == "Mixed_6d":
            spatial = _conv(params[name]["branch1x1"], x)[..., :SPATIAL_CHANNELS]
        x = block(params[name], x)
    pool = x.mean(axis=(1, 2))
    logits = jnp.matmul(pool, params["fc"]["weight"].T, precision=jax.lax.Precision.HIGHEST)
    return Features(pool, spatial.reshape(len(x), -1), logits)


def inception_a(params: dict, x: Array) -> Array:
    """Mixed_5b, 5c and 5d, on 35 x 35 places."""
    return _concatenated(
        _conv(params["branch1x1"], x),
        _chain(params, ("branch5x5_1", "branch5x5_2"), x),
        _chain(params, ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"), x),
        _conv(params["branch_pool"], _average_pool(x)),
    )


def inception_b(params: dict, x: Array) -> Array:
    """Mixed_6a, from 35 x 35 places to 17 x 17."""
    double = _chain(params, ("branch3x3dbl_1", "branch3x3dbl_2"), x)
    return _concatenated(
        _conv(params["branch3x3"], x, 2, "VALID"),
        _conv(params["branch3x3dbl_3"], double, 2, "VALID"),
        _max_pool(x, 2, "VALID"),
    )


def inception_c(params: dict, x: Array) -> Array:
    """Mixed_6b to 6e, on 17 x 17 places."""
    return _concatenated(
        _conv(params["branch1x1"], x),
        _chain(params, tuple(f"branch7x7_{i}" for i in (1, 2, 3)), x),
        _chain(params, tuple(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)), x),
        _conv(params["branch_pool"], _average_pool(x)),
    )


def inception_d(params: dict, x: Array) -> Array:
    """Mixed_7a, from 17 x 17 places to 8 x 8."""
    seven = _chain(params, tuple(f"branch7x7x3_{i}" for i in (1, 2, 3)), x)
    return _concatenated(
        _conv(params["branch3x3_2"], _conv(params["branch3x3_1"], x), 2, "VALID"),
        _conv(params["branch7x7x3_4"], seven, 2, "VALID"),
        _max_pool(x, 2, "VALID"),
    )


def inception_e_1(params: dict, x: Array) -> Array:
    """Mixed_7b, on 8 x 8 places."""
    return _inception_e(params, x, _average_pool)


def inception_e_2(params: dict, x: Array) -> Array:
    """Mixed_7c: the graph takes the maximum where its neighbours average."""
    return _inception_e(params, x, lambda x: _max_pool(x, 1, "SAME"))


BLOCKS: dict[str, Callable[[dict, Array], Array]] = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), inception_a),
    "Mixed_6a": inception_b,
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), inception_c),
    "Mixed_7a": inception_d,
    "Mixed_7b": inception_e_1,
    "Mixed_7c": inception_e_2,
}


def kernels() -> _Kernels:
    """Every convolution, named as in the PyTorch port: (out, in, height, width)."""
    shapes = {
        "Conv2d_1a_3x3": (32, 3, 3, 3),
        "Conv2d_2a_3x3": (32, 32, 3, 3),
        "Conv2d_2b_3x3": (64, 32, 3, 3),
        "Conv2d_3b_1x1": (80, 64, 1, 1),
        "Conv2d_4a_3x3": (192, 80, 3, 3),
    }
    for name, width, pooled in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        shapes |= _within(f"Mixed_{name}", _kernels_a(width, pooled))
    shapes |= _within("Mixed_6a", _kernels_b(288))
    for name, middle in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        shapes |= _within(f"Mixed_{name}", _kernels_c(middle))
    shapes |= _within("Mixed_7a", _kernels_d(768))
    for name, width in (("7b", 1280), ("7c", 2048)):
        shapes |= _within(f"Mixed_{name}", _kernels_e(width))
    return shapes


def _kernels_a(width: int, pooled: int) -> _Kernels:
    return {
        "branch1x1": (64, width, 1, 1),
        "branch5x5_1": (48, width, 1, 1), "branch5x5_2": (64, 48, 5, 5),
        "branch3x3dbl_1": (64, width, 1, 1), "branch3x3dbl_2": (96, 64, 3, 3), "branch3x3dbl_3": (96, 96, 3, 3),
        "branch_pool": (pooled, width, 1, 1),
    }  # fmt: skip


def _kernels_b(width: int) -> _Kernels:
    return {
        "branch3x3": (384, width, 3, 3),
        "branch3x3dbl_1": (64, width, 1, 1), "branch3x3dbl_2": (96, 64, 3, 3), "branch3x3dbl_3": (96, 96, 3, 3),
    }  # fmt: skip


def _kernels_c(middle: int) -> _Kernels:
    return {
        "branch1x1": (192, 768, 1, 1),
        "branch7x7_1": (middle, 768, 1, 1), "branch7x7_2": (middle, middle, 1, 7),
        "branch7x7_3": (192, middle, 7, 1),
        "branch7x7dbl_1": (middle, 768, 1, 1), "branch7x7dbl_2": (middle, middle, 7, 1),
        "branch7x7dbl_3": (middle, middle, 1, 7), "branch7x7dbl_4": (middle, middle, 7, 1),
        "branch7x7dbl_5": (192, middle, 1, 7),
        "branch_pool": (192, 768, 1, 1),
    }  # fmt: skip


def _kernels_d(width: int) -> _Kernels:
    return {
        "branch3x3_1": (192, width, 1, 1), "branch3x3_2": (320, 192, 3, 3),
        "branch7x7x3_1": (192, width, 1, 1), "branch7x7x3_2": (192, 192, 1, 7),
        "branch7x7x3_3": (192, 192, 7, 1), "branch7x7x3_4": (192, 192, 3, 3),
    }  # fmt: skip


def _kernels_e(width: int) -> _Kernels:
    return {
        "branch1x1": (320, width, 1, 1),
        "branch3x3_1": (384, width, 1, 1), "branch3x3_2a": (384, 384, 1, 3), "branch3x3_2b": (384, 384, 3, 1),
        "branch3x3dbl_1": (448, width, 1, 1), "branch3x3dbl_2": (384, 448, 3, 3),
        "branch3x3dbl_3a": (384, 384, 1, 3), "branch3x3dbl_3b": (384, 384, 3, 1),
        "branch_pool": (192, width, 1, 1),
    }  # fmt: skip


def _within(block: str, shapes: _Kernels) -> _Kernels:
    return {f"{block}.{name}": shape for name, shape in shapes.items()}


def _inception_e(params: dict, x: Array, pool: Callable[[Array], Array]) -> Array:
    single = _conv(params["branch3x3_1"], x)
    double = _chain(params, ("branch3x3dbl_1", "branch3x3dbl_2"), x)
    return _concatenated(
        _conv(params["branch1x1"], x),
        _conv(params["branch3x3_2a"], single),
        _conv(params["branch3x3_2b"], single),
        _conv(params["branch3x3dbl_3a"], double),
        _conv(params["branch3x3dbl_3b"], double),
        _conv(params["branch_pool"], pool(x)),
    )


def _conv(params: dict, x: Array, stride: int = 1, padding: str = "SAME") -> Array:
    """Convolution, batch norm (folded into it) and ReLU; float32 throughout, also on accelerators."""
    y = jax.lax.conv_general_dilated(
        x,
        params["weight"],
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "OHWI", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
    return jax.nn.relu(y + params["bias"])


def _chain(params: dict, names: tuple[str, ...], x: Array) -> Array:
    for name in names:
        x = _conv(params[name], x)
    return x


def _concatenated(*branches: Array) -> Array:
    return jnp.concatenate(branches, axis=-1)


def _max_pool(x: Array, stride: int, padding: str) -> Array:
    """Over 3 x 3."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _average_pool(x: Array) -> Array:
    """Over 3 x 3; places beyond the edge do not count, as in TensorFlow."""

    def total(x: Array) -> Array:
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")

    return total(x) / total(jnp.ones((1, *x.shape[1:3], 1), x.dtype))
