"""Reads `.pth` files without PyTorch and without trusting them: the zip of `torch.save`, its tensors mapped in place.

A pickle is a program. This one is interpreted here, limited to the two dozen instructions that `torch.save` emits for
state dicts and argparse namespaces; nothing is imported or called, and no size is believed before the file has it.
"""

import dataclasses
import io
from itertools import islice
import math
import os
import pickletools
import struct
from typing import Any, BinaryIO, NamedTuple
import zipfile

import ml_dtypes
import numpy as np

from terdit_jax.errors import UserError
from terdit_jax.interop.safetensors import is_possible

# Python objects take up to seventy times the bytes they come from; the largest published model needs a fourth of these.
MAX_INDEX_BYTES = 2 << 20
MAX_INSTRUCTIONS = 1 << 17
_LOCAL_HEADER_BYTES = 30
_STORAGES = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "ByteStorage": np.uint8, "CharStorage": np.int8,
    "ShortStorage": np.int16, "IntStorage": np.int32, "LongStorage": np.int64, "BoolStorage": np.bool_,
}  # fmt: skip
_ORDERED_DICT = ("collections", "OrderedDict")
_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = ("torch._utils", "_rebuild_parameter")
_NAMESPACE = ("argparse", "Namespace")
_ALLOWED = {_ORDERED_DICT, _TENSOR, _PARAMETER, _NAMESPACE} | {("torch", name) for name in _STORAGES}


class Global(NamedTuple):
    """A name that a pickle asked for; only a mark here."""

    module: str
    name: str


class Index(io.FileIO):
    """A file whose zip directory and pickle are read whole, and refused where that would be much."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > MAX_INDEX_BYTES:
            raise ValueError(f"its directory or pickle has {size} bytes, too many for names")
        return super().read(size)


class Storage(NamedTuple):
    """The storage of some tensors: a member of the zip."""

    dtype: np.dtype
    key: str
    size: int


class Tensor(NamedTuple):
    """A tensor as a pickle describes it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass
class Namespace:
    """An argparse.Namespace's attributes."""

    attributes: dict[str, Any]


def load_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """name -> view of the mapped file, read when touched.

    Raises:
      UserError: not a zip written by torch.save, a damaged member (each has a CRC-32), a pickle that asks for anything
        but tensors, a tensor that lies outside its storage or is not row-major, or tensors that share their numbers.
    """
    value, members = _load(path)
    if not isinstance(value, dict) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise UserError(f"{path}: not a state dict, which maps names to tensors")
    data = np.asarray(np.memmap(path, np.uint8, "r"))
    arrays = {name: _map_tensor(tensor, members, data, f"{path}: {name[:60]!r}") for name, tensor in value.items()}
    # A thousand names for one storage would become a thousand copies of it.
    if sum(array.nbytes for array in arrays.values()) > data.size:
        raise UserError(f"{path}: its tensors share storages, and are together larger than the file")
    return arrays


def load_namespace(path: str | os.PathLike) -> dict[str, Any]:
    """The attributes of a pickled argparse.Namespace. Raises UserError as `load_state_dict` does."""
    value, _ = _load(path)
    if not isinstance(value, Namespace):
        raise UserError(f"{path}: not an argparse.Namespace, which model_args.pth should hold")
    return value.attributes


def _load(path: str | os.PathLike) -> tuple[Any, dict[str, zipfile.ZipInfo]]:
    """The pickled value, and the zip's members by name within its one top folder."""
    try:
        with Index(path) as file, zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            if any(info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size for info in infos):
                raise UserError(f"{path}: holds compressed members, which torch.save never writes")
            if sum(info.file_size for info in infos) > file.seek(0, os.SEEK_END):
                raise UserError(f"{path}: its members overlap")
            if damaged := archive.testzip():
                raise UserError(f"{path}: member {damaged[:60]!r} does not match its CRC-32: the file is damaged")
            members = {info.filename.partition("/")[2]: info for info in infos}
            if "data.pkl" not in members or len(members) != len(infos):
                raise UserError(f"{path}: not a file of torch.save")
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise UserError(f"{path}: holds big-endian numbers")
            program = archive.read(members["data.pkl"])
    except (OSError, EOFError, RuntimeError, ValueError, OverflowError, struct.error, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or str(error)[:100]
        raise UserError(f"cannot read {path} as a file of torch.save: {reason}") from error
    try:
        return interpret(program), members
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its pickle is refused: {str(error)[:150]}") from error


def _map_tensor(tensor: Tensor, members: dict[str, zipfile.ZipInfo], data: np.ndarray, what: str) -> np.ndarray:
    storage, shape = tensor.storage, tensor.shape
    member = members.get(f"data/{storage.key}")
    if member is None:
        raise UserError(f"{what} refers to a storage that is not in the file")
    # What the zip's directory leaves out: the name and padding in front of the member itself.
    local = data[member.header_offset : member.header_offset + _LOCAL_HEADER_BYTES]
    name_bytes, extra_bytes = (int(length) for length in local[26:30].view("<u2"))
    start = member.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    if member.file_size != storage.size * storage.dtype.itemsize or start + member.file_size > data.size:
        raise UserError(f"{what} has a storage of another size than the file")
    count = math.prod(shape)
    if not 0 <= tensor.offset <= storage.size - count:
        raise UserError(f"{what} lies outside its storage")
    dense = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if count and any(n > 1 and a != b for n, a, b in zip(shape, tensor.strides, dense, strict=True)):
        raise UserError(f"{what} is not row-major: call contiguous() before saving it")
    begin = start + tensor.offset * storage.dtype.itemsize
    return data[begin : begin + count * storage.dtype.itemsize].view(storage.dtype).reshape(shape)


def interpret(program: bytes | BinaryIO) -> Any:
    """Runs a pickle, the first one of a file, on a stack of inert values.

    Raises:
      ValueError, IndexError, KeyError, TypeError, AttributeError: a pickle that is damaged or asks for more.
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in islice(pickletools.genops(program), MAX_INSTRUCTIONS):
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(stack)
                stack = []
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(opcode.name[-1]))]
                stack.append(tuple(reversed(items)))
            case "TUPLE":
                items, stack = stack, marks.pop()
                stack.append(tuple(items))
            case "APPEND":
                item = stack.pop()
                _expect(stack[-1], list).append(item)
            case "APPENDS":
                items, stack = stack, marks.pop()
                _expect(stack[-1], list).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _expect(stack[-1], dict)[_expect(key, str)] = value
            case "SETITEMS":
                items, stack = stack, marks.pop()
                keys = [_expect(key, str) for key in items[::2]]  # only text: hashing nested tuples can take for ever
                _expect(stack[-1], dict).update(zip(keys, items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                module, _, name = argument.partition(" ")
                if (module, name) not in _ALLOWED:
                    raise ValueError(f"it asks for {argument[:60]!r}, which no state dict needs")
                stack.append(Global(module, name))
            case "BINPERSID":
                stack.append(_make_storage(stack.pop()))
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(_make(_expect(stack.pop(), Global), _expect(arguments, tuple)))
            case "BUILD":
                state = stack.pop()
                # An OrderedDict's attributes (nn.Module leaves versions there) say nothing of its tensors.
                if isinstance(stack[-1], Namespace):
                    stack[-1].attributes = _expect(state, dict)  # not copied: one state could be given a thousand times
                else:
                    _expect(stack[-1], dict)
            case other:
                raise ValueError(f"it uses the instruction {other}, which torch.save does not")
    raise ValueError(f"it does not end within {MAX_INSTRUCTIONS} instructions")


def _make_storage(identity: object) -> Storage:
    kind, storage_type, key, _, size, *rest = _expect(identity, tuple)
    if rest not in ([], [None]):  # the older format's views of other storages
        raise ValueError("it holds views of storages")
    if kind != "storage" or not isinstance(storage_type, Global) or storage_type.name not in _STORAGES:
        raise ValueError("it holds something else than tensors")
    return Storage(np.dtype(_STORAGES[storage_type.name]), _expect(key, str), _expect(size, int))


def _make(what: Global, arguments: tuple) -> Any:
    if what == _TENSOR:
        storage, offset, shape, strides = arguments[:4]
        numbers = (_expect(offset, int), *_expect(shape, tuple), *_expect(strides, tuple))
        if any(type(n) is not int for n in numbers) or len(shape) != len(strides) or not is_possible(shape):
            raise ValueError("it holds a tensor of an impossible shape")
        return Tensor(_expect(storage, Storage), offset, shape, strides)
    if what == _PARAMETER:
        return _expect(arguments[0], Tensor)
    if what == _ORDERED_DICT and not arguments:
        return {}
    if what == _NAMESPACE and not arguments:
        return Namespace({})
    raise ValueError(f"it calls {what.module}.{what.name}, which no state dict needs")


def _expect(value: Any, kind: type) -> Any:
    """The value itself; NamedTuples do not pass for tuples."""
    if type(value) is not kind:
        raise TypeError(f"it has {type(value).__name__} where {kind.__name__} belongs")
    return value
