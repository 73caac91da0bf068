"""One transformer block: adaLN modulation, attention and SwiGLU feed-forward, each gated into the residual stream.

`depth` runs the blocks one after the other.
"""

from typing import Any

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from terdit_jax.model.attention import Attention, Implementation, attention
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.layers import BlockLinear, MakeLinear, RMSNorm, group, rms_norm, zeros
from terdit_jax.parallel.sharding import constrain


class FeedForward(nnx.Module):
    """w1 and w3 (mlp_width, D), w2 (D, mlp_width)."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.w1 = BlockLinear(config, config.hidden_size, config.mlp_width, rngs=rngs)
        self.w2 = BlockLinear(config, config.mlp_width, config.hidden_size, rngs=rngs)
        self.w3 = BlockLinear(config, config.hidden_size, config.mlp_width, rngs=rngs)

    def operands(self, config: DiTConfig, make_linear: MakeLinear) -> dict:
        """The operands of `feed_forward`, from parameters with the depth in front."""
        return {"w13": group(config, [self.w1, self.w3], make_linear), "down": group(config, [self.w2], make_linear)}


class Modulation(BlockLinear):
    """adaLN: a map from the condition to six vectors of width D, starting at zero; TerDiT adds an RMSNorm over 6D."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        super().__init__(config, config.condition_width, 6 * config.hidden_size, zeros, rngs=rngs, bias=True)
        if config.ternary and config.adaln_rms_norm:
            self.norm = RMSNorm(6 * config.hidden_size)

    def operands(self, config: DiTConfig, make_linear: MakeLinear) -> dict:
        """The operands of `modulation`, from parameters with the depth in front."""
        operands: dict[str, Any] = {"linear": group(config, [self], make_linear), "bias": self.bias[...]}
        if config.ternary and config.adaln_rms_norm:
            operands["norm"] = {"scale": self.norm.scale[...]}
        return operands


class Block(nnx.Module):
    """The parameters of one block."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward = FeedForward(config, rngs=rngs)
        self.adaLN_modulation = Modulation(config, rngs=rngs)
        self.attention_norm = RMSNorm(config.hidden_size)
        self.ffn_norm = RMSNorm(config.hidden_size)

    def operands(self, config: DiTConfig, make_linear: MakeLinear) -> dict:
        """The operands of `block`, from parameters with the depth in front."""
        parts = ("attention", "feed_forward", "adaLN_modulation")
        operands = {name: getattr(self, name).operands(config, make_linear) for name in parts}
        return operands | {name: {"scale": getattr(self, name).scale[...]} for name in ("attention_norm", "ffn_norm")}


def feed_forward(operands: dict, x: Array) -> Array:
    """SwiGLU: w2(silu(w1 x) * w3 x), (B, T, D) -> (B, T, D). Source: arXiv 2002.05202."""
    hidden = operands["w13"](x)  # (B, T, 2, mlp_width)
    hidden = jax.nn.silu(hidden[..., 0, :]) * hidden[..., 1, :]
    return operands["down"](constrain(hidden, "batch", "tokens", "mlp"))[..., 0, :]


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
    config: DiTConfig, operands: dict, x: Array, m: Array, rope: Array, implementation: Implementation = "xla"
) -> tuple[Array, dict[str, Array]]:
    """One block.

    Args:
      config: the architecture.
      operands: one layer's, of `Block.operands`.
      x: (B, T, D) residual stream.
      m: (B, 6, D) of `modulation`.
      rope: (2, T, head_dim / 2).
      implementation: of attention.

    Returns:
      The new residual stream, and by name the activations that a training log watches. A caller that drops the
      second pays nothing for it.
    """
    h = modulate(rms_norm(x, operands["attention_norm"]["scale"]), m[:, 0], m[:, 1])
    attended = attention(config, operands["attention"], h, rope, implementation)
    x = constrain(x + m[:, 2, None] * attended, "batch", "tokens", None)
    h = modulate(rms_norm(x, operands["ffn_norm"]["scale"]), m[:, 3], m[:, 4])
    fed = feed_forward(operands["feed_forward"], h)
    x = constrain(x + m[:, 5, None] * fed, "batch", "tokens", None)
    return x, {"attention": attended, "feed_forward": fed, "adaLN_modulation": m, "residual": x}
