"""The safetensors container holds what the reference implementation reads and writes, and believes no header."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from terdit_jax.errors import UserError
from terdit_jax.interop.safetensors import (
    MAX_HEADER_BYTES,
    Writer,
    array_type,
    as_bytes,
    entry,
    is_possible,
    open_container,
    parse_array_type,
    refuse_existing,
    render_header,
)

DTYPES = ("float64", "float32", "float16", "uint8", "int8", "int16", "int32", "int64", "bool")
SHAPES = ((3, 4), (5,), (), (0,), (2, 0, 3), (1, 1, 1))
ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
OUTSIDE = "tensor 'x' does not lie in the file, which is cut off or damaged"
GAP = "tensor 'x' does not lie where the one before it ends"


def arrays_of_every_kind():
    generator = np.random.default_rng(0)
    dtypes = [np.dtype(name) for name in DTYPES] + [np.dtype(ml_dtypes.bfloat16)]
    draws = {(dtype, shape): 100 * generator.standard_normal(shape) for dtype in dtypes for shape in SHAPES}
    return {f"{dtype.name} {shape}": np.asarray(draw).astype(dtype) for (dtype, shape), draw in draws.items()}


def bound(arrays, metadata):
    end = sum(array.nbytes for array in arrays.values())
    entries = {name: entry(array.dtype, array.shape, 10 * end) for name, array in arrays.items()}
    return len(render_header(entries, metadata))


def write(path, arrays, metadata, room=0):
    with Writer(path, bound(arrays, metadata) + room) as writer:
        for name, array in arrays.items():
            writer.add(name, array)
        writer.finish(metadata)


def write_raw(path, header, data=bytes(4)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def refusal(path):
    with pytest.raises(UserError) as caught:
        open_container(path)
    message = str(caught.value)
    assert message.isprintable()
    return message.removeprefix(f"{path}: ")


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape), name
        assert actual[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("room", [0, 1, 8, 1000])
def test_what_is_written_is_read_whatever_room_was_kept(tmp_path, room):
    arrays, metadata = arrays_of_every_kind(), {"a": "x", "é": "\n"}
    write(tmp_path / "a.safetensors", arrays, metadata, room)
    container = open_container(tmp_path / "a.safetensors")
    assert_same(container.arrays, arrays)
    assert container.metadata == metadata
    content = (tmp_path / "a.safetensors").read_bytes()
    assert len(container.header) % 8 == 0
    assert content[8 : 8 + len(container.header)] == container.header
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_reference_implementation_reads_what_we_write(tmp_path):
    arrays = {name: array for name, array in arrays_of_every_kind().items() if not name.startswith("bfloat16")}
    write(tmp_path / "a.safetensors", arrays, {"format": "np"})
    loaded = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    assert_same({name: loaded[name] for name in arrays}, arrays)
    with safetensors.safe_open(tmp_path / "a.safetensors", "np") as file:
        assert file.metadata() == {"format": "np"}


def test_the_reference_implementation_reads_our_bfloat16(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    array = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16)
    write(tmp_path / "a.safetensors", {"x": array}, {})
    loaded = load_file(tmp_path / "a.safetensors")["x"]
    assert loaded.dtype == torch.bfloat16
    np.testing.assert_array_equal(loaded.float().numpy(), array.astype(np.float32))


def test_we_read_what_the_reference_implementation_writes(tmp_path):
    arrays = {name: array for name, array in arrays_of_every_kind().items() if not name.startswith("bfloat16")}
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors", {"format": "np"})
    container = open_container(tmp_path / "a.safetensors")
    assert_same({name: container.arrays[name] for name in arrays}, arrays)
    assert container.metadata == {"format": "np"}


def test_arrays_are_views_of_the_file_and_cannot_be_written(tmp_path):
    write(tmp_path / "a.safetensors", {"x": np.ones(4, np.float32)}, {})
    array = open_container(tmp_path / "a.safetensors").arrays["x"]
    assert not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 2


def test_a_file_appears_only_when_it_is_finished(tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    with Writer(path, 200) as writer:
        writer.add("x", np.ones(4))
        assert not path.exists()
        assert list(path.parent.iterdir())
        writer.finish({})
        assert path.exists()
    assert [each.name for each in path.parent.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_writing_that_is_broken_off_leaves_nothing(tmp_path, error):
    with pytest.raises(error), Writer(tmp_path / "a.safetensors", 200) as writer:
        writer.add("x", np.ones(4))
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_stays_as_it_is(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("precious")
    with pytest.raises(UserError, match=f"--output={path}: exists already"), Writer(path, 200):
        pass
    path.unlink()
    with pytest.raises(UserError, match="exists already"), Writer(path, 200) as writer:
        path.write_text("precious")  # by somebody else, meanwhile
        writer.finish({})
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


def test_a_dangling_link_is_there_too(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="exists already"):
        refuse_existing(tmp_path / "link")
    refuse_existing(tmp_path / "nothing")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/file/a: Not a directory"):
        Writer(tmp_path / "file" / "a", 200)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="cannot write .*: No space left on device"):
        write(tmp_path / "a.safetensors", {"x": np.ones(4)}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_header_longer_than_readers_take_is_not_written(tmp_path):
    with pytest.raises(UserError, match="a header of 2,097,152 bytes is more than the format allows"):
        Writer(tmp_path / "a.safetensors", MAX_HEADER_BYTES)
    with Writer(tmp_path / "a.safetensors", MAX_HEADER_BYTES - 8) as writer:
        writer.finish({})
    assert open_container(tmp_path / "a.safetensors").arrays == {}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"x": {**ENTRY, "data_offsets": [0, 5]}}, OUTSIDE),
        ({"x": {**ENTRY, "data_offsets": [-4, 0]}}, OUTSIDE),
        ({"x": {**ENTRY, "data_offsets": [4, 0]}}, OUTSIDE),
        ({"x": {**ENTRY, "data_offsets": [0, 1 << 99]}}, OUTSIDE),
        ({"x": {**ENTRY, "data_offsets": [0.0, 4.0]}}, "tensor 'x' has impossible data_offsets"),
        ({"x": {**ENTRY, "data_offsets": [0, True]}}, "tensor 'x' has impossible data_offsets"),
        ({"x": {**ENTRY, "data_offsets": [0, 3]}}, "tensor 'x' has 3 bytes, its shape needs another number"),
        ({"x": {**ENTRY, "shape": [5]}}, "tensor 'x' has 4 bytes, its shape needs another number"),
        ({"x": {**ENTRY, "shape": [-4]}}, "tensor 'x' has an impossible shape"),
        ({"x": {**ENTRY, "shape": [4.0]}}, "tensor 'x' has an impossible shape"),
        ({"x": {**ENTRY, "shape": 4}}, "tensor 'x' has an impossible shape"),
        ({"x": {**ENTRY, "shape": [1] * 8 + [4]}}, "tensor 'x' has an impossible shape"),
        ({"x": {**ENTRY, "shape": [1 << 47, 0, 1 << 47]}}, "tensor 'x' has an impossible shape"),
        ({"x": {**ENTRY, "dtype": "F8_E4M3"}}, "tensor 'x' has an unknown dtype"),
        ({"x": {**ENTRY, "dtype": ["U8"]}}, "tensor 'x' has an unknown dtype"),
        ({"x": {"dtype": "U8", "shape": [4]}}, "tensor 'x' has no dtype, shape and data_offsets"),
        ({"x": [0, 4]}, "tensor 'x' has no dtype, shape and data_offsets"),
        ({"x": {**ENTRY, "more": 1}}, "tensor 'x' has no dtype, shape and data_offsets"),
        ({"x\n": 1}, r"tensor 'x\n' has no dtype, shape and data_offsets"),
        ({"x": ENTRY, "y": ENTRY}, "tensor 'y' does not lie where the one before it ends"),
        ({"x": {**ENTRY, "shape": [3], "data_offsets": [1, 4]}}, GAP),
        ({"x": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}, "1 bytes belong to no tensor"),
        ({}, "4 bytes belong to no tensor"),
        ({"__metadata__": {"a": 1}, "x": ENTRY}, "its header's __metadata__ must hold text only"),
        ({"__metadata__": "a", "x": ENTRY}, "its header's __metadata__ must hold text only"),
        ([], "its header is not a JSON dict"),
        (b'{"x":', "its header is not sound JSON: Expecting value: line 1 column 6 (char 5)"),
        (b'{"x":1,"x":1}', "its header is not sound JSON: a key occurs twice"),
    ],
)  # fmt: skip
def test_a_header_that_is_wrong_is_refused_with_the_reason(tmp_path, header, message):
    assert refusal(write_raw(tmp_path / "a", header)) == message


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"x":' + b"9" * 5000 + b"}",
        "{}".encode("utf-16"),
        b"\xff{}",
        b"\xef\xbb\xbf{}",
    ],
)
def test_json_that_python_cannot_take_is_refused(tmp_path, header):
    assert refusal(write_raw(tmp_path / "a", header)).startswith("its header is not sound JSON: ")


def test_differences_of_offsets_too_long_to_print_are_refused(tmp_path):
    offsets = [-(10**4299) + 1, 10**4299]
    assert "does not lie in the file" in refusal(write_raw(tmp_path / "a", {"x": {**ENTRY, "data_offsets": offsets}}))


def test_names_are_cut_in_messages(tmp_path):
    assert len(refusal(write_raw(tmp_path / "a", {"\u2028" * 5000: 1}))) < 500


@pytest.mark.parametrize("length", [3, 4, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_length_beyond_the_file_is_refused(tmp_path, length):
    (tmp_path / "a").write_bytes(length.to_bytes(8, "little") + b"{}")
    assert refusal(tmp_path / "a") == "not a safetensors file, or cut off"


def test_a_header_beyond_the_limit_is_refused_before_it_is_read(tmp_path):
    text = b"{}".ljust(MAX_HEADER_BYTES + 1)
    assert refusal(write_raw(tmp_path / "a", text, b"")) == "not a safetensors file, or cut off"
    assert open_container(write_raw(tmp_path / "b", text[:-1], b"")).arrays == {}


@pytest.mark.parametrize("content", [b"", b"{}", bytes(8)])
def test_a_file_too_short_to_be_one_is_refused(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    assert refusal(tmp_path / "a")


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert refusal(tmp_path / "a") == f"cannot read {tmp_path}/a: No such file or directory"
    assert refusal(tmp_path) == f"cannot read {tmp_path}: Is a directory"


@pytest.mark.parametrize("stop", [0, 7, 8, 9, 100, -20, -1])
def test_a_file_that_is_cut_off_is_refused(tmp_path, stop):
    write(tmp_path / "a", {"x": np.ones(40)}, {"a": "b"})
    (tmp_path / "b").write_bytes((tmp_path / "a").read_bytes()[:stop])
    assert refusal(tmp_path / "b")


@pytest.mark.parametrize("dtype", [*DTYPES, ml_dtypes.bfloat16])
def test_a_type_survives_json(dtype):
    written = array_type(np.dtype(dtype), (2, 3))
    assert parse_array_type(*written.values(), "it") == (np.dtype(dtype), (2, 3))
    assert entry(np.dtype(dtype), (2, 3), 8)["data_offsets"] == [8, 8 + 6 * np.dtype(dtype).itemsize]


@pytest.mark.parametrize("shape", [(), (0,), (1 << 47,), (1 << 24, 1 << 23), (0, 5), (1,) * 8])
def test_a_possible_shape_is_one_to_numpy(shape):
    assert is_possible(shape)
    if not math.prod(shape):
        assert np.empty(0, np.uint8).reshape(shape).shape == shape


@pytest.mark.parametrize(
    "shape", [(-1,), (1 << 48,), (1 << 24, 1 << 24), (0, 1 << 48), (1 << 47, 0, 1 << 47), (1,) * 9]
)
def test_an_impossible_shape_is_none(shape):
    assert not is_possible(shape)


def test_bytes_are_those_of_the_array_in_its_own_order():
    array = np.arange(6, dtype=np.int16).reshape(2, 3).T
    assert as_bytes(array).tobytes() == array.tobytes()
    assert as_bytes(np.ones((2, 2), ml_dtypes.bfloat16)).tobytes() == b"\x80\x3f" * 4
    assert as_bytes(np.float32(1)).tobytes() == b"\x00\x00\x80\x3f"
