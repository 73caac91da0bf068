"""Files as torch.save writes them, put together by hand: without PyTorch, and with anything in the pickle."""

from collections.abc import Iterable, Mapping
import io
import struct
import warnings
import zipfile

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(np.float32): "FloatStorage", np.dtype(np.float64): "DoubleStorage", np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage", np.dtype(np.uint8): "ByteStorage",
}  # fmt: skip
PROTO, STOP, REDUCE, BUILD, PERSID, MARK, NEWOBJ = b"\x80\x02", b".", b"R", b"b", b"Q", b"(", b"\x81"


def text(value: str) -> bytes:
    """BINUNICODE."""
    content = value.encode(errors="surrogatepass")
    return b"X" + struct.pack("<I", len(content)) + content


def name(module: str, attribute: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{attribute}\n".encode()


def pack(*items: bytes) -> bytes:
    """TUPLE of programs."""
    return MARK + b"".join(items) + b"t"


def value(item: object) -> bytes:
    """The program of plain data; bytes are a program already."""
    match item:
        case bytes():
            return item
        case None | True | False:
            return {None: b"N", True: b"\x88", False: b"\x89"}[item]
        case int():
            content = item.to_bytes(item.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(content)]) + content if len(content) < 256 else b"N"
        case float():
            return b"G" + struct.pack(">d", item)
        case str():
            return text(item)
        case tuple():
            return pack(*map(value, item))
        case list():
            return b"](" + b"".join(map(value, item)) + b"e"
    return b"}(" + b"".join(value(key) + value(entry) for key, entry in item.items()) + b"u"


def call(module: str, attribute: str, *arguments: object) -> bytes:
    """GLOBAL, TUPLE, REDUCE: how a pickle calls a function."""
    return name(module, attribute) + value(arguments) + REDUCE


def tensor(
    key: object, storage: str, size: object, offset: object, shape: object, strides: object, kind: str = "storage"
) -> bytes:
    """A tensor's program; each part can be forged."""
    persistent = value((kind, name("torch", storage), key, "cpu", size)) + PERSID
    backward_hooks = call("collections", "OrderedDict")
    return call("torch._utils", "_rebuild_tensor_v2", persistent, offset, shape, strides, False, backward_hooks)


def tensor_of(key: str, array: np.ndarray) -> bytes:
    """The program of a sound tensor in storage `key`."""
    strides = tuple(int(np.prod(array.shape[i + 1 :])) for i in range(array.ndim))
    return tensor(key, STORAGES[array.dtype], array.size, 0, array.shape, strides)


def state_dict(arrays: Mapping[str, np.ndarray], replaced: Mapping[str, bytes] | None = None) -> bytes:
    """The whole pickle of a state dict; `replaced` has other programs for some tensors."""
    programs = {key: tensor_of(str(i), array) for i, (key, array) in enumerate(arrays.items())} | dict(replaced or {})
    return PROTO + value(programs) + STOP


def namespace(attributes: Mapping[str, object] | bytes) -> bytes:
    """The whole pickle of an argparse.Namespace."""
    return PROTO + name("argparse", "Namespace") + b")" + NEWOBJ + value(attributes) + BUILD + STOP


def members(program: bytes, arrays: Iterable[np.ndarray] = ()) -> list[tuple[str, bytes]]:
    """The members of a file: the pickle, what torch.save puts beside it, and the storages 0, 1, 2..."""
    storages = [(f"data/{i}", np.ascontiguousarray(array).tobytes()) for i, array in enumerate(arrays)]
    first, last = [("data.pkl", program), ("byteorder", b"little")], [("version", b"3\n")]
    return [(f"archive/{key}", content) for key, content in first + storages + last]


def zip_of(named: Iterable[tuple[str, bytes]], deflated: tuple[str, ...] = ()) -> bytes:
    """A zip of members in their order, stored but for those named in `deflated`; names may repeat."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")  # of names that repeat
        for key, content in named:
            kind = zipfile.ZIP_DEFLATED if key in deflated else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(key), content, kind)
    return buffer.getvalue()


def torch_file(program: bytes, arrays: Iterable[np.ndarray] = ()) -> bytes:
    """A whole .pth file."""
    return zip_of(members(program, arrays))
