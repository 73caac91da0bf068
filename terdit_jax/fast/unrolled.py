"""The blocks one by one, without a loop; equal to `model.depth.scan_blocks`.

A loop copies into stacks what is kept for the backward pass, and gradients. Unrolled, a step takes longer to compile
and on GPUs a tenth less to run.
"""

from collections.abc import Callable

import jax
from jax import Array
import jax.numpy as jnp
import optax

from terdit_jax.fast.linear import FastLinear
from terdit_jax.model.block import normalize_modulation
from terdit_jax.ternary.linear import Linear

# (x, operands of one layer, its modulation (B, 6, D)) -> the new x, and what is kept of the layer.
Layer = Callable[[Array, dict, Array], tuple[Array, dict[str, Array]]]


def unrolled_blocks(layer: Layer, operands: dict, x: Array, c: Array) -> tuple[Array, dict[str, Array]]:
    """Runs the layers, each with its operands cut from those of all.

    The modulations depend on the condition alone, so one matmul makes them of all layers. The gradients of their
    weights come layer by layer: devices of a mesh sum those of one layer while others are still to come.

    Args:
      layer: runs one.
      operands: of `Block.operands`, the depth in front.
      x: (B, T, D) residual stream.
      c: (B, C') condition, in x's dtype.

    Returns:
      As `scan_blocks`.
    """
    leaves, structure = jax.tree.flatten(operands)
    layers = [jax.tree.unflatten(structure, one) for one in zip(*(_unstack(leaf) for leaf in leaves), strict=True)]
    adalns = [one["adaLN_modulation"] for one in layers]
    ys = _by_one_matmul(operands["adaLN_modulation"]["linear"], [adaln["linear"] for adaln in adalns], c)
    kept = []
    for one, adaln, y in zip(layers, adalns, ys, strict=True):
        x, seen = layer(x, one, normalize_modulation(adaln, y))
        kept.append(seen)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept)


def gradient_norm_by_layer(grads: dict) -> Array:
    """optax.tree.norm, the blocks' layers summed one by one: their stack is then never made."""
    return optax.tree.norm(grads | {"blocks": jax.tree.map(list, grads["blocks"])})


@jax.custom_vjp
def _by_one_matmul(stacked: Linear | FastLinear, layers: list[Linear | FastLinear], c: Array) -> tuple[Array, ...]:
    """c (B, C') through each of the maps, given stacked and one by one: (B, n, out) each. The gradients of the maps go
    to the latter."""
    return tuple(jax.vmap(lambda one: one(c))(stacked))


def _by_one_matmul_bwd(residuals: tuple, dys: tuple[Array, ...]) -> tuple:
    stacked, layers, c = residuals
    dlayers = [jax.vjp(lambda one: one(c), one)[1](dy)[0] for one, dy in zip(layers, dys, strict=True)]
    (dc,) = jax.vjp(lambda c: jax.vmap(lambda one: one(c))(stacked), c)[1](jnp.stack(dys))
    return None, dlayers, dc


_by_one_matmul.defvjp(lambda *arguments: (_by_one_matmul(*arguments), arguments), _by_one_matmul_bwd)


def _unstack(leaf: Array) -> tuple[Array, ...]:
    """The layers of a leaf, whose gradients are stacked. XLA fuses a stack into what reads it; the gradients of slices
    would be padded to the full size and summed."""
    layers = lambda leaf: tuple(leaf[i] for i in range(leaf.shape[0]))  # noqa: E731
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return layers(leaf)
    stack = lambda _, grads: (jnp.stack(grads),)  # noqa: E731
    unstack = jax.custom_vjp(layers)
    unstack.defvjp(lambda leaf: (layers(leaf), None), stack)
    return unstack(leaf)
