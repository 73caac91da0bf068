"""The passes of `rowwise` as Mosaic GPU kernels: a row is read once, kept in a warpgroup's registers, written once.

They compute what `rowwise` does, which remains the reference and the path everywhere else; XLA makes two to three
kernels of each, with float32 rows in memory between. Every pass is a jitted function, so that layers share a lowering.
Nothing in them is specific to Hopper but fp8.
"""

from collections.abc import Callable
from functools import partial

import jax
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike

from terdit_jax.ternary.activations import TINY

_LANES = 128  # threads of a warpgroup
EPS = 1e-5  # of both norms
_ENOUGH_BLOCKS = 1024  # a Hopper GPU has 132 cores, each of which runs several
PAD = 128  # float32 values before and behind a row in shared memory, more than half a head

# Exp and rsqrt to a few float32 units in the last place. Barriers stand where threads meet, in reductions and around
# the row in shared memory; what a thread stores to global memory no other reads.
_COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)


def supports(*widths: int) -> bool:
    """Whether rows of these widths can be cut over the threads of a warpgroup."""
    return all(width % (2 * _LANES) == 0 for width in widths)


@partial(jax.jit, static_argnames=("dtype",))
def add_norm_modulate(
    x: Array, y: Array, y_scale: Array | None, vectors: Array, site: Array, dtype: DTypeLike
) -> tuple[Array, Array, Array | None]:
    """As `rowwise.add_norm_modulate`; x is bfloat16."""
    width = x.shape[-1]
    rows = rows_of_block(x.shape)

    def body(x_ref, y_ref, y_scale_ref, vectors_ref, site_ref, x_out, h_out, scale_out):
        image, tokens = jax.lax.axis_index("image"), jax.lax.axis_index("block") * rows
        gate, gain, shift = (load_row(vectors_ref.at[site_ref[0], which, image]) for which in range(3))

        def load(index):
            return load_row(x_ref.at[image, tokens + index]), load_row(y_ref.at[image, tokens + index])

        def step(index, loaded):
            token = tokens + index
            x, y = loaded
            ahead = load(_next(index, rows))
            y = y.astype(jnp.float32)
            if y_scale_ref is not None:
                y = y * y_scale_ref[image, token]
            x = (x.astype(jnp.float32) + gate * y).astype(jnp.bfloat16)
            x_out[image, token] = x
            x = x.astype(jnp.float32)
            inverse = jax.lax.rsqrt(jnp.sum(x * x) * (1 / width) + EPS)
            store_operand([x * inverse * gain + shift], h_out, scale_out, image, token)
            return ahead

        jax.lax.fori_loop(0, rows, step, load(0))

    arguments = [x, y, y_scale, vectors, site.reshape(1)]
    return call(body, (x.shape[0], x.shape[1] // rows), arguments, [_like(x, jnp.bfloat16), *operand_types(x, dtype)])


@jax.jit
def norm_modulate(x: Array, gain: Array, shift: Array) -> Array:
    """x / sqrt(mean(x^2) + 1e-5) * gain + shift: (B, T, D) bfloat16, (B, D) and (B, D) float32 -> (B, T, D)."""
    width = x.shape[-1]
    rows = rows_of_block(x.shape)

    def body(x_ref, gain_ref, shift_ref, h_out):
        image, tokens = jax.lax.axis_index("image"), jax.lax.axis_index("block") * rows
        gain, shift = load_row(gain_ref.at[image]), load_row(shift_ref.at[image])

        def step(index, x):
            ahead = load_row(x_ref.at[image, tokens + _next(index, rows)])
            x = x.astype(jnp.float32)
            inverse = jax.lax.rsqrt(jnp.sum(x * x) * (1 / width) + EPS)
            h_out[image, tokens + index] = (x * inverse * gain + shift).astype(jnp.bfloat16)
            return ahead

        jax.lax.fori_loop(0, rows, step, load_row(x_ref.at[image, tokens]))

    return call(body, (x.shape[0], x.shape[1] // rows), [x, gain, shift], [_like(x, jnp.bfloat16)])[0]


@partial(jax.jit, static_argnames=("dtype",))
def swiglu(y: Array, y_scale: Array | None, alphas: Array, dtype: DTypeLike) -> tuple[Array, Array | None]:
    """As `rowwise.swiglu`."""
    width = y.shape[-1] // 2
    parts = parts_of_row(width)
    part = width // parts
    like = jax.ShapeDtypeStruct((*y.shape[:2], width), y.dtype)
    rows = rows_of_block(y.shape)

    def body(y_ref, y_scale_ref, alphas_ref, h_out, scale_out):
        image, tokens = jax.lax.axis_index("image"), jax.lax.axis_index("block") * rows
        alpha_a, alpha_b = alphas_ref[0], alphas_ref[1]

        @pl.loop(0, rows)
        def _(index):
            token = tokens + index
            scale = 1.0 if y_scale_ref is None else y_scale_ref[image, token]
            pieces = []
            for k in range(parts):
                a = load_row(y_ref.at[image, token, pl.ds(k * part, part)]).astype(jnp.float32) * (alpha_a * scale)
                b = load_row(y_ref.at[image, token, pl.ds(width + k * part, part)]).astype(jnp.float32)
                pieces.append(a * (1 / (1 + jnp.exp(-a))) * (b * (alpha_b * scale)))  # a reciprocal is one instruction
            store_operand(pieces, h_out, scale_out, image, token)

    return call(body, (y.shape[0], y.shape[1] // rows), [y, y_scale, alphas], operand_types(like, dtype))


@partial(jax.jit, static_argnames=("dtype",))
def quantize(x: Array, dtype: DTypeLike) -> tuple[Array, Array | None]:
    """As `ternary.activations.quantize`, which is also `rowwise`'s."""
    rows = rows_of_block(x.shape)

    def body(x_ref, h_out, scale_out):
        image, tokens = jax.lax.axis_index("image"), jax.lax.axis_index("block") * rows

        def load(index):
            return load_row(x_ref.at[image, tokens + index])

        def step(index, x):
            ahead = load(_next(index, rows))
            store_operand([x.astype(jnp.float32)], h_out, scale_out, image, tokens + index)
            return ahead

        jax.lax.fori_loop(0, rows, step, load(0))

    return call(body, (x.shape[0], x.shape[1] // rows), [x], operand_types(x, dtype))


@partial(jax.jit, static_argnames=("heads",))
def queries_keys_values(
    y: Array, y_scale: Array | None, alphas: Array, norms: tuple[dict, dict] | None, rope: Array, heads: int
) -> tuple[Array, Array, Array]:
    """As `rowwise.queries_keys_values`, in bfloat16."""
    B, T, total = y.shape
    half = rope.shape[-1]
    width = heads * 2 * half
    kv_width = (total - width) // 2
    *tables, in_first = rotary_tables(rope, heads)
    flat_norms = [] if norms is None else [norm[name] for norm in norms for name in ("scale", "bias")]
    per_block = images_of_block(B, T)

    def body(y_ref, y_scale_ref, alphas_ref, table_refs, in_first_ref, norm_refs, q_out, k_out, v_out, scratch):
        token, images = jax.lax.axis_index("block"), jax.lax.axis_index("image") * per_block
        silence_pads(scratch, width)

        def over_images(start, size, alpha, process):
            """Calls process(image, row) for each image, its next row being on its way already."""

            def load(index):
                return load_row(y_ref.at[images + index, token, pl.ds(start, size)])

            def step(index, row):
                image = images + index
                ahead = load(_next(index, per_block))
                scale = alpha if y_scale_ref is None else alpha * y_scale_ref[image, token]
                process(image, row.astype(jnp.float32) * scale)
                return ahead

            jax.lax.fori_loop(0, per_block, step, load(0))

        def norm_rotate(which, start, size, out):
            cos, sin = (load_row(ref.at[token, pl.ds(0, size)]) for ref in table_refs)
            in_first = load_row(in_first_ref.at[pl.ds(0, size)]) > 0
            gain, bias = (load_row(ref) for ref in norm_refs[2 * which : 2 * which + 2]) if norm_refs else (None, None)

            def process(image, n):
                if norm_refs:
                    n = n - jnp.sum(n) * (1 / size)
                    n = n * jax.lax.rsqrt(jnp.sum(n * n) * (1 / size) + EPS) * gain + bias
                else:
                    plgpu.commit_smem()  # everyone has read the row before; reductions see to it above
                scratch[pl.ds(PAD, size)] = n
                plgpu.commit_smem()
                # The partner of a feature in the first half of its head lies half a head ahead, of others behind.
                ahead, behind = (load_row(scratch.at[pl.ds(PAD + offset, size)]) for offset in (half, -half))
                out[image, token] = (n * cos + jnp.where(in_first, ahead, behind) * sin).astype(jnp.bfloat16)

            over_images(start, size, alphas_ref[which], process)

        def copy(image, v):
            v_out[image, token] = v.astype(jnp.bfloat16)

        norm_rotate(0, 0, width, q_out)
        norm_rotate(1, width, kv_width, k_out)
        over_images(width + kv_width, kv_width, alphas_ref[2], copy)

    outputs = [jax.ShapeDtypeStruct((B, T, size), jnp.bfloat16) for size in (width, kv_width, kv_width)]
    scratch = {"scratch": plgpu.SMEM((width + 2 * PAD,), jnp.float32)}
    made = call(body, (B // per_block, T), [y, y_scale, alphas, tables, in_first, flat_norms], outputs, scratch)
    return tuple(out.reshape(B, T, -1, 2 * half) for out in made)


def rotary_tables(rope: Array, heads: int) -> tuple[Array, Array, Array]:
    """Factors of each feature and of its partner, (T, heads * head_dim) float32, and whether it is in the first half of
    its head, (heads * head_dim,) bfloat16, from (2, T, head_dim / 2)."""
    halves = ((rope[0], rope[0]), (-rope[1], rope[1]))
    cos, sin = (jnp.tile(jnp.concatenate(pair, axis=-1), (1, heads)) for pair in halves)
    half = rope.shape[-1]
    return cos, sin, jnp.tile(jnp.arange(2 * half) < half, heads).astype(jnp.bfloat16)


def silence_pads(scratch, width: int) -> None:
    """Zeros before and behind a row in shared memory."""
    silence = strided(jnp.zeros((PAD,), jnp.float32))
    scratch[pl.ds(0, PAD)] = silence
    scratch[pl.ds(PAD + width, PAD)] = silence


def call(body: Callable, grid: tuple[int, int], arguments: list, outputs: list, scratch: dict | None = None) -> tuple:
    """Runs a kernel over (images, blocks of tokens). Arguments and outputs that are None reach it as None."""
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
        grid_names=("image", "block"),
        compiler_params=_COMPILER_PARAMS,
        scratch_types=scratch or {},
    )
    made = iter(call(*given[:num_inputs]))
    return tuple(None if out is None else next(made) for out in outputs)


def load_row(ref) -> Array:
    return strided(ref[...])


def strided(vector: Array) -> Array:
    """The same vector, cut over the threads in pieces as wide as the hardware loads."""
    (size,) = vector.shape
    vec_size = next(n for n in (8, 4, 2, 1) if size % (_LANES * n) == 0)
    return plgpu.layout_cast(vector, plgpu.Layout.WG_STRIDED((size,), vec_size=vec_size))


def store_operand(pieces: list[Array], h_out, scale_out, image: Array, token: Array) -> None:
    """A row, in pieces of one size: quantised by its largest magnitude if it has a scale."""
    if scale_out is not None:
        peaks = jnp.abs(pieces[0])
        for piece in pieces[1:]:  # one reduction over the threads for all pieces
            peaks = jnp.maximum(peaks, jnp.abs(piece))
        scale = jnp.maximum(jnp.max(peaks), TINY) * (1 / float(jnp.finfo(h_out.dtype).max))
        scale_out[image, token] = scale
        pieces = [piece * (1 / scale) for piece in pieces]
    (size,) = pieces[0].shape
    for k, piece in enumerate(pieces):
        h_out[image, token, pl.ds(k * size, size)] = piece.astype(h_out.dtype)


def operand_types(like, dtype: DTypeLike) -> list[jax.ShapeDtypeStruct | None]:
    eight = jnp.dtype(dtype).itemsize == 1
    return [_like(like, dtype), jax.ShapeDtypeStruct(like.shape[:2], jnp.float32) if eight else None]


def _like(array, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, dtype)


def _next(index: Array, count: int) -> Array:
    """The next of `count` rows to load, or the last one again, which nobody reads."""
    return jnp.minimum(index + 1, count - 1)


def rows_of_block(shape: tuple[int, ...]) -> int:
    """Rows that a warpgroup takes one after the other: several share what they load, if all cores stay busy."""
    images, tokens = shape[:2]
    return next(n for n in (8, 4, 2, 1) if tokens % n == 0 and images * tokens // n >= _ENOUGH_BLOCKS or n == 1)


def images_of_block(images: int, tokens: int) -> int:
    """Images whose rows of one token a warpgroup takes one after the other."""
    return next(n for n in (8, 4, 2, 1) if images % n == 0 and images * tokens // n >= _ENOUGH_BLOCKS or n == 1)


def parts_of_row(width: int) -> int:
    """Pieces that a row is taken in, to bound live registers."""
    return next(n for n in (8, 4, 2, 1) if width % (2 * _LANES * n) == 0)
