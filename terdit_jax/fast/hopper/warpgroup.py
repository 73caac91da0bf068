"""Rows cut over the threads of a warpgroup, and the pairs of neighbouring features that a row is made of.

A thread holds pieces as wide as the hardware loads and the row's width allows. Where they have two features at least,
what needs both features of a pair, RoPE, asks no other thread. What is computed with rows is `forward`'s and
`backward`'s.
"""

import jax
from jax import Array
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector
import jax.numpy as jnp
import numpy as np

LANES = 128  # threads of a warpgroup


def supports(*widths: int, pairs: bool = True) -> bool:
    """Whether rows of these widths can be cut over the threads of a warpgroup, both features of a pair in one thread if
    `pairs`, as RoPE needs."""
    return all(width % (LANES * (1 + pairs)) == 0 for width in widths)


def run_on(device: jax.Device) -> bool:
    """Whether a device runs the kernels: a Hopper GPU."""
    # Devices that are only compiled for may not say what they are capable of.
    return device.platform == "gpu" and str(getattr(device, "compute_capability", "")).startswith("9.")


def load(ref) -> Array:
    """A row (W,) of memory."""
    return strided(ref[...])


def load_half(ref) -> Array:
    """The even or the odd features (W / 2,) of a row, cut as `split` leaves them."""
    return strided_half(ref[...])


def strided(row: Array) -> Array:
    """The same row, in pieces as wide as the hardware loads."""
    return plgpu.layout_cast(row, _layout(row.size))


def strided_half(half: Array) -> Array:
    """The same half of a row, in pieces half as wide as the row's."""
    return plgpu.layout_cast(half, _half_layout(half.size))


def split(row: Array) -> tuple[Array, Array]:
    """The even and the odd features of a row: (W,) -> (W / 2,) float32 twice."""
    width, widened = row.size, row.dtype != jnp.float32
    vec_size = piece(width) // 2
    half = plgpu.ShapeDtypeStruct((width // 2,), jnp.float32, layout=_half_layout(width // 2))

    @plgpu.inline_mgpu(arg_types=(_layout(width),), return_type=(half, half))
    def run(_, row):
        wide = ir.VectorType.get((vec_size,), ir.F32Type.get())

        def take(pieces, first: int):
            taken = vector.shuffle(pieces, pieces, [first + 2 * k for k in range(vec_size)])
            return arith.extf(wide, taken) if widened else taken

        return tuple(_array(row.registers, lambda r: take(r, first), width // 2, vec_size) for first in (0, 1))  # noqa: B023

    return run(row)


def join(even: Array, odd: Array) -> Array:
    """Back again: (W / 2,) float32 twice -> (W,) bfloat16."""
    width = 2 * even.size
    vec_size = piece(width)
    out = plgpu.ShapeDtypeStruct((width,), jnp.bfloat16, layout=_layout(width))
    half = _half_layout(width // 2)

    @plgpu.inline_mgpu(arg_types=(half, half), return_type=out)
    def run(_, even, odd):
        narrow = ir.VectorType.get((vec_size,), ir.BF16Type.get())
        order = [k + first for k in range(vec_size // 2) for first in (0, vec_size // 2)]
        others = iter(odd.registers.flat)
        put = lambda pieces: arith.truncf(narrow, vector.shuffle(pieces, next(others), order))  # noqa: E731
        return _array(even.registers, put, width, vec_size)

    return run(even, odd)


def _array(registers: np.ndarray, make, size: int, vec_size: int):
    made = np.empty(registers.shape, object)
    for index, register in np.ndenumerate(registers):
        made[index] = make(register)
    layout = mgpu.WGStridedFragLayout((size,), vec_size)
    return mgpu.FragmentedArray(_registers=made, _layout=layout, _is_signed=None)


def piece(width: int) -> int:
    """Neighbouring numbers of a row that a thread holds."""
    return next(n for n in (8, 4, 2, 1) if width % (LANES * n) == 0)


def _layout(width: int):
    return plgpu.Layout.WG_STRIDED((width,), vec_size=piece(width))


def _half_layout(size: int):
    return plgpu.Layout.WG_STRIDED((size,), vec_size=piece(2 * size) // 2)
