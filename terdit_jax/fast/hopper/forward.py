"""Mosaic GPU kernels equal to the passes of `xla_passes`: a row is read once, kept in registers, written once.

They compute what `xla_passes` does, which remains the reference and the path everywhere else; XLA makes two to three
kernels of each, with float32 rows in memory between. Every pass is a jitted function, so that layers share a lowering.
Nothing in them is specific to Hopper but fp8.
"""

from collections.abc import Callable, Sequence
import functools
from functools import partial
import math
from typing import NamedTuple

from etils import epy
import jax
from jax import Array
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jax.typing import DTypeLike

from terdit_jax.fast.eight_bit import TINY
from terdit_jax.fast.hopper import warpgroup
from terdit_jax.model.traits import NORM_EPS, Norm

with epy.lazy_imports():  # most of a second, for those who run the kernels
    from jax.experimental.pallas import mosaic_gpu as plgpu

QK_EPS = 1e-5  # of the layer norm of queries and keys
GELU_SLOPE, GELU_CUBE = math.sqrt(2 / math.pi), 0.044715  # u = slope (a + cube a^3)
ENOUGH_BLOCKS = 1024  # a Hopper GPU has 132 cores, each of which runs several


class Stored(NamedTuple):
    """The forms in which training stores a pass's rows: bfloat16 or not, and a dtype of 8 bits or None."""

    bfloat16: bool
    rounded: DTypeLike | None


@partial(jax.jit, static_argnames=("dtype", "norm"))
def add_norm_modulate(
    x: Array,
    y: Array,
    y_scale: Array | None,
    vectors: Array,
    site: Array,
    dtype: DTypeLike | Stored,
    norm: Norm = "rms",
) -> tuple[Array | None, ...]:
    """Computes `xla_passes.add_norm_modulate` of bfloat16 x. For training (`Stored`) it returns x, the rows in
    bfloat16 or None, in 8 bits or None, and the scale or None."""
    width = x.shape[-1]
    count = rows_of_block(x.shape)

    def body(x_ref, y_ref, y_scale_ref, vectors_ref, site_ref, x_out, *outs):
        image, tokens = jax.lax.axis_index("image"), jax.lax.axis_index("block") * count
        shared = (warpgroup.load(vectors_ref.at[site_ref[0], which, image]) for which in range(vectors.shape[1]))
        gate, gain, shift, *offset = shared

        def load(index):
            return warpgroup.load(x_ref.at[image, tokens + index]), warpgroup.load(y_ref.at[image, tokens + index])

        def process(index, loaded):
            token = tokens + index
            x, y = (row.astype(jnp.float32) for row in loaded)
            if y_scale_ref is not None:
                y = y * y_scale_ref[image, token]
            x = sum(offset, x + gate * y).astype(jnp.bfloat16)
            warpgroup.store(x_out.at[image, token], x)
            x = centred(x.astype(jnp.float32), norm)
            inverse = jax.lax.rsqrt(jnp.sum(x * x) * (1 / width) + NORM_EPS[norm])
            store_row([x * inverse * gain + shift], outs, image, token)

        pipelined(count, load, process)

    arguments = [x, y, y_scale, vectors, site.reshape(1)]
    return call(body, (x.shape[0], x.shape[1] // count), arguments, [_like(x, jnp.bfloat16), *row_types(x, dtype)])


@partial(jax.jit, static_argnames=("stored", "norm"))
def norm_modulate(x: Array, gain: Array, shift: Array, stored: Stored, norm: Norm = "rms") -> tuple[Array | None, ...]:
    """Computes `xla_passes.norm_modulate`: (B, T, D) bfloat16, (B, D) and (B, D) float32 -> (B, T, D) of `stored` and
    (B, T)."""
    width = x.shape[-1]
    count = rows_of_block(x.shape)

    def body(x_ref, gain_ref, shift_ref, *outs):
        image, tokens = jax.lax.axis_index("image"), jax.lax.axis_index("block") * count
        gain, shift = warpgroup.load(gain_ref.at[image]), warpgroup.load(shift_ref.at[image])

        def process(index, x):
            x = centred(x.astype(jnp.float32), norm)
            inverse = jax.lax.rsqrt(jnp.sum(x * x) * (1 / width) + NORM_EPS[norm])
            store_row([x * inverse * gain + shift], outs, image, tokens + index)

        pipelined(count, lambda index: warpgroup.load(x_ref.at[image, tokens + index]), process)

    return call(body, (x.shape[0], x.shape[1] // count), [x, gain, shift], row_types(x, stored))


@partial(jax.jit, static_argnames=("dtype",))
def swiglu(y: Array, y_scale: Array | None, alphas: Array, dtype: DTypeLike | Stored) -> tuple[Array | None, ...]:
    """Computes `xla_passes.swiglu`. For training (`Stored`) it returns the rows in bfloat16 or None, in 8 bits or None,
    and the scale or None."""
    width = y.shape[-1] // 2
    like = jax.ShapeDtypeStruct((*y.shape[:2], width), y.dtype)
    outputs = row_types(like, dtype)
    # In 8 bits a warpgroup needs a row's largest magnitude, so all its parts; otherwise several share a row.
    whole = outputs[-1] is not None
    parts = parts_of_row(width, 8 if whole else 4)
    part = width // parts
    together, count = (parts, 1) if whole else (1, rows_of_block(y.shape))

    def body(y_ref, y_scale_ref, alphas_ref, *outs):
        image, tokens = jax.lax.axis_index("image"), jax.lax.axis_index("block") * count
        first = jax.lax.axis_index("part") * (together * part)
        alphas = scales_of(alphas_ref, 2, lambda k: pl.ds(first + k * part, part))
        held = alphas(0) if together == 1 else None  # over all rows; those of a whole row would take its registers

        def load(index):
            row = y_ref.at[image, tokens + index]
            starts = [first + k * part for k in range(together)]
            return [tuple(warpgroup.load(row.at[pl.ds(side + start, part)]) for side in (0, width)) for start in starts]

        def process(index, loaded):
            scale = 1.0 if y_scale_ref is None else y_scale_ref[image, tokens + index]
            pieces = []
            for k, (a, b) in enumerate(loaded):
                alpha_a, alpha_b = held or alphas(k)
                a = a.astype(jnp.float32) * (alpha_a * scale)
                b = b.astype(jnp.float32) * (alpha_b * scale)
                pieces.append(a * (1 / (1 + jnp.exp(-a))) * b)  # a reciprocal is one instruction
            store_row(pieces, outs, image, tokens + index, first)

        pipelined(count, load, process)

    grid = (y.shape[0], y.shape[1] // count, parts // together)
    return call(body, grid, [y, y_scale, alphas], outputs)


@partial(jax.jit, static_argnames=("dtype",))
def gelu(
    y: Array, y_scale: Array | None, alphas: Array, bias: Array, dtype: DTypeLike | Stored
) -> tuple[Array | None, ...]:
    """Computes `xla_passes.gelu`. For training (`Stored`) it returns the rows in bfloat16 or None, in 8 bits or None,
    and the scale or None."""
    outputs = row_types(y, dtype)
    parts = wide_parts(y.shape[-1])
    part = y.shape[-1] // parts
    together, count = (parts, 1) if outputs[-1] is not None else (1, rows_of_block(y.shape))

    def body(y_ref, y_scale_ref, alphas_ref, bias_ref, *outs):
        image, tokens = jax.lax.axis_index("image"), jax.lax.axis_index("block") * count
        first = jax.lax.axis_index("part") * (together * part)
        places = [pl.ds(first + k * part, part) for k in range(together)]
        biases = [warpgroup.load(bias_ref.at[at]) for at in places]

        def process(index, loaded):
            scales = scales_of_products(alphas_ref, places, y_scale_ref, lambda: (image, tokens + index))
            rows = (a.astype(jnp.float32) * scale + b for a, scale, b in zip(loaded, scales, biases, strict=True))
            store_row([a * gelu_sigmoid(a) for a in rows], outs, image, tokens + index, first)

        load = lambda index: [warpgroup.load(y_ref.at[image, tokens + index, at]) for at in places]  # noqa: E731
        pipelined(count, load, process)

    grid = (y.shape[0], y.shape[1] // count, parts // together)
    return call(body, grid, [y, y_scale, alphas, bias], outputs)


def scales_of(alphas_ref, maps: int, place: Callable) -> Callable:
    """A function of k for the scales of as many maps in the k-th stretch of their outputs, which lies at `place(k)`:
    a number each, read before anything else, or where each output has its own, rows read when they are asked for."""
    if len(alphas_ref.shape) == 1:
        numbers = [alphas_ref[which] for which in range(maps)]
        return lambda k: numbers
    return lambda k: [scale_at(alphas_ref, which, place(k)) for which in range(maps)]


def scale_at(alphas_ref, which: int, at) -> Array:
    """A map's scale, or where each of its outputs has its own, the row of those at a place."""
    return alphas_ref[which] if len(alphas_ref.shape) == 1 else warpgroup.load(alphas_ref.at[which, at])


def scales_of_products(alphas_ref, places: list, y_scale_ref, token: Callable) -> list[Array]:
    """Scales of a token's products of one map, in each place: a number, or a row with one for each output."""

    def scale(at):
        alpha = scale_at(alphas_ref, 0, at)
        return alpha if y_scale_ref is None else alpha * y_scale_ref[token()]

    return [scale(None)] * len(places) if len(alphas_ref.shape) == 1 else [scale(at) for at in places]


def gelu_sigmoid(a: Array) -> Array:
    """The factor that GELU multiplies `a` by: (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)). The hardware's tanh would lose
    the small values on the left, which exp has to the last places."""
    return 1 / (1 + jnp.exp(a * (-2 * GELU_SLOPE - 2 * GELU_SLOPE * GELU_CUBE * (a * a))))


@partial(jax.jit, static_argnames=("dtype",))
def quantize(x: Array, dtype: DTypeLike) -> tuple[Array, Array | None]:
    """`fast.eight_bit.quantize`, to float8 or to bfloat16."""

    def body(x_ref, *outs):
        image, token = jax.lax.axis_index("image"), jax.lax.axis_index("block")
        store_row([warpgroup.load(x_ref.at[image, token]).astype(jnp.float32)], outs, image, token)

    return call(body, x.shape[:2], [x], row_types(x, dtype))


@partial(jax.jit, static_argnames=("heads",))
def queries_keys_values(
    y: Array,
    y_scale: Array | None,
    alphas: Array | tuple[Array, ...],
    norms: tuple[dict, dict] | None,
    rope: Array,
    heads: int,
) -> tuple[Array, Array, Array]:
    """Computes `xla_passes.queries_keys_values` in bfloat16, of features in the published order.

    RoPE turns the pairs (2i, 2i + 1) of a head. Queries, keys and values are blocks of their own.
    """
    B, T, total = y.shape
    half = rope.shape[-1]
    width = heads * 2 * half
    kv_width = (total - width) // 2
    starts, sizes = (0, width, width + kv_width), (width, kv_width, kv_width)
    count = images_of_block(B, T, 4)
    alphas = tuple(alphas) if isinstance(alphas, tuple) or alphas.ndim > 1 else alphas
    by_output = isinstance(alphas, tuple)

    def body(y_ref, y_scale_ref, alphas_ref, rope_ref, norm_refs, q_out, k_out, v_out, scratch=None):
        outs = q_out, k_out, v_out
        token, images = jax.lax.axis_index("block"), jax.lax.axis_index("image") * count

        def each(which, process):
            """Calls process(row) for each image, and stores what it makes of it."""

            def scale_store(index, row):
                alpha = 1.0 if by_output else alphas_ref[which]  # rows of scales are shared, as norms are
                scale = alpha if y_scale_ref is None else alpha * y_scale_ref[images + index, token]
                outs[which][images + index, token] = process(row, scale)

            at = pl.ds(starts[which], sizes[which])
            pipelined(count, lambda index: warpgroup.load(y_ref.at[images + index, token, at]), scale_store)

        def norm_rotate(which):
            size = sizes[which]
            # Halves of rows that all images share: cosines, sines, then even and odd ones of scale, bias and alphas.
            shared = [warpgroup.load_half(rope_ref.at[part, token, pl.ds(0, size // 2)]) for part in range(2)]
            for leaf in ("scale", "bias") if norm_refs else ():
                shared += warpgroup.split(warpgroup.load(norm_refs[which][leaf]))
            if by_output:
                shared += warpgroup.split(warpgroup.load(alphas_ref[which]))
            if count > 1:  # registers are few
                for place, row in enumerate(shared):
                    scratch[place, pl.ds(0, size // 2)] = row
                plgpu.commit_smem()
                fetch = lambda place: warpgroup.load_half(scratch.at[place, pl.ds(0, size // 2)])  # noqa: E731
            else:
                fetch = lambda place: shared[place]  # noqa: E731

            def process(row, scale):
                even, odd = (part * scale for part in warpgroup.split(row))
                if by_output:
                    even, odd = even * fetch(len(shared) - 2), odd * fetch(len(shared) - 1)
                if norm_refs:
                    mean = jnp.sum(even + odd) * (1 / size)
                    even, odd = even - mean, odd - mean
                    inverse = jax.lax.rsqrt(jnp.sum(even * even + odd * odd) * (1 / size) + QK_EPS)
                    even = even * inverse * fetch(2) + fetch(4)
                    odd = odd * inverse * fetch(3) + fetch(5)
                cos, sin = fetch(0), fetch(1)
                return warpgroup.join(even * cos - odd * sin, even * sin + odd * cos)

            each(which, process)

        part = jax.lax.axis_index("part")
        pl.when(part == 0)(lambda: norm_rotate(0))
        pl.when(part == 1)(lambda: norm_rotate(1))

        @pl.when(part == 2)
        def _():
            alpha = warpgroup.load(alphas_ref[2]) if by_output else None

            def process(v, scale):
                v = v.astype(jnp.float32) * scale
                return (v if alpha is None else v * alpha).astype(jnp.bfloat16)

            each(2, process)

    outputs = [jax.ShapeDtypeStruct((B, T, size), jnp.bfloat16) for size in sizes]
    arguments = [y, y_scale, alphas, rotary_table(rope, heads), norms]
    shared = 2 + 4 * (norms is not None) + 2 * by_output
    scratch = {"scratch": plgpu.SMEM((shared, width // 2), jnp.float32)} if count > 1 else None
    made = call(body, (B // count, T, 3), arguments, outputs, scratch)
    return tuple(out.reshape(B, T, -1, 2 * half) for out in made)


def rotary_table(rope: Array, heads: int) -> Array:
    """Cosines and sines of a whole row's pairs, (2, T, heads * head_dim / 2), from (2, T, head_dim / 2)."""
    return jnp.tile(rope, (1, 1, heads))


def call(body: Callable, grid: tuple[int, ...], arguments: list, outputs: list, scratch: dict | None = None) -> tuple:
    """Runs a kernel over images, blocks of tokens and, if there is a third axis, parts of their rows.

    Arguments and outputs that are None reach it as None.
    """
    leaves, structure = jax.tree.flatten((arguments, outputs), is_leaf=lambda leaf: leaf is None)
    given = [leaf for leaf in leaves if leaf is not None]
    num_inputs = sum(leaf is not None for leaf in jax.tree.leaves(arguments, is_leaf=lambda leaf: leaf is None))

    def kernel(*refs, **scratch_refs):
        refs = iter(refs)
        inputs, outs = structure.unflatten([None if leaf is None else next(refs) for leaf in leaves])
        body(*inputs, *outs, **scratch_refs)

    call = plgpu.kernel(
        kernel,
        out_type=given[num_inputs:],
        grid=grid,
        grid_names=("image", "block", "part")[: len(grid)],
        # Exp and rsqrt to a few float32 units in the last place. Threads meet in reductions, which have barriers; what
        # a thread stores no other reads.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        scratch_types=scratch or {},
    )
    made = iter(call(*given[:num_inputs]))
    return tuple(None if out is None else next(made) for out in outputs)


def pipelined(count: int, load: Callable, process: Callable) -> None:
    """Calls process(index, load(index)) for each index, what the next one loads being on its way already."""
    if count == 1:
        process(0, load(0))
        return

    def step(index, loaded):
        ahead = load(jnp.minimum(index + 1, count - 1))
        process(index, loaded)
        return ahead

    jax.lax.fori_loop(0, count, step, load(0))


def store_row(pieces: list[Array], outs: Sequence, image: Array, token: Array, start: Array | int = 0) -> None:
    """Stores a row, or a stretch of it from `start` on, in pieces of one size: in what `row_types` has, None or a
    place each. If it has a scale, it is quantised by its largest magnitude, for training as bfloat16 has it."""

    def put(out, pieces: list[Array]) -> None:
        (size,) = pieces[0].shape
        for k, piece in enumerate(pieces):
            warpgroup.store(out.at[image, token, pl.ds(start + k * size, size)], piece)

    *wide, h_out, scale_out = outs
    if wide:
        pieces = [piece.astype(jnp.bfloat16) for piece in pieces]
        if wide[0] is not None:
            put(wide[0], pieces)
    if scale_out is not None:
        pieces = [piece.astype(jnp.float32) for piece in pieces]
        scale = scale_of(largest(pieces), h_out.dtype)
        scale_out[image, token] = scale
        pieces = [piece * (1 / scale) for piece in pieces]
    if h_out is not None:
        put(h_out, pieces)


def centred(row: Array, norm: Norm) -> Array:
    """The row (W,) that the norm divides by its root mean square: for the layer norm, the row less its mean."""
    return row if norm == "rms" else row - jnp.sum(row) * (1 / row.size)


def largest(pieces: list[Array]) -> Array:
    """The largest magnitude in pieces of a row: one reduction over the threads for all."""
    return jnp.max(functools.reduce(jnp.maximum, (jnp.abs(piece) for piece in pieces)))


def scale_of(peak: Array, dtype: DTypeLike) -> Array:
    """The scale of a row in `dtype` with this largest magnitude."""
    return jnp.maximum(peak, TINY) * (1 / float(jnp.finfo(dtype).max))


def row_types(like, dtype: DTypeLike | Stored) -> list[jax.ShapeDtypeStruct | None]:
    """A row and its scale, None without one; of `Stored` the row in bfloat16 and in 8 bits, None if not stored."""
    if isinstance(dtype, Stored):
        in_bfloat16 = _like(like, jnp.bfloat16) if dtype.bfloat16 else None
        return [in_bfloat16, *([None, None] if dtype.rounded is None else row_types(like, dtype.rounded))]
    scale = jax.ShapeDtypeStruct(like.shape[:2], jnp.float32) if jnp.dtype(dtype).itemsize == 1 else None
    return [_like(like, dtype), scale]


def _like(array, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, dtype)


def rows_of_block(shape: tuple[int, ...]) -> int:
    """Rows that a warpgroup takes one after the other: several share what they load, if all cores stay busy."""
    images, tokens = shape[:2]
    return next(n for n in (8, 4, 2, 1) if tokens % n == 0 and images * tokens // n >= ENOUGH_BLOCKS or n == 1)


def images_of_block(images: int, tokens: int, most: int = 8) -> int:
    """Images whose rows of one token a warpgroup takes one after the other."""
    enough = lambda n: images % n == 0 and images * tokens // n >= ENOUGH_BLOCKS  # noqa: E731
    return next(n for n in (8, 4, 2, 1) if n <= most and enough(n) or n == 1)


def parts_of_row(width: int, most: int = 8) -> int:
    """Pieces that a row is taken in, to bound live registers."""
    return next(n for n in (8, 4, 2, 1) if n <= most and width % (2 * warpgroup.LANES * n) == 0)


def wide_parts(width: int) -> int:
    """The most pieces of a row, up to four, that leave a thread's loads as wide as those of the whole row."""
    return next(
        n
        for n in (4, 3, 2, 1)
        if width % n == 0
        and warpgroup.supports(width // n, pairs=False)
        and warpgroup.piece(width // n) == warpgroup.piece(width)
    )
