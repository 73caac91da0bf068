"""State dicts as PyTorch saves them; tests that need one are skipped where it is not installed."""

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest


def save_state_dict(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes arrays as `torch.save` does with tensors."""
    torch = pytest.importorskip("torch")
    torch.save({name: as_tensor(array) for name, array in arrays.items()}, path)


def as_tensor(array: np.ndarray):
    """A PyTorch tensor that has a copy of the array's numbers."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
