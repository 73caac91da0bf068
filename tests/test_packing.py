"""Packing loses nothing, and the in-memory layout commutes with slicing along either axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.ternary.packing import (
    holds_unused_code,
    pack,
    pack_planes,
    packed_to_planes,
    planes_to_packed,
    unpack,
    unpack_planes,
)

CODES = jax.random.randint(jax.random.key(0), (3, 16, 32), -1, 2, jnp.int8)


def test_unpack_inverts_pack():
    packed = pack(CODES)
    assert packed.shape == (3, 16, 8) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(unpack(packed), CODES)


@pytest.mark.parametrize("axis", [1, 2])
def test_a_slice_of_the_packed_array_is_the_packed_slice(axis):
    for part, codes in zip(jnp.split(pack(CODES), 4, axis), jnp.split(CODES, 4, axis), strict=True):
        np.testing.assert_array_equal(part, pack(codes))


def test_pack_bit_order():
    assert pack(jnp.array([[-1, 0, 1, 0]], jnp.int8)).tolist() == [[0 | 1 << 2 | 2 << 4 | 1 << 6]]


def test_planes_follow_the_published_layout():
    codes = np.asarray(CODES[0])
    planes = pack_planes(codes)
    assert planes.shape == (4, 32) and planes.dtype == np.uint8
    np.testing.assert_array_equal(planes >> 6, codes[:4] + 1)
    np.testing.assert_array_equal(planes & 3, codes[12:] + 1)
    np.testing.assert_array_equal(unpack_planes(planes), codes)


def test_axes_that_do_not_pack_are_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        pack(jnp.zeros((4, 6), jnp.int8))
    with pytest.raises(ValueError, match="multiple of 4"):
        pack_planes(np.zeros((6, 4), np.int8))


@pytest.mark.parametrize("shape", [(4, 4), (16, 32), (12, 20), (48, 8)])
def test_planes_and_packed_codes_become_each_other(shape):
    codes = np.random.default_rng(0).integers(-1, 2, shape, np.int8)
    planes, packed = pack_planes(codes), np.asarray(pack(jnp.asarray(codes)))
    for actual, expected in ((planes_to_packed(planes), packed), (packed_to_planes(packed), planes)):
        assert (actual.shape, actual.dtype) == (expected.shape, np.uint8)
        np.testing.assert_array_equal(actual, expected)


def test_views_of_a_file_that_lie_anywhere_are_converted_too():
    planes = pack_planes(np.random.default_rng(0).integers(-1, 2, (16, 32), np.int8))
    buffer = np.zeros(planes.nbytes + 1, np.uint8)
    buffer[1:] = planes.ravel()
    view = buffer[1:].reshape(planes.shape)
    view.flags.writeable = False
    np.testing.assert_array_equal(planes_to_packed(view), planes_to_packed(planes))


def test_every_bit_pair_that_stands_for_nothing_is_found():
    for byte in range(256):
        planes = np.zeros((3, 4), np.uint8)
        planes[2, 1] = byte
        assert holds_unused_code(planes) == any(byte >> shift & 3 == 3 for shift in (0, 2, 4, 6)), bin(byte)
