"""Reads the `.pth` files of PyTorch before 1.6, which are still downloaded: five pickles, then the storages.

The pickles are interpreted by `torch_pickle`, which imports and calls nothing. These files carry no checksums.
"""

import io
import math
import os
from typing import Any

import numpy as np

from terdit_jax.errors import UserError
from terdit_jax.interop.torch_pickle import MAX_INDEX_BYTES, Tensor, interpret

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_START = b"\x80\x02\x8a\x0a" + _MAGIC.to_bytes(10, "little") + b"."
_COUNT_BYTES = 8  # in front of each storage
_REFUSALS = (ValueError, IndexError, KeyError, TypeError, AttributeError, EOFError, OverflowError)


def is_legacy(path: str | os.PathLike) -> bool:
    """Whether a file begins as these do. Raises UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_START)) == _START
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def load_legacy_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """name -> view of the mapped file, read when touched. Its tensors may be transposed: converted networks often are.

    Raises:
      UserError: not such a file, a pickle that asks for anything but tensors, a storage that is missing, cut off or of
        another size, a tensor that lies outside its storage or is larger than it.
    """
    try:
        data = np.asarray(np.memmap(path, np.uint8, "r"))
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    head = io.BytesIO(data[:MAX_INDEX_BYTES].tobytes())  # the pickles come first, and are small
    try:
        if (interpret(head), interpret(head)) != (_MAGIC, _VERSION):
            raise ValueError("it begins otherwise")
        system, value, keys = (interpret(head) for _ in range(3))
        if system.get("little_endian") is not True:
            raise ValueError("it holds big-endian numbers")
        tensors = _expect_tensors(value)
        starts = _storage_starts(tensors, keys, data, head.tell())
    except _REFUSALS as error:
        raise UserError(f"{path}: not a state dict in PyTorch's older format: {str(error)[:150]}") from error
    arrays = {
        name: _view(tensor, data[starts[tensor.storage.key] :], f"{path}: {name[:60]!r}")
        for name, tensor in tensors.items()
    }
    # A thousand names for one storage would become a thousand copies of it.
    if sum(array.nbytes for array in arrays.values()) > data.size:
        raise UserError(f"{path}: its tensors share storages, and are together larger than the file")
    return arrays


def _view(tensor: Tensor, data: np.ndarray, what: str) -> np.ndarray:
    """`data` begins with the tensor's storage, which is whole."""
    (dtype, _, size), shape, strides = tensor.storage, tensor.shape, tensor.strides
    count = math.prod(shape)
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if count else 0
    if min(tensor.offset, *strides, 0) < 0 or count > size or last >= max(size, 1):
        raise UserError(f"{what} lies outside its storage")
    numbers = data[: size * dtype.itemsize].view(dtype)[tensor.offset if count else 0 :]
    steps = [stride * dtype.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(numbers, shape, steps, writeable=False)


def _expect_tensors(value: Any) -> dict[str, Tensor]:
    if not isinstance(value, dict) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise ValueError("it does not map names to tensors")
    return value


def _storage_starts(tensors: dict[str, Tensor], keys: Any, data: np.ndarray, position: int) -> dict[str, int]:
    """Where the numbers of each storage begin; they follow one another in the order of `keys`."""
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    if any(storages[tensor.storage.key] != tensor.storage for tensor in tensors.values()):
        raise ValueError("its tensors disagree about a storage")
    if not isinstance(keys, list) or sorted(keys) != sorted(storages):
        raise ValueError("its storages are not those of its tensors")
    starts = {}
    for key in keys:
        storage, begin = storages[key], position + _COUNT_BYTES
        if begin > data.size or int(data[position:begin].view("<i8")[0]) != storage.size:
            raise ValueError(f"storage {key[:60]!r} is cut off or of another size than its tensors say")
        starts[key], position = begin, begin + storage.size * storage.dtype.itemsize
        if position > data.size:
            raise ValueError(f"storage {key[:60]!r} is cut off")
    return starts
