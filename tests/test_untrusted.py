"""JSON and npz that may be forged give what they hold or one line, and allocate nothing on a header's word."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from terdit_jax.errors import UserError
from terdit_jax.untrusted import brief, is_count, is_number, load_arrays, parse_json, reading, short


def refusal(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert text.isprintable() and len(text) < 300
    return text


def npz(members, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=True)
    return file.getvalue()


def header(descr, shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_arrays_come_back(tmp_path, write):
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.array("text"), "c": np.asfortranarray(np.ones((2, 3)))}
    write(tmp_path / "a.npz", **arrays)
    found = load_arrays(tmp_path / "a.npz", ("b", "a", "c"), "no")
    assert list(found) == ["b", "a", "c"]
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


SOUND = npy(np.ones(3))
NPZ = {
    "a member that is no array": npz({"a.npy": b"just bytes"}),
    "the member without its suffix": npz({"a": SOUND}),
    "a cut off header": npz({"a.npy": SOUND[:20]}),
    "a cut off array": npz({"a.npy": SOUND[:-1]}),
    "a pickle": npz({"a.npy": npy(np.array([{}], object))}),
    "a pickle within a record": npz({"a.npy": npy(np.zeros(2, [("x", "O")]))}),
    "a header that promises terabytes": npz({"a.npy": header("<f8", (1 << 40,)) + bytes(100)}),
    "a negative length": npz({"a.npy": header("<f8", (-1,)) + bytes(100)}),
    "an overflow": npz({"a.npy": header("<f8", (1 << 62, 1 << 62)) + bytes(100)}),
    "a dtype that is none": npz({"a.npy": SOUND.replace(b"<f8", b"<?8")}),
    "a header that is a program": npz({"a.npy": b"\x93NUMPY\x01\x00\x0c\x00__import__()"}),
    "another format of arrays": npz({"a.npy": SOUND.replace(b"NUMPY\x01", b"NUMPY\x09")}),
    "an array that decompresses without a limit": npz({"a.npy": SOUND}, zipfile.ZIP_LZMA),
    "a plain array": SOUND,
    "no archive": b"PK\x03\x04 and nothing more",
    "nothing": b"",
}


@pytest.mark.parametrize("content", NPZ.values(), ids=NPZ)
def test_other_npz_are_refused(content):
    tracemalloc.start()
    assert refusal(load_arrays, io.BytesIO(content), ("a",), "it is no npz").startswith("it is no npz (")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_json_of_a_kind():
    assert parse_json('{"a": [1, 2.5, null]}', "it", dict) == {"a": [1, 2.5, None]}
    assert parse_json(b"[1]", "it", list) == [1]
    assert refusal(parse_json, "[1]", "it", dict) == "it is not a JSON dict"


BROKEN = ["", "{", "NaN", "[Infinity]", '{"a": 1, "a": 1}', "[" * 10**5, "1" * 5000, b"\xff\xfe", '{"\x00": 1}']


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_other_json_is_refused(text):
    assert "it is not sound JSON: " in refusal(parse_json, text, "it", object)


@pytest.mark.parametrize(
    "error", [MemoryError(), RecursionError("deep"), KeyError("a\x1b[2J"), ValueError("x\ny" * 100)]
)
def test_whatever_is_raised_becomes_a_line(error):
    def read():
        with reading("it cannot be read"):
            raise error

    assert refusal(read).startswith(f"it cannot be read ({type(error).__name__}")


def test_numbers_are_told_from_what_looks_like_them():
    assert is_number(0.5, 0, 1) and is_number(1, 0, 1) and is_count(3, 0, 3)
    for value in (True, "1", None, float("nan"), float("inf"), -1, 10**400, [1]):
        assert not is_number(value, 0, 1) and not is_count(value, 0, 1)
    assert not is_count(1.0, 0, 1)


def test_values_are_short_in_messages():
    assert short("x" * 100) == repr("x" * 60) and short([1]) == "a list" and short(1 << 64) == "an enormous number"
    assert brief("short") == "short" and len(brief("x" * 10_000)) < 80


def test_an_error_is_one_line_that_no_terminal_obeys():
    assert str(UserError("a\n  b\x1b[2J \ud800")) == r"a b\x1b[2J \ud800"
