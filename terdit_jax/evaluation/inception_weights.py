"""The weights of the FID Inception network from files: the PyTorch port's `.pth`, or TensorFlow's `.pb` graph.

Every name and shape is checked, and batch norms are folded into the convolutions before them. The network is
`inception`'s; PyTorch and TensorFlow are not needed.
"""

from collections.abc import Callable, Mapping
import hashlib
import os
from pathlib import Path
import shutil
from typing import NamedTuple
import urllib.request

import numpy as np

from terdit_jax.errors import UserError
from terdit_jax.evaluation.inception import BLOCKS, CLASSES, POOL_FEATURES, kernels
from terdit_jax.evaluation.trained_weights import NORM, fold, read_tensor
from terdit_jax.files import new_file
from terdit_jax.interop.graph_def import read_constants
from terdit_jax.interop.torch_legacy import is_legacy, load_legacy_state_dict
from terdit_jax.interop.torch_pickle import load_state_dict
from terdit_jax.paths import local_path

FILE_NAME = "pt_inception-2015-12-05-6726825d.pth"  # which ends in the first digits of its SHA-256
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE_NAME}"
CACHE_VARIABLE = "TERDIT_JAX_CACHE"
_TIMEOUT_SECONDS = 30

# Ours and the port's -> the graph's scope. Blocks are numbered there, and branches are towers.
_STEM_SCOPES = {
    "Conv2d_1a_3x3": "conv", "Conv2d_2a_3x3": "conv_1", "Conv2d_2b_3x3": "conv_2", "Conv2d_3b_1x1": "conv_3",
    "Conv2d_4a_3x3": "conv_4",
}  # fmt: skip
_BLOCK_SCOPES = {name: f"mixed_{i}" if i else "mixed" for i, name in enumerate(BLOCKS)}
_SECOND_TOWER = ("branch3x3dbl", "branch7x7dbl", "branch7x7x3")


class Inception(NamedTuple):
    """The network's parameters and the file that they came from."""

    params: dict
    source: str
    sha256: str


def load_inception(path: str | os.PathLike | None = None) -> Inception:
    """The network's parameters (see `inception`), float32 NumPy arrays.

    Args:
      path: the PyTorch port's file, in either format of torch.save, or the graph; None takes the port's file from
        `cache_folder()`, fetching it first where it is not there.

    Raises:
      UserError: a file that cannot be had or read, a tensor that is missing, unknown, of another shape or not finite.
    """
    path = local_path(path, "--inception") if path else fetch_inception()
    try:
        with open(path, "rb") as file:
            start = file.read(2)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"cannot read Inception weights {path} ({error.strerror or error}): get them from {URL}"
        ) from error
    if start == b"PK" or is_legacy(path):
        arrays = load_state_dict(path) if start == b"PK" else load_legacy_state_dict(path)
        params = params_from_torch(arrays, str(path))
    else:
        params = params_from_graph(read_constants(path), str(path))
    return Inception(params, str(path), sha256)


def cache_folder() -> Path:
    """$TERDIT_JAX_CACHE, or ~/.cache/terdit_jax."""
    return local_path(os.environ.get(CACHE_VARIABLE) or "~/.cache/terdit_jax", f"${CACHE_VARIABLE}")


def fetch_inception(url: str = URL) -> Path:
    """The port's file in `cache_folder()`, fetched if it is not there; its digest must begin as its name says.

    Raises:
      UserError: no network, no such file, or another content.
    """
    path = cache_folder() / FILE_NAME
    if path.exists():
        return path
    try:
        with new_file(path) as temporary:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response, temporary.open("wb") as file:
                shutil.copyfileobj(response, file)
            with temporary.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            wanted = FILE_NAME.removesuffix(".pth").rpartition("-")[2]
            if not digest.startswith(wanted):
                raise UserError(
                    f"{url} gave a file with SHA-256 {digest[:8]}..., expected {wanted}...: not the network"
                )
    except OSError as error:  # urllib's errors are among them
        raise UserError(
            f"Inception weights are neither at {path} nor to be fetched from {url} ({str(error)[:120]}): give"
            " --inception=PATH, or ask for a proxy by --features"
        ) from error
    return path


def params_from_torch(arrays: Mapping[str, np.ndarray], source: str) -> dict:
    """Parameters of the PyTorch port's state dict; raises UserError as `load_inception` does."""
    names = {f"{conv}.conv.weight" for conv in kernels()} | {"fc.weight", "fc.bias"}
    names |= {f"{conv}.bn.{part}" for conv in kernels() for part in NORM}
    counters = {f"{conv}.bn.num_batches_tracked" for conv in kernels()}  # newer PyTorch's, without effect
    for name in arrays:
        if name not in names and name not in counters:
            raise UserError(f"{source}: tensor {name[:60]!r} does not belong to the FID Inception network")

    def read(name: str, *shape: int) -> np.ndarray:
        return read_tensor(arrays, name, shape, source)

    def convolution(name: str, shape: tuple[int, int, int, int]) -> tuple[np.ndarray, ...]:
        weight = read(f"{name}.conv.weight", *shape).transpose(0, 2, 3, 1)
        return (weight, *(read(f"{name}.bn.{part}", shape[0]) for part in NORM))

    read("fc.bias", CLASSES)
    return _assemble(convolution, read("fc.weight", CLASSES, POOL_FEATURES))


def params_from_graph(constants: Mapping[str, np.ndarray], source: str) -> dict:
    """Parameters of the graph's constants; raises UserError as `load_inception` does."""
    known = {f"{graph_scope(conv)}/conv2d_params" for conv in kernels()}
    for name in constants:
        if name.endswith("/conv2d_params") and name not in known:
            raise UserError(f"{source}: constant {name[:60]!r} does not belong to the FID Inception network")

    def read(name: str, *shape: int) -> np.ndarray:
        return read_tensor(constants, name, shape, source)

    def convolution(name: str, shape: tuple[int, int, int, int]) -> tuple[np.ndarray, ...]:
        scope, (out, before, height, width) = graph_scope(name), shape
        weight = read(f"{scope}/conv2d_params", height, width, before, out).transpose(3, 0, 1, 2)
        parts = ("gamma", "beta", "moving_mean", "moving_variance")
        return (weight, *(read(f"{scope}/batchnorm/{part}", out) for part in parts))

    read("softmax/biases", CLASSES)
    return _assemble(convolution, read("softmax/weights", POOL_FEATURES, CLASSES).T)


def graph_scope(name: str) -> str:
    """The graph's name of one of our convolutions: Mixed_7b.branch3x3_2b is mixed_9/tower/mixed/conv_1."""
    block, _, branch = name.partition(".")
    if not branch:
        return _STEM_SCOPES[block]
    scope = _BLOCK_SCOPES[block]
    branch, _, place = branch.partition("_")
    if branch == "branch1x1" or (block == "Mixed_6a" and branch == "branch3x3"):
        return f"{scope}/conv"
    if place == "pool":
        return f"{scope}/tower_2/conv"
    # Mixed_6a has one tower alone: its first branch is a plain convolution.
    tower = "tower_1" if branch in _SECOND_TOWER and block != "Mixed_6a" else "tower"
    if place[-1] in "ab":  # the two ends of a branch that forks
        return f"{scope}/{tower}/mixed/conv{'' if place[-1] == 'a' else '_1'}"
    number = int(place) - 1
    return f"{scope}/{tower}/conv{f'_{number}' if number else ''}"


def _assemble(convolution: Callable[[str, tuple[int, int, int, int]], tuple[np.ndarray, ...]], fc: np.ndarray) -> dict:
    params: dict = {"fc": {"weight": np.ascontiguousarray(fc, np.float32)}}
    for name, shape in kernels().items():
        branch = params
        for part in name.split("."):
            branch = branch.setdefault(part, {})
        branch |= fold(*convolution(name, shape))
    return params
