"""The blocks one after the other: a scan over the layers, rematerialised as the configuration says."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from terdit_jax.model.block import block, modulation
from terdit_jax.model.config import DiTConfig

# Maps a block's named activations to what is recorded of each layer.
Watch = Callable[[dict[str, Array]], dict[str, Array]]
# (config, operands of the blocks, x (B, T, D), c (B, C'), rope, watch) -> x, and what `watch` kept, (L, ...)
RunBlocks = Callable[[DiTConfig, dict, Array, Array, Array | None, Watch | None], tuple[Array, dict[str, Array]]]

# Keeps the outputs of matmuls without batch dimensions; the rest is cheap to do again.
KEEP_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


def scan_blocks(
    config: DiTConfig, operands: dict, x: Array, c: Array, rope: Array | None, watch: Watch | None = None
) -> tuple[Array, dict[str, Array]]:
    """Runs all blocks.

    Args:
      config: the architecture.
      operands: of `Block.operands`, the depth in front.
      x: (B, T, D) residual stream.
      c: (B, C') condition, in x's dtype.
      rope: (2, T, head_dim / 2); None in DiT.
      watch: maps a block's activations to what is recorded of each layer; nothing if left out.

    Returns:
      The new residual stream, and what `watch` made, (L, ...) each.
    """

    def layer(x: Array, one: dict) -> tuple[Array, dict[str, Array]]:
        x, activations = block(config, one, x, modulation(one["adaLN_modulation"], c), rope)
        return x, watch(activations) if watch else {}

    return jax.lax.scan(rematerialise(layer, config.remat), x, operands)


def rematerialise(layer: Callable[..., Any], remat: str, policy: Callable[..., bool] = KEEP_DOTS) -> Callable[..., Any]:
    """The layer, whose backward pass recomputes all of it ("block"), what the policy does not keep ("dots"), or nothing
    ("none")."""
    if remat == "none":
        return layer
    return jax.checkpoint(layer, policy=policy if remat == "dots" else None)
