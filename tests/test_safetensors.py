"""The safetensors container holds what the reference implementation reads and writes, and believes no header."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from terdit_jax.errors import UserError
from terdit_jax.interop.safetensors import (
    DTYPES,
    MAX_HEADER_BYTES,
    as_bytes,
    entry,
    open_container,
    render_header,
    write_container,
)

SHAPES = ((3, 4), (5,), (), (0,), (2, 0, 3), (1, 1, 1))
ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
ONE = {"x": np.ones(4)}


def arrays_of_every_kind():
    generator = np.random.default_rng(0)
    draws = {(dtype, shape): 100 * generator.standard_normal(shape) for dtype in DTYPES.values() for shape in SHAPES}
    return {f"{dtype.name} {shape}": np.asarray(draw).astype(dtype) for (dtype, shape), draw in draws.items()}


def write(path, arrays, metadata=None, extra=0):
    end, metadata = sum(array.nbytes for array in arrays.values()), metadata or {}
    entries = {name: entry(array.dtype, array.shape, 10 * end) for name, array in arrays.items()}
    write_container(path, arrays.items(), lambda: metadata, room=len(render_header(entries, metadata)) + extra)


def write_raw(path, header, data=bytes(4)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def refusal(path):
    with pytest.raises(UserError) as caught:
        open_container(path)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500
    return message.removeprefix(f"{path}: ")


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape), name
        assert actual[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("extra", [0, 1, 8, 1000])
def test_what_is_written_is_read_whatever_room_was_kept(tmp_path, extra):
    arrays, metadata = arrays_of_every_kind(), {"a": "x", "é": "\n"}
    write(tmp_path / "a.safetensors", arrays, metadata, extra)
    container = open_container(tmp_path / "a.safetensors")
    assert_same(container.arrays, arrays)
    assert container.metadata == metadata
    content = (tmp_path / "a.safetensors").read_bytes()
    assert len(container.header) % 8 == 0
    assert content[8 : 8 + len(container.header)] == container.header
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_reference_implementation_reads_what_we_write_and_we_what_it_writes(tmp_path):
    arrays, metadata = arrays_of_every_kind(), {"format": "np"}
    write(tmp_path / "ours", arrays, metadata)
    loaded = safetensors.numpy.load_file(tmp_path / "ours")
    assert_same({name: loaded[name] for name in arrays}, arrays)
    with safetensors.safe_open(tmp_path / "ours", "np") as file:
        assert file.metadata() == metadata
    safetensors.numpy.save_file(arrays, tmp_path / "theirs", metadata)
    container = open_container(tmp_path / "theirs")
    assert_same({name: container.arrays[name] for name in arrays}, arrays)
    assert container.metadata == metadata


def test_arrays_are_views_of_the_file_and_cannot_be_written(tmp_path):
    write(tmp_path / "a.safetensors", ONE)
    array = open_container(tmp_path / "a.safetensors").arrays["x"]
    assert not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 2


def test_a_file_appears_only_when_it_is_finished(tmp_path):
    path = tmp_path / "new" / "a.safetensors"

    def tensors():
        yield from ONE.items()
        assert not path.exists() and list(path.parent.iterdir())

    write_container(path, tensors(), dict, room=200)
    assert [each.name for each in path.parent.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_writing_that_is_broken_off_leaves_nothing(tmp_path, error):
    def tensors():
        yield from ONE.items()
        raise error

    with pytest.raises(error):
        write_container(tmp_path / "a.safetensors", tensors(), dict, room=200)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_stays_as_it_is(tmp_path):
    path = tmp_path / "a.safetensors"

    def tensors():
        path.write_text("precious")  # by somebody else, meanwhile
        yield from ONE.items()

    for _ in range(2):
        with pytest.raises(UserError, match=f"--output={path}: exists already"):
            write_container(path, tensors(), dict, room=200)
        assert path.read_text() == "precious" and list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/file/a: Not a directory"):
        write(tmp_path / "file" / "a", ONE)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="cannot write .*: No space left on device"):
        write(tmp_path / "a.safetensors", ONE)
    assert list(tmp_path.iterdir()) == []


def test_a_header_longer_than_readers_take_is_not_written(tmp_path):
    with pytest.raises(UserError, match="a header of 2,097,152 bytes is more than the format allows"):
        write_container(tmp_path / "a.safetensors", (), dict, room=MAX_HEADER_BYTES)
    write_container(tmp_path / "a.safetensors", (), dict, room=MAX_HEADER_BYTES - 8)
    assert open_container(tmp_path / "a.safetensors").arrays == {}


def changed(**values):
    return {"x": ENTRY | values}


HEADERS = [
    *(changed(data_offsets=o) for o in ([0, 5], [-4, 0], [4, 0], [0, 1 << 99], [0.0, 4.0], [0, True], [0, 3])),
    changed(data_offsets=[-(10**4299) + 1, 10**4299]),
    *(changed(shape=s) for s in ([5], [-4], [4.0], 4, [1 << 47, 0, 1 << 47], [1 << 62, 4])),
    *(changed(dtype=d) for d in ("F8_E4M3", "F7", ["U8"])),
    *({"x": entry} for entry in ({"dtype": "U8", "shape": [4]}, [0, 4])),
    {"x\n\u2028" * 5000: 1},
    {"x": ENTRY, "y": ENTRY},
    {"x": ENTRY | {"shape": [3], "data_offsets": [1, 4]}},  # a gap before, after and everywhere
    {"x": ENTRY | {"shape": [3], "data_offsets": [0, 3]}},
    {},
    *({"__metadata__": metadata, "x": ENTRY} for metadata in ({"a": 1}, "a")),
    [],
    b'{"x":',
    b'{"x": %b, "x": %b}' % ((json.dumps(ENTRY).encode(),) * 2),
    b'{"__metadata__": {"a": "b", "a": "c"}, "x": %b}' % json.dumps(ENTRY).encode(),
    *(text * 100_000 for text in (b"[", b'{"a":')),
    b'{"x":' + b"9" * 5000 + b"}",
    *(prefix + b"{}" for prefix in (b"\xff", b"\xef\xbb\xbf")),
    "{}".encode("utf-16"),
]


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: str(header)[:60])
def test_a_header_that_is_wrong_is_refused(tmp_path, header):
    open_container(write_raw(tmp_path / "sound", {"x": ENTRY}))
    assert refusal(write_raw(tmp_path / "a", header)).startswith(("not a safetensors file, or cut off", "its header"))


@pytest.mark.parametrize("length", [0, 3, 4, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_length_beyond_the_file_is_refused(tmp_path, length):
    (tmp_path / "a").write_bytes(length.to_bytes(8, "little") + b"{}")
    assert refusal(tmp_path / "a").startswith("not a safetensors file")


def test_a_header_beyond_the_limit_is_refused_before_it_is_read(tmp_path):
    text = b"{}".ljust(MAX_HEADER_BYTES + 1)
    assert refusal(write_raw(tmp_path / "a", text, b"")).endswith("its header would have 2,097,153 bytes")
    assert open_container(write_raw(tmp_path / "b", text[:-1], b"")).arrays == {}


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert refusal(tmp_path / "a") == f"cannot read {tmp_path}/a: No such file or directory"
    assert refusal(tmp_path) == f"cannot read {tmp_path}: Is a directory"


@pytest.mark.parametrize("stop", [0, 2, 7, 8, 9, 100, -20, -1])
def test_a_file_that_is_cut_off_is_refused(tmp_path, stop):
    write(tmp_path / "a", {"x": np.ones(40)}, {"a": "b"})
    (tmp_path / "b").write_bytes((tmp_path / "a").read_bytes()[:stop])
    assert refusal(tmp_path / "b")


def test_bytes_are_those_of_the_array_in_its_own_order():
    array = np.arange(6, dtype=np.int16).reshape(2, 3).T
    assert as_bytes(array) == array.tobytes()
    assert as_bytes(np.ones((2, 2), ml_dtypes.bfloat16)) == b"\x80\x3f" * 4
    assert as_bytes(np.float32(1)) == b"\x00\x00\x80\x3f"
