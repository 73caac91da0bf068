"""Four ternary codes in a byte, in three layouts: of models in memory, of weights that travel, of TerDiT's checkpoints.

In memory a byte holds four neighbours along the input axis, so that any slice of the packed array is the packed
slice of the weight and sharding needs no care. Quarters are for arrays that are packed to be sent and unpacked at once;
the published planes are for exchange only.
"""

from jax import Array
import jax.numpy as jnp
import numpy as np

CODES_PER_BYTE = 4


def pack(codes: Array) -> Array:
    """Packs (..., in) int8 codes in {-1, 0, 1} to (..., in / 4) uint8: code 4k + j sits in bits 2j+1..2j, plus one.

    Raises:
      ValueError: if `in` is not a multiple of 4.
    """
    if codes.shape[-1] % CODES_PER_BYTE:
        raise ValueError(f"the input axis must be a multiple of {CODES_PER_BYTE} to be packed, got shape {codes.shape}")
    quads = (codes + 1).astype(jnp.uint8).reshape(*codes.shape[:-1], -1, CODES_PER_BYTE)
    return quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6


def unpack(packed: Array) -> Array:
    """Unpacks (..., in / 4) uint8 to (..., in) int8 codes; the inverse of `pack`."""
    shifts = jnp.arange(0, 8, 2, dtype=jnp.uint8)
    quads = packed[..., None] >> shifts & 3
    return (quads.astype(jnp.int8) - 1).reshape(*packed.shape[:-1], -1)


def pack_quarters(codes: Array, axis: int) -> Array:
    """Packs int8 codes in {-1, 0, 1} to uint8 with a quarter of the size along `axis`.

    With n a quarter of the axis, byte k holds codes k, k + n, k + 2n and k + 3n, the first lowest, each plus one.
    Unpacking puts four whole blocks side by side, where neighbours in a byte would be interleaved: an accelerator pads
    or shuffles a trailing axis of four.

    Raises:
      ValueError: if the axis is not a multiple of 4.
    """
    if codes.shape[axis] % CODES_PER_BYTE:
        raise ValueError(f"axis {axis} must be a multiple of {CODES_PER_BYTE} to be packed, got shape {codes.shape}")
    a, b, c, d = jnp.split((codes + 1).astype(jnp.uint8), CODES_PER_BYTE, axis)
    return a | b << 2 | c << 4 | d << 6


def unpack_quarters(packed: Array, axis: int) -> Array:
    """Unpacks uint8 to int8 codes, four times the size along `axis`; the inverse of `pack_quarters`."""
    return jnp.concatenate([(packed >> shift & 3).astype(jnp.int8) - 1 for shift in (0, 2, 4, 6)], axis)


def pack_planes(codes: np.ndarray) -> np.ndarray:
    """Packs (out, in) int8 codes to the published (out / 4, in) uint8 planes.

    With n = out / 4, output rows [0, n) sit in bits 7-6, [n, 2n) in 5-4, [2n, 3n) in 3-2 and [3n, 4n) in 1-0, each
    stored as T + 1. Source: the public TerDiT code's packed layers.

    Raises:
      ValueError: if `out` is not a multiple of 4.
    """
    out_features, in_features = codes.shape
    if out_features % CODES_PER_BYTE:
        raise ValueError(f"the output axis must be a multiple of {CODES_PER_BYTE} to be packed, got {codes.shape}")
    planes = (codes + 1).astype(np.uint8).reshape(CODES_PER_BYTE, out_features // CODES_PER_BYTE, in_features)
    return planes[0] << 6 | planes[1] << 4 | planes[2] << 2 | planes[3]


def unpack_planes(planes: np.ndarray) -> np.ndarray:
    """Unpacks the published (out / 4, in) uint8 planes to (out, in) int8 codes; the inverse of `pack_planes`."""
    return np.concatenate([(planes >> shift & 3).astype(np.int8) - 1 for shift in (6, 4, 2, 0)])


def planes_to_packed(planes: np.ndarray) -> np.ndarray:
    """Published (out / 4, in) uint8 planes to the (out, in / 4) uint8 that we compute from, never unpacking a code."""
    packed = [_gather_quads(planes >> shift & 3) for shift in (6, 4, 2, 0)]
    return np.concatenate(packed)


def packed_to_planes(packed: np.ndarray) -> np.ndarray:
    """The inverse of `planes_to_packed`."""
    quarters = np.split(np.asarray(packed), CODES_PER_BYTE)
    planes = np.zeros((quarters[0].shape[0], quarters[0].shape[1] * CODES_PER_BYTE), np.uint8)
    for quarter, shift in zip(quarters, (6, 4, 2, 0), strict=True):
        planes |= _spread_quads(quarter) << shift
    return planes


def holds_unused_code(packed: np.ndarray) -> bool:
    """Whether any byte, in either layout, holds the bit pair 11, which stands for no ternary value."""
    return bool((packed & packed >> 1 & 0b01010101).any())


def _gather_quads(pairs: np.ndarray) -> np.ndarray:
    """(rows, 4k) bytes of two bits each -> (rows, k) bytes of four such pairs, the first lowest."""
    quads = np.ascontiguousarray(pairs).view("<u4")
    return (quads | quads >> 6 | quads >> 12 | quads >> 18).astype(np.uint8)  # the upper bytes fall away


def _spread_quads(packed: np.ndarray) -> np.ndarray:
    """The inverse of `_gather_quads`."""
    quads = packed.astype("<u4")
    return ((quads | quads << 6 | quads << 12 | quads << 18) & 0x03030303).view(np.uint8)
