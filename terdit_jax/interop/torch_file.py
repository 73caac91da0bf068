"""Reads `.pth` and `.pt` files through PyTorch, if installed: tensors and plain data, mapped where possible.

`weights_only` keeps a pickle from running code. What PyTorch leaves out is added here: checksums are compared, and
tensors that share their numbers may not add up to more than the file.
"""

import argparse
from collections.abc import Mapping
import os
from typing import Any
import warnings
import zipfile

import ml_dtypes
import numpy as np

from terdit_jax.errors import UserError, in_a_line

_HELD = ("ema", "model")  # what DiT's and SiT's training saves state dicts under, beside its "opt" and "args"


def load_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a state dict by name, read from the file when touched, in either format of `torch.save`.

    Raises:
      UserError: PyTorch is not installed, the file is damaged or none of `torch.save`, it holds anything but dense
        tensors, or its tensors are together larger than the file.
    """
    return _as_arrays(path, _load(path), str(path))


def load_checkpoint(path: str | os.PathLike, ema: bool) -> tuple[dict[str, np.ndarray], bool | None]:
    """The tensors of a state dict that is bare, or that a checkpoint of DiT's or SiT's training holds beside others.

    Args:
      path: the file.
      ema: take the averaged weights, "ema", of a training checkpoint; else, or if it has none, "model".

    Returns:
      The tensors as `load_state_dict`; whether they are averaged, None of a bare state dict, which does not say.

    Raises:
      UserError: as `load_state_dict`.
    """
    value = _load(path)
    held = [name for name in _HELD if isinstance(value, Mapping) and name in value]
    if not held:
        return _as_arrays(path, value, str(path)), None
    name = held[0] if ema else held[-1]
    return _as_arrays(path, value[name], f"{path}: its {name!r}"), name == "ema"


def load_namespace(path: str | os.PathLike) -> dict[str, Any]:
    """The attributes of a pickled argparse.Namespace. Raises UserError as `load_state_dict` does."""
    value = _load(path)
    if not isinstance(value, argparse.Namespace):
        raise UserError(f"{path}: not an argparse.Namespace, which model_args.pth should hold")
    return vars(value)


def _load(path: str | os.PathLike) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path}: reading it takes PyTorch: pip install 'terdit-jax[torch]'") from error
    try:
        is_zip = zipfile.is_zipfile(path)  # else the format of PyTorch before 1.6, which cannot be mapped
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise UserError(f"{path}: member {damaged[:60]!r} does not match its CRC-32: the file is damaged")
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # of storages' older types
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # of PyTorch's, zipfile's and pickle's
        raise UserError(f"{path} cannot be read as a file of torch.save ({in_a_line(error)})") from error


def _as_arrays(path: str | os.PathLike, value: Any, what: str) -> dict[str, np.ndarray]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{what}: not a state dict, which maps names to tensors")
    arrays = {name: _as_array(tensor, f"{what}: {name[:60]!r}") for name, tensor in value.items()}
    # A thousand names for one storage would become a thousand copies of it.
    if sum(array.nbytes for array in arrays.values()) > os.path.getsize(path):
        raise UserError(f"{what}: its tensors share storages, and are together larger than the file")
    return arrays


def _as_array(tensor: Any, what: str) -> np.ndarray:
    """A read-only array of a tensor's numbers."""
    import torch

    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise UserError(f"{what} is no dense tensor")
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    try:
        if tensor.dtype == torch.bfloat16:  # which NumPy does not know
            array = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            array = tensor.numpy()
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{what} is {tensor.dtype}, which NumPy does not have") from error
    array.flags.writeable = False
    return array
