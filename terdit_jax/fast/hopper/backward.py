"""Kernels equal to the gradients of `forward`'s passes: a row of each array is read once and written once.

Sums over tokens, for the gradients of what tokens share, leave as one part a block. The cut over a warpgroup's
threads and the barriers are as in `forward`; `fused_block` calls them in turn. `biased` has the passes that add biases.
"""

from functools import partial

import jax
from jax import Array
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jax.typing import DTypeLike

from terdit_jax.fast.hopper import forward, warpgroup
from terdit_jax.fast.hopper.forward import QK_EPS, Stored, centred
from terdit_jax.model.traits import NORM_EPS, Norm


@partial(jax.jit, static_argnames=("eight", "norm", "offset"))
def add_norm_modulate(
    x: Array,
    y: Array | None,
    y_scale: Array | None,
    gate: Array | None,
    gain: Array,
    dx: Array,
    dh: Array,
    dh_scale: Array | None,
    eight: DTypeLike | None = None,
    norm: Norm = "rms",
    offset: bool = False,
) -> tuple[Array | None, ...]:
    """Gradients of x' = x + gate y_scale y + offset, h = norm(x') * gain + shift.

    Args:
      x: (B, T, D) bfloat16, x'.
      y: (B, T, D) bfloat16, or None if there was nothing to add.
      y_scale: (B, T) float32, what each token of y stands for, or None.
      gate: (B, D) float32, or None.
      gain: (B, D) float32.
      dx: (B, T, D) bfloat16, the gradient of x'.
      dh: (B, T, D) bfloat16, that of h once it is multiplied by its scale.
      dh_scale: (B, T) float32, or None.
      eight: dtype of 8 bits in which the gradient of y_scale y is also to be, if at all.
      norm: the RMS norm, or the layer norm without parameters.
      offset: whether there was one (B, D) beside y.

    Returns:
      dL/dx (B, T, D) bfloat16; the gradient of y_scale y (B, T, D) in bfloat16, in 8 bits, and its scale (B, T), None
      each if there is none; the sums over tokens dL/dshift, dL/dgain and, if there was something to add, dL/dgate, and
      then dL/doffset, (B, 2 to 4, D) float32.
    """
    width, count, gated = x.shape[-1], rows_of_block(x.shape), y is not None
    sums_count = 2 + gated + offset

    def body(x_ref, y_ref, y_scale_ref, gate_ref, gain_ref, dx_ref, dh_ref, dh_scale_ref, dx_out, *outs):
        *dy_outs, sums_out = outs
        image, block = jax.lax.axis_index("image"), jax.lax.axis_index("block")

        def step(index, sums):
            token = block * count + index
            x, dh = (warpgroup.load(ref.at[image, token]).astype(jnp.float32) for ref in (x_ref, dh_ref))
            scale = 1.0 if dh_scale_ref is None else dh_scale_ref[image, token]  # in factors: rows are registers
            dn = dh * warpgroup.load(gain_ref.at[image])
            # The layer norm is the RMS norm of what is centred, as is then its gradient.
            x, dn = centred(x, norm), centred(dn, norm)
            squares, along = jnp.sum(x * x), jnp.sum(dn * x)
            inverse = jax.lax.rsqrt(squares * (1 / width) + NORM_EPS[norm])
            n = x * inverse
            slope = along * inverse * (1 / width)
            total = warpgroup.load(dx_ref.at[image, token]).astype(jnp.float32) + (dn - n * slope) * (inverse * scale)
            warpgroup.store(dx_out.at[image, token], total)
            new = [sums[0] + dh * scale, sums[1] + dh * n * scale]
            if gated:
                forward.store_row([total * warpgroup.load(gate_ref.at[image])], dy_outs, image, token)
                y = warpgroup.load(y_ref.at[image, token]).astype(jnp.float32)
                new.append(sums[2] + total * (y if y_scale_ref is None else y * y_scale_ref[image, token]))
            if offset:
                new.append(sums[-1] + total)
            return tuple(new)

        zeros = warpgroup.strided(jnp.zeros((width,), jnp.float32))
        sums = jax.lax.fori_loop(0, count, step, (zeros,) * sums_count)
        for k, total in enumerate(sums):
            warpgroup.store(sums_out.at[image, block, k], total)

    B, blocks = x.shape[0], x.shape[1] // count
    outputs = [
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        *forward.row_types(x, Stored(gated, eight)),
        jax.ShapeDtypeStruct((B, blocks, sums_count, width), jnp.float32),
    ]
    *made, sums = forward.call(body, (B, blocks), [x, y, y_scale, gate, gain, dx, dh, dh_scale], outputs)
    return *made, jnp.sum(sums, axis=1)


@partial(jax.jit, static_argnames=("eight", "offset"))
def add_gated(
    y: Array, y_scale: Array | None, gate: Array, dx: Array, eight: DTypeLike | None = None, offset: bool = False
) -> tuple[Array | None, ...]:
    """Gradients of x' = x + gate y_scale y + offset; that of x is that of x'. Arguments as of `add_norm_modulate`.

    Returns:
      The gradient of y_scale y (B, T, D) in bfloat16, in 8 bits, and its scale (B, T); the sums over tokens dL/dgate
      and, if there was an offset, dL/doffset, (B, 1 or 2, D) float32.
    """
    width, count = y.shape[-1], rows_of_block(y.shape)

    def body(y_ref, y_scale_ref, gate_ref, dx_ref, *outs):
        *dy_outs, sums_out = outs
        image, block = jax.lax.axis_index("image"), jax.lax.axis_index("block")
        gate = warpgroup.load(gate_ref.at[image])

        def step(index, sums):
            token = block * count + index
            dx, y = (warpgroup.load(ref.at[image, token]).astype(jnp.float32) for ref in (dx_ref, y_ref))
            forward.store_row([dx * gate], dy_outs, image, token)
            new = [sums[0] + dx * (y if y_scale_ref is None else y * y_scale_ref[image, token])]
            return tuple(new + [total + dx for total in sums[1:]])

        zeros = warpgroup.strided(jnp.zeros((width,), jnp.float32))
        sums = jax.lax.fori_loop(0, count, step, (zeros,) * (1 + offset))
        for k, total in enumerate(sums):
            warpgroup.store(sums_out.at[image, block, k], total)

    B, blocks = y.shape[0], y.shape[1] // count
    sums = jax.ShapeDtypeStruct((B, blocks, 1 + offset, width), jnp.float32)
    outputs = [*forward.row_types(y, Stored(True, eight)), sums]
    *made, sums = forward.call(body, (B, blocks), [y, y_scale, gate, dx], outputs)
    return *made, jnp.sum(sums, axis=1)


@partial(jax.jit, static_argnames=("eight",))
def swiglu(
    y: Array,
    y_scale: Array | None,
    alphas: Array,
    dh: Array,
    dh_scale: Array | None,
    eight: DTypeLike | None = None,
) -> tuple[Array | None, ...]:
    """Gradients of h = silu(alpha_0 a) alpha_1 b with y_scale y = (a, b).

    Args:
      y: (B, T, 2 F) bfloat16 products.
      y_scale: (B, T) float32, what each token of y stands for, or None.
      alphas: (2,) or (2, F) float32.
      dh: (B, T, F) bfloat16, the gradient of h once it is multiplied by its scale.
      dh_scale: (B, T) float32, or None.
      eight: dtype of 8 bits in which the gradient is also to be, if at all.

    Returns:
      The gradient of y_scale y, (B, T, 2 F) in bfloat16 and in 8 bits, and its scale (B, T).
    """
    width = y.shape[-1] // 2
    parts = forward.parts_of_row(width)
    part = width // parts
    count = forward.rows_of_block(y.shape)

    def body(y_ref, y_scale_ref, alphas_ref, dh_ref, dh_scale_ref, dy_out, *eight_outs):
        image, tokens = jax.lax.axis_index("image"), jax.lax.axis_index("block") * count
        alphas = forward.scales_of(alphas_ref, 2, lambda k: pl.ds(k * part, part))

        @pl.loop(0, count)
        def _(index):
            token = tokens + index
            scale = 1.0 if y_scale_ref is None else y_scale_ref[image, token]
            dh_scale = 1.0 if dh_scale_ref is None else dh_scale_ref[image, token]

            def load(k):
                first, second = (pl.ds(start + k * part, part) for start in (0, width))
                sources = (y_ref, first), (y_ref, second), (dh_ref, first)
                return first, second, [warpgroup.load(ref.at[image, token, at]) for ref, at in sources]

            loaded = (load(k) for k in range(parts))
            if eight is not None:
                loaded = list(loaded)  # a row of gradients in registers leaves room for few warpgroups: all at once
            das, dbs = [], []
            for k, (first, second, pieces) in enumerate(loaded):
                alpha_a, alpha_b = alphas(k)
                a, b, dh = (piece.astype(jnp.float32) for piece in pieces)
                a, b = a * (alpha_a * scale), b * (alpha_b * scale)
                sigmoid = 1 / (1 + jnp.exp(-a))
                da = dh * b * sigmoid * (1 + a * (1 - sigmoid)) * (alpha_a * dh_scale)
                db = dh * a * sigmoid * (alpha_b * dh_scale)
                for d, at, kept in ((da, first, das), (db, second, dbs)):
                    d = d.astype(jnp.bfloat16)
                    dy_out[image, token, at] = d
                    kept.append(d)
            if eight is not None:
                forward.store_row([d.astype(jnp.float32) for d in das + dbs], eight_outs, image, token)

    outputs = forward.row_types(y, Stored(True, eight))
    return forward.call(body, (y.shape[0], y.shape[1] // count), [y, y_scale, alphas, dh, dh_scale], outputs)


@partial(jax.jit, static_argnames=("heads", "eight"))
def queries_keys_values(
    y: Array,
    y_scale: Array | None,
    alphas: Array,
    norms: tuple[dict, dict],
    rope: Array,
    dq: Array,
    dk: Array,
    dv: Array,
    heads: int,
    eight: DTypeLike | None = None,
) -> tuple[Array | None, ...]:
    """Gradients of queries and keys after layer norm and RoPE, and of values, as many heads of each.

    Args:
      y: (B, T, 3 D) bfloat16 products.
      y_scale: (B, T) float32, what each token of y stands for, or None.
      alphas: (3,) or (3, D) float32, what they were multiplied by besides.
      norms: scale and bias (D,) of queries and of keys.
      rope: (2, T, head_dim / 2).
      dq, dk, dv: (B, T, heads, head_dim) bfloat16.
      heads: their number.
      eight: dtype of 8 bits in which the gradient of y_scale y is also to be, if at all.

    Returns:
      The gradient of y_scale y (B, T, 3 D) in bfloat16 and in 8 bits, and its scale (B, T); the sums over tokens of the
      gradients of queries' scale and bias and keys' scale and bias, (B', 4, D) float32 with B' parts of the batch.
    """
    B, T, total = y.shape
    width = total // 3
    count = forward.images_of_block(B, T)
    gains = [norm["scale"] for norm in norms]
    gradients = [d.reshape(B, T, width) for d in (dq, dk, dv)]
    by_output = alphas.ndim > 1

    def body(y_ref, y_scale_ref, alphas_ref, rope_ref, gain_refs, d_refs, dy_out, eight_out, scale_out, sums_out):
        token, block = jax.lax.axis_index("block"), jax.lax.axis_index("image")

        def norm_rotate(which):
            alpha, at = None if by_output else alphas_ref[which], pl.ds(which * width, width)

            def halves():
                """The scales of even and of odd features; rows are loaded at each use, for registers are few."""
                return warpgroup.split(warpgroup.load(alphas_ref.at[which])) if by_output else (alpha, alpha)

            def step(index, sums):
                image = block * count + index
                d_even, d_odd = warpgroup.split(warpgroup.load(d_refs[which].at[image, token]))
                cos, sin = (warpgroup.load_half(rope_ref.at[part, token]) for part in range(2))
                # What was turned by an angle is turned back by it.
                d = d_even * cos + d_odd * sin, d_odd * cos - d_even * sin
                scaled = lambda a: a if y_scale_ref is None else a * y_scale_ref[image, token]  # noqa: E731
                scales = [scaled(half) for half in halves()] if by_output else [scaled(alpha)] * 2
                y = warpgroup.split(warpgroup.load(y_ref.at[image, token, at]))
                n = [part * scale for part, scale in zip(y, scales, strict=True)]
                mean = jnp.sum(n[0] + n[1]) * (1 / width)
                n = [part - mean for part in n]
                inverse = jax.lax.rsqrt(jnp.sum(n[0] * n[0] + n[1] * n[1]) * (1 / width) + QK_EPS)
                n = [part * inverse for part in n]
                sums = [total + new for total, new in zip(sums, (d[0] * n[0], d[1] * n[1], *d), strict=True)]
                gain = warpgroup.split(warpgroup.load(gain_refs[which]))
                d = [part * factor for part, factor in zip(d, gain, strict=True)]
                mean = jnp.sum(d[0] + d[1]) * (1 / width)
                along = jnp.sum(d[0] * n[0] + d[1] * n[1]) * (1 / width)
                parts = zip(d, n, halves(), strict=True)
                dy = warpgroup.join(*((a - mean - b * along) * (inverse * alpha) for a, b, alpha in parts))
                dy_out[image, token, at] = dy
                if eight is not None:  # where the scale will be, the largest magnitude so far
                    peak = forward.largest([dy.astype(jnp.float32)])
                    scale_out[image, token] = jnp.maximum(scale_out[image, token], peak) if which else peak
                return sums

            zeros = warpgroup.strided_half(jnp.zeros((width // 2,), jnp.float32))
            sums = jax.lax.fori_loop(0, count, step, [zeros] * 4)
            for k, total in enumerate(sums):
                sums_out[block, token, 2 * which + k // 2, k % 2] = total

        norm_rotate(0)
        norm_rotate(1)

        @pl.loop(0, count)
        def _(index):
            image = block * count + index
            d = warpgroup.load(d_refs[2].at[image, token]).astype(jnp.float32)
            d = (d * (warpgroup.load(alphas_ref.at[2]) if by_output else alphas_ref[2])).astype(jnp.bfloat16)
            dy_out[image, token, pl.ds(2 * width, width)] = d
            if eight is not None:
                # Queries' and keys' parts come back from the cache, each thread's as it has stored them.
                parts = [warpgroup.load(dy_out.at[image, token, pl.ds(which * width, width)]) for which in range(2)]
                parts = [part.astype(jnp.float32) for part in (*parts, d)]
                before = scale_out[image, token]  # read by all ahead of the barriers in `largest`, written after them
                peak = jnp.maximum(before, forward.largest(parts[2:]))
                scale = forward.scale_of(peak, eight)
                scale_out[image, token] = scale
                for which, part in enumerate(parts):
                    eight_out[image, token, pl.ds(which * width, width)] = (part * (1 / scale)).astype(eight)

    blocks = B // count
    outputs = [
        *forward.row_types(y, Stored(True, eight)),
        jax.ShapeDtypeStruct((blocks, T, 4, 2, width // 2), jnp.float32),
    ]
    arguments = [y, y_scale, alphas, forward.rotary_table(rope, heads), gains, gradients]
    *made, sums = forward.call(body, (blocks, T), arguments, outputs)
    return *made, jnp.sum(sums, axis=1).swapaxes(-1, -2).reshape(blocks, 4, width)


def rows_of_block(shape: tuple[int, ...]) -> int:
    """How many rows are summed before their sum is stored: twice as many as of a forward pass, for half the parts."""
    count = forward.rows_of_block(shape)
    return 2 * count if shape[1] % (2 * count) == 0 and count > 1 else count
