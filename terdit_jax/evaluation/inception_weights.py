"""The weights of the FID Inception network from the PyTorch port's `.pth`.

Every name and shape is checked, and batch norms are folded into the convolutions before them. The network
lives in `inception`.
"""

from collections.abc import Mapping
import hashlib
import os
from pathlib import Path
import shutil
from typing import NamedTuple
import urllib.request

import numpy as np

from terdit_jax.errors import UserError
from terdit_jax.evaluation.inception import CLASSES, POOL_FEATURES, kernels
from terdit_jax.files import new_file
from terdit_jax.interop.published import FLOATS
from terdit_jax.interop.torch_file import load_state_dict
from terdit_jax.paths import local_path

FILE_NAME = "pt_inception-2015-12-05-6726825d.pth"  # which ends in the first digits of its SHA-256
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE_NAME}"
CACHE_VARIABLE = "TERDIT_JAX_CACHE"
_TIMEOUT_SECONDS = 30
_NORM = ("weight", "bias", "running_mean", "running_var")  # PyTorch's names of a batch norm's tensors
_EPSILON = 1e-3  # of every batch norm


class Inception(NamedTuple):
    """The network's parameters and the file that they came from."""

    params: dict
    source: str
    sha256: str


def load_inception(path: str | os.PathLike | None = None) -> Inception:
    """The network's parameters (see `inception`), float32 NumPy arrays.

    Args:
      path: the port's file, in either format of torch.save; None takes it from `cache_folder()`, fetching it first
        where it is not there.

    Raises:
      UserError: a file that cannot be had or read, a tensor that is missing, unknown, of another shape or not finite.
    """
    path = local_path(path, "--inception") if path else fetch_inception()
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"cannot read Inception weights {path} ({error.strerror or error}): get them from {URL}"
        ) from error
    return Inception(params_from_torch(load_state_dict(path), str(path)), str(path), sha256)


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
            " --inception=PATH"
        ) from error
    return path


def params_from_torch(arrays: Mapping[str, np.ndarray], source: str) -> dict:
    """Parameters of the PyTorch port's state dict; raises UserError as `load_inception` does."""
    names = {f"{conv}.conv.weight" for conv in kernels()} | {"fc.weight", "fc.bias"}
    names |= {f"{conv}.bn.{part}" for conv in kernels() for part in _NORM}
    counters = {f"{conv}.bn.num_batches_tracked" for conv in kernels()}  # newer PyTorch's, without effect
    for name in arrays:
        if name not in names and name not in counters:
            raise UserError(f"{source}: tensor {name[:60]!r} does not belong to the FID Inception network")
    read_tensor(arrays, "fc.bias", (CLASSES,), source)
    fc = read_tensor(arrays, "fc.weight", (CLASSES, POOL_FEATURES), source)
    params: dict = {"fc": {"weight": np.ascontiguousarray(fc, np.float32)}}
    for name, shape in kernels().items():
        branch = params
        for part in name.split("."):
            branch = branch.setdefault(part, {})
        weight = read_tensor(arrays, f"{name}.conv.weight", shape, source).transpose(0, 2, 3, 1)
        branch |= fold(weight, *(read_tensor(arrays, f"{name}.bn.{part}", shape[:1], source) for part in _NORM))
    return params


def read_tensor(arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], source: str) -> np.ndarray:
    """The tensor itself.

    Raises:
      UserError: naming `source`, for a tensor that is missing, of another shape or dtype, not finite, or a variance
        below 0.
    """
    if name not in arrays:
        raise UserError(f"{source}: lacks tensor {name!r}, so it is another network")
    array = arrays[name]
    if array.shape != shape or array.dtype not in FLOATS:
        raise UserError(f"{source}: tensor {name!r} is {array.dtype} {array.shape}, expected floats {shape}")
    if not np.isfinite(array).all():
        raise UserError(f"{source}: tensor {name!r} holds values that are not finite")
    if name.endswith("running_var") and (array < 0).any():
        raise UserError(f"{source}: tensor {name!r} holds negative variances")
    return array


def fold(weight: np.ndarray, gain: np.ndarray, bias: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> dict:
    """Merges a batch norm into the convolution (out, height, width, in) before it, in float64 until it is made.

    Returns:
      `weight` of the same shape and `bias` (out,), float32.
    """
    scale = gain.astype(np.float64) / np.sqrt(variance.astype(np.float64) + _EPSILON)
    return {
        "weight": np.ascontiguousarray(weight * scale[:, None, None, None], np.float32),
        "bias": (bias - mean * scale).astype(np.float32),
    }
