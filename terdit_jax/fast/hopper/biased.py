"""Kernels equal to the gradients of `xla_passes.gelu` and `split_heads`, the passes that add biases.

A bias's gradient is a sum over tokens: it leaves as in `backward`, one part a block.
"""

from functools import partial

import jax
from jax import Array
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jax.typing import DTypeLike

from terdit_jax.fast.hopper import forward, warpgroup
from terdit_jax.fast.hopper.backward import rows_of_block
from terdit_jax.fast.hopper.forward import GELU_CUBE, GELU_SLOPE, Stored, gelu_sigmoid


@partial(jax.jit, static_argnames=("eight",))
def gelu(
    y: Array,
    y_scale: Array | None,
    alphas: Array,
    bias: Array,
    dh: Array,
    dh_scale: Array | None,
    eight: DTypeLike | None = None,
) -> tuple[Array | None, ...]:
    """Gradients of h = gelu(alpha y_scale y + bias).

    Args:
      y: (B, T, F) bfloat16 products.
      y_scale: (B, T) float32, what each token of y stands for, or None.
      alphas: (1,) or (1, F) float32.
      bias: (F,) float32.
      dh: (B, T, F) bfloat16, the gradient of h once it is multiplied by its scale.
      dh_scale: (B, T) float32, or None.
      eight: dtype of 8 bits in which the gradient is also to be, if at all.

    Returns:
      The gradient of y_scale y, (B, T, F) in bfloat16 and in 8 bits, and its scale (B, T); the sums over tokens
      dL/dbias, (B, F) float32, still to be summed over images.
    """
    width, count = y.shape[-1], rows_of_block(y.shape)
    parts = forward.wide_parts(width)
    part = width // parts
    together = 1 if eight is None else parts

    def body(y_ref, y_scale_ref, alphas_ref, bias_ref, dh_ref, dh_scale_ref, *outs):
        *dy_outs, sums_out = outs
        image, block = jax.lax.axis_index("image"), jax.lax.axis_index("block")
        first = jax.lax.axis_index("part") * (together * part)
        places = [pl.ds(first + k * part, part) for k in range(together)]

        def step(index, sums):
            token = block * count + index
            scales = forward.scales_of_products(alphas_ref, places, y_scale_ref, lambda: (image, token))
            dh_scale = 1.0 if dh_scale_ref is None else dh_scale_ref[image, token]
            pieces = [[warpgroup.load(ref.at[image, token, at]) for ref in (y_ref, dh_ref)] for at in places]
            ds = []
            for at, scale, (y, dh) in zip(places, scales, pieces, strict=True):
                a = y.astype(jnp.float32) * scale + warpgroup.load(bias_ref.at[at])
                sigmoid = gelu_sigmoid(a)
                slope = 2 * GELU_SLOPE + 6 * GELU_SLOPE * GELU_CUBE * (a * a)  # of sigmoid's argument
                ds.append(dh.astype(jnp.float32) * (sigmoid + a * slope * sigmoid * (1 - sigmoid)) * dh_scale)
            alphas = (forward.scale_at(alphas_ref, 0, at) for at in places)
            forward.store_row([d * alpha for d, alpha in zip(ds, alphas, strict=True)], dy_outs, image, token, first)
            return tuple(total + d for total, d in zip(sums, ds, strict=True))

        zeros = warpgroup.strided(jnp.zeros((part,), jnp.float32))
        sums = jax.lax.fori_loop(0, count, step, (zeros,) * together)
        for at, total in zip(places, sums, strict=True):
            warpgroup.store(sums_out.at[image, block, at], total)

    B, blocks = y.shape[0], y.shape[1] // count
    outputs = [*forward.row_types(y, Stored(True, eight)), jax.ShapeDtypeStruct((B, blocks, width), jnp.float32)]
    grid, arguments = (B, blocks, parts // together), [y, y_scale, alphas, bias, dh, dh_scale]
    *made, sums = forward.call(body, grid, arguments, outputs)
    return *made, jnp.sum(sums, axis=1)


@partial(jax.jit, static_argnames=("eight",))
def split_heads(
    dq: Array, dk: Array, dv: Array, alphas: Array, eight: DTypeLike | None = None
) -> tuple[Array | None, ...]:
    """Gradients of `xla_passes.split_heads`.

    Args:
      dq, dk, dv: (B, T, heads, head_dim) bfloat16.
      alphas: (3,) or (3, D) float32, what products were multiplied by.
      eight: dtype of 8 bits in which the gradient of y_scale y is also to be, if at all.

    Returns:
      The gradient of y_scale y (B, T, 3 D) in bfloat16 and in 8 bits, and its scale (B, T); the sums over tokens
      dL/dbias, (B, 3 D) float32, still to be summed over images.
    """
    gradients = [d.reshape(*d.shape[:2], -1) for d in (dq, dk, dv)]
    B, T, width = gradients[0].shape
    count = rows_of_block((B, T))

    def body(d_refs, alphas_ref, *outs):
        *dy_outs, sums_out = outs
        image, block = jax.lax.axis_index("image"), jax.lax.axis_index("block")

        def step(index, sums):
            token = block * count + index
            ds = [row.astype(jnp.float32) for row in [warpgroup.load(ref.at[image, token]) for ref in d_refs]]
            dys = [d * forward.scale_at(alphas_ref, k, pl.ds(0, width)) for k, d in enumerate(ds)]
            forward.store_row(dys, dy_outs, image, token)
            return tuple(total + d for total, d in zip(sums, ds, strict=True))

        zeros = warpgroup.strided(jnp.zeros((width,), jnp.float32))
        sums = jax.lax.fori_loop(0, count, step, (zeros,) * 3)
        for k, total in enumerate(sums):
            warpgroup.store(sums_out.at[image, block, k], total)

    like = jax.ShapeDtypeStruct((B, T, 3 * width), jnp.bfloat16)
    sums = jax.ShapeDtypeStruct((B, T // count, 3, width), jnp.float32)
    outputs = [*forward.row_types(like, Stored(True, eight)), sums]
    *made, sums = forward.call(body, (B, T // count), [gradients, alphas], outputs)
    return *made, jnp.sum(sums, axis=1).reshape(B, 3 * width)
