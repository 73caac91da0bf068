"""State dicts as PyTorch saves them; tests that need one are skipped where it is not installed."""

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file


def save_state_dict(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes arrays as `torch.save` does with tensors."""
    torch = pytest.importorskip("torch")
    torch.save({name: as_tensor(array) for name, array in arrays.items()}, path)


def save_tensors(arrays: Mapping[str, np.ndarray], path: Path) -> Path:
    """Writes arrays by the path's suffix, as safetensors or as PyTorch does, and returns the path."""
    save_file(dict(arrays), path) if path.suffix == ".safetensors" else save_state_dict(arrays, path)
    return path


def as_tensor(array: np.ndarray):
    """A PyTorch tensor that has a copy of the array's numbers."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
