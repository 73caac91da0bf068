"""One transformer block: adaLN modulation, attention and SwiGLU feed-forward, each gated into the residual stream.

Stacking and scanning blocks is `transformer`'s.
"""

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from terdit_jax.model.attention import Attention, attention
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.fused import fused_block
from terdit_jax.model.implementations import has_fused_passes
from terdit_jax.model.layers import BlockLinear, RMSNorm, group_operand, rms_norm, zeros
from terdit_jax.parallel.sharding import constrain
from terdit_jax.ternary.linear import SAME, PackedLinear


class FeedForward(nnx.Module):
    """w1 and w3 (mlp_width, D), w2 (D, mlp_width)."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.w1 = BlockLinear(config, config.hidden_size, config.mlp_width, rngs=rngs)
        self.w2 = BlockLinear(config, config.mlp_width, config.hidden_size, rngs=rngs)
        self.w3 = BlockLinear(config, config.hidden_size, config.mlp_width, rngs=rngs)

    def operands(self, config: DiTConfig, packed: bool) -> dict:
        """What `feed_forward` reads, from parameters with the depth in front."""
        return {
            "w13": group_operand(config, [self.w1, self.w3], packed=packed),
            "down": group_operand(config, [self.w2], packed=packed),
        }


class Modulation(BlockLinear):
    """adaLN: a map from the condition to six vectors of width D, starting at zero; TerDiT adds an RMSNorm over 6D."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        super().__init__(config, config.condition_width, 6 * config.hidden_size, zeros, rngs=rngs, bias=True)
        if config.ternary and config.adaln_rms_norm:
            self.norm = RMSNorm(6 * config.hidden_size)

    def operands(self, config: DiTConfig, packed: bool) -> dict:
        """What `modulation` reads, from parameters with the depth in front."""
        # A row a picture: nothing to gain from 8 bits, and every token would feel their rounding.
        linear = group_operand(config, [self], packed=packed, matmul_dtype=SAME)
        operands = {"linear": linear, "bias": self.bias[...]}
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

    def operands(self, config: DiTConfig, packed: bool) -> dict:
        """What `block` reads, from parameters with the depth in front."""
        parts = ("attention", "feed_forward", "adaLN_modulation")
        operands = {name: getattr(self, name).operands(config, packed) for name in parts}
        return operands | {name: {"scale": getattr(self, name).scale[...]} for name in ("attention_norm", "ffn_norm")}


def feed_forward(operands: dict, x: Array) -> Array:
    """SwiGLU: w2(silu(w1 x) * w3 x), (B, T, D) -> (B, T, D). Source: arXiv 2002.05202."""
    hidden = operands["w13"](x)  # (B, T, 2, mlp_width)
    hidden = jax.nn.silu(hidden[..., 0, :]) * hidden[..., 1, :]
    return operands["down"](constrain(hidden, "batch", "tokens", "mlp"))[..., 0, :]


def modulation(operands: dict, y: Array) -> Array:
    """y (B, 1, 6 D), what the linear map makes of the condition -> (B, 6, D): shift, scale and gate of attention, then
    of the feed-forward."""
    out = y[:, 0].astype(jnp.float32) + operands["bias"]
    if "norm" in operands:
        out = rms_norm(out, operands["norm"]["scale"])
    return constrain(out.astype(y.dtype).reshape(y.shape[0], 6, -1), "batch", None, None)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """x (B, T, D), shift and scale (B, D) -> x * (1 + scale) + shift."""
    return x * (1 + scale[:, None]) + shift[:, None]


def block(config: DiTConfig, operands: dict, x: Array, m: Array, rope: Array) -> tuple[Array, dict[str, Array]]:
    """One block.

    Args:
      config: the architecture.
      operands: one layer's, of `Block.operands`.
      x: (B, T, D) residual stream.
      m: (B, 6, D) of `modulation`.
      rope: (2, T, head_dim / 2).

    Returns:
      The new residual stream, and the activations a training log watches, by kind. A caller that drops the second
      pays nothing for it.
    """
    if has_fused_passes(config) and not isinstance(operands["attention"]["qkv"], PackedLinear):
        x, kinds = fused_block(config, operands, x, m, rope)
        return x, kinds | {"adaLN_modulation": m}
    attended = attention(
        config,
        operands["attention"],
        modulate(rms_norm(x, operands["attention_norm"]["scale"]), m[:, 0], m[:, 1]),
        rope,
    )
    x = constrain(x + m[:, 2, None] * attended, "batch", "tokens", None)
    fed = feed_forward(operands["feed_forward"], modulate(rms_norm(x, operands["ffn_norm"]["scale"]), m[:, 3], m[:, 4]))
    x = constrain(x + m[:, 5, None] * fed, "batch", "tokens", None)
    return x, {"attention": attended, "feed_forward": fed, "adaLN_modulation": m, "residual": x}
