"""Rows cut over the threads of a warpgroup, and the pairs of neighbouring features that a row is made of.

A thread holds pieces as wide as the hardware loads and the row's width allows. Where they have two features at least,
what needs both features of a pair, RoPE, asks no other thread. Rows of an odd number of features a thread (1,152 is 9)
lie in memory's order in stretches alone: all such rows of a kernel are cut alike, and what is done with them, feature
by feature or as a sum, does not ask for the order. `forward` and `backward` compute with the rows.
"""

from etils import epy
import jax
from jax import Array
from jax.experimental import pallas as pl
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector
import jax.numpy as jnp
import numpy as np

with epy.lazy_imports():  # most of a second, for those who run the kernels
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu

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
    """Loads a row (W,) of memory."""
    parts = [
        strided(ref[...] if size == ref.shape[0] else ref[pl.ds(start, size)])
        for start, size in stretches(ref.shape[0])
    ]
    return parts[0] if len(parts) == 1 else merge(parts)


def store(ref, row: Array) -> None:
    """Stores a row that `load` has cut, in the dtype of the memory."""
    cuts = stretches(row.size)
    for (start, size), part in zip(cuts, [row] if len(cuts) == 1 else divide(row), strict=True):
        ref[pl.ds(start, size)] = part.astype(ref.dtype)


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


def merge(parts: list[Array]) -> Array:
    """Stretches of a row, each in pieces of its own, as one row of single features."""
    width = sum(part.size for part in parts)
    out = plgpu.ShapeDtypeStruct((width,), parts[0].dtype, layout=_layout(width))

    @plgpu.inline_mgpu(arg_types=tuple(_layout(part.size) for part in parts), return_type=out)
    def run(_, *parts):
        singles = []
        for part in parts:
            for register in part.registers.flat:
                (count,) = ir.VectorType(register.type).shape
                singles += [vector.shuffle(register, register, [k]) for k in range(count)]
        return _row(singles, width, 1)

    return run(*parts)


def divide(row: Array) -> list[Array]:
    """The inverse of `merge`."""
    sizes = [size for _, size in stretches(row.size)]
    outs = tuple(plgpu.ShapeDtypeStruct((size,), row.dtype, layout=_layout(size)) for size in sizes)

    @plgpu.inline_mgpu(arg_types=(_layout(row.size),), return_type=outs)
    def run(_, row):
        singles, parts = iter(row.registers.flat), []
        for size in sizes:
            vec_size = piece(size)
            wide = [_concatenate([next(singles) for _ in range(vec_size)]) for _ in range(size // LANES // vec_size)]
            parts.append(_row(wide, size, vec_size))
        return tuple(parts)

    return list(run(row))


def _concatenate(vectors: list):
    """Vectors of one length, a power of two of them, as one."""
    if len(vectors) == 1:
        return vectors[0]
    half = len(vectors) // 2
    first, second = _concatenate(vectors[:half]), _concatenate(vectors[half:])
    (count,) = ir.VectorType(first.type).shape
    return vector.shuffle(first, second, list(range(2 * count)))


def _row(registers: list, size: int, vec_size: int):
    return _array(np.array(registers, object), lambda register: register, size, vec_size)


def _array(registers: np.ndarray, make, size: int, vec_size: int):
    made = np.empty(registers.shape, object)
    for index, register in np.ndenumerate(registers):
        made[index] = make(register)
    layout = mgpu.WGStridedFragLayout((size,), vec_size)
    return mgpu.FragmentedArray(_registers=made, _layout=layout, _is_signed=None)


def piece(width: int) -> int:
    """Neighbouring numbers of a row that a thread holds."""
    return next(n for n in (8, 4, 2, 1) if width % (LANES * n) == 0)


def stretches(width: int) -> list[tuple[int, int]]:
    """Starts and sizes of the parts of a row that are loaded and stored as they lie in memory. A row that would be cut
    into single features is one part in wide pieces and a rest."""
    if piece(width) > 1:
        return [(0, width)]
    cuts, start = [], 0
    for vec_size in (8, 4, 2, 1):
        if size := (width - start) // (LANES * vec_size) * LANES * vec_size:
            cuts.append((start, size))
            start += size
    return cuts


def _layout(width: int):
    return plgpu.Layout.WG_STRIDED((width,), vec_size=piece(width))


def _half_layout(size: int):
    return plgpu.Layout.WG_STRIDED((size,), vec_size=piece(2 * size) // 2)
