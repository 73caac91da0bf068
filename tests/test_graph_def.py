"""Constants of a graph come back as they are, and damage ends in one line."""

from inception_files import constant, field, fixed32, varint
import numpy as np
import pytest

from terdit_jax.errors import UserError
from terdit_jax.interop.graph_def import read_constants

ARRAYS = {"a/weights": np.arange(6, dtype=np.float32).reshape(1, 2, 3), "b": np.array([-1.5], np.float32)}


def graph(**options):
    return b"".join(constant(name, array, **options) for name, array in ARRAYS.items())


def assert_arrays(path):
    found = read_constants(path)
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].shape == array.shape and found[name].dtype == np.float32


@pytest.mark.parametrize("packed", [False, True])
def test_constants_are_read(tmp_path, packed):
    (tmp_path / "a.pb").write_bytes(graph(packed=packed))
    assert_arrays(tmp_path / "a.pb")


def test_what_is_no_float_constant_is_passed_over(tmp_path):
    others = constant("ints", np.zeros(2), dtype=3) + constant("x", np.zeros(2), op=b"Identity")
    versions = field(4, field(1, 21)) + fixed32(9, 1.0) + varint(10 << 3 | 1) + bytes(8)
    (tmp_path / "a.pb").write_bytes(others + versions + graph())
    assert_arrays(tmp_path / "a.pb")


def test_a_scalar_and_numbers_one_at_a_time(tmp_path):
    def node(name, tensor):
        value = field(5, field(1, b"value") + field(2, field(8, field(1, 1) + tensor)))
        return field(1, field(1, name) + field(2, b"Const") + value)

    pair = field(2, field(2, field(1, 2))) + fixed32(5, 1.5) + fixed32(5, -2.0)
    (tmp_path / "a.pb").write_bytes(node(b"scalar", fixed32(5, 128.0)) + node(b"pair", pair))
    found = read_constants(tmp_path / "a.pb")
    assert found["scalar"].shape == () and found["scalar"] == 128
    np.testing.assert_array_equal(found["pair"], [1.5, -2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read"),
        (b"PK\x03\x04 and more", "not a frozen TensorFlow graph"),
        (graph()[:-3], "cut off"),
        (b"\xff" * 30, "more than 64 bits"),
        (varint(1 << 3 | 3), "wire type 3"),
        (varint(1 << 3) + varint(5), "a number stands"),
        (field(4, field(1, 21)), "no float32 constant"),
        (constant("w", np.zeros((2, 3))).replace(bytes(24), bytes(20)), "cut off"),
        (constant("w", np.zeros((2, 3))).replace(field(1, 3), field(1, 4)), r"'w' of shape \[2, 4\] has 24 bytes"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, message):
    (tmp_path / "a.pb").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_constants(tmp_path / "a.pb")
    assert len(str(caught.value).removeprefix(str(tmp_path))) < 300


def test_every_single_damaged_byte_is_read_or_refused(tmp_path):
    whole = graph()
    for place in range(len(whole)):
        (tmp_path / "a.pb").write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            read_constants(tmp_path / "a.pb")
        except UserError:
            pass


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_constants(tmp_path / "none.pb")
