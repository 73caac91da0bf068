"""One transformer block: adaLN modulation, attention and feed-forward, each gated into the residual stream.

`depth` runs the blocks one after the other.
"""

from typing import Any

from flax import nnx
from jax import Array
import jax.numpy as jnp

from terdit_jax.model.attention import Attention, Implementation, attention
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.feed_forward import MLP, SwiGLU, feed_forward
from terdit_jax.model.layers import BlockLinear, MakeLinear, RMSNorm, layer_norm, rms_norm, stack, zeros
from terdit_jax.model.traits import NORM_EPS
from terdit_jax.parallel.sharding import constrain


class Modulation(BlockLinear):
    """adaLN: a map from the condition to six vectors of width D, starting at zero; TerDiT adds an RMSNorm over 6D."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        super().__init__(config, config.condition_width, 6 * config.hidden_size, zeros, rngs=rngs, bias=True)
        if config.ternary and config.adaln_rms_norm:
            self.norm = RMSNorm(6 * config.hidden_size)

    def operands(self, config: DiTConfig, make_linear: MakeLinear) -> dict:
        """The operands of `modulation`, from parameters with the depth in front."""
        operands: dict[str, Any] = {"linear": stack(config, [self], make_linear), "bias": self.bias[...]}
        if config.ternary and config.adaln_rms_norm:
            operands["norm"] = {"scale": self.norm.scale[...]}
        return operands


NORMS = ("attention_norm", "ffn_norm")


class Block(nnx.Module):
    """The parameters of one block; DiT's norms have none."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward = (MLP if config.traits.feed_forward == "gelu" else SwiGLU)(config, rngs=rngs)
        self.adaLN_modulation = Modulation(config, rngs=rngs)
        if config.traits.norm == "rms":
            self.attention_norm = RMSNorm(config.hidden_size)
            self.ffn_norm = RMSNorm(config.hidden_size)

    def operands(self, config: DiTConfig, make_linear: MakeLinear) -> dict:
        """The operands of `block`, from parameters with the depth in front."""
        parts = ("attention", "feed_forward", "adaLN_modulation")
        operands = {name: getattr(self, name).operands(config, make_linear) for name in parts}
        norms = NORMS if config.traits.norm == "rms" else ()
        return operands | {name: {"scale": getattr(self, name).scale[...]} for name in norms}


def norm(config: DiTConfig, operands: dict, name: str, x: Array) -> Array:
    """One of a block's two norms, by its name in `NORMS`: RMSNorm, or in DiT LayerNorm without parameters."""
    eps = NORM_EPS[config.traits.norm]
    return layer_norm(x, eps=eps) if config.traits.norm == "layer" else rms_norm(x, operands[name]["scale"], eps)


def modulation(operands: dict, c: Array) -> Array:
    """adaLN of the condition c (B, C') -> (B, 6, D): shift, scale and gate of attention, then of the feed-forward."""
    return normalize_modulation(operands, operands["linear"](c))


def normalize_modulation(operands: dict, y: Array) -> Array:
    """The rest of `modulation` after its linear map: y (B, 1, 6 D) -> (B, 6, D)."""
    out = y[:, 0].astype(jnp.float32) + operands["bias"]
    if "norm" in operands:
        out = rms_norm(out, operands["norm"]["scale"])
    return constrain(out.astype(y.dtype).reshape(y.shape[0], 6, -1), "batch", None, None)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """x (B, T, D), shift and scale (B, D) -> x * (1 + scale) + shift."""
    return x * (1 + scale[:, None]) + shift[:, None]


def block(
    config: DiTConfig, operands: dict, x: Array, m: Array, rope: Array | None, implementation: Implementation = "xla"
) -> tuple[Array, dict[str, Array]]:
    """One block.

    Args:
      config: the architecture.
      operands: one layer's, of `Block.operands`.
      x: (B, T, D) residual stream.
      m: (B, 6, D) of `modulation`.
      rope: (2, T, head_dim / 2); None in DiT.
      implementation: of attention.

    Returns:
      The new residual stream, and by name the activations that a training log watches. A caller that drops the
      second pays nothing for it.
    """
    h = modulate(norm(config, operands, "attention_norm", x), m[:, 0], m[:, 1])
    attended = attention(config, operands["attention"], h, rope, implementation)
    x = constrain(x + m[:, 2, None] * attended, "batch", "tokens", None)
    h = modulate(norm(config, operands, "ffn_norm", x), m[:, 3], m[:, 4])
    fed = feed_forward(config, operands["feed_forward"], h)
    x = constrain(x + m[:, 5, None] * fed, "batch", "tokens", None)
    return x, {"attention": attended, "feed_forward": fed, "adaLN_modulation": m, "residual": x}
