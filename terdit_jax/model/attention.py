"""Bidirectional self-attention: with biases (DiT), or with 1-D RoPE, optional qk-norm and grouped kv heads.

Owns the four projections and the two norms; `block` adds the result to the residual stream.
"""

from typing import Any, Literal

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from terdit_jax.model.config import DiTConfig
from terdit_jax.model.layers import BlockLinear, LayerNorm, MakeLinear, apply, group, layer_norm
from terdit_jax.parallel.sharding import constrain

Implementation = Literal["xla", "cudnn"]  # of `jax.nn.dot_product_attention`


class Attention(nnx.Module):
    """wq (D, D), wk and wv (kv_width, D), wo (D, D), and norms over the full projected widths."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        width, kv_width, bias = config.hidden_size, config.kv_width, config.traits.biases
        self.wq = BlockLinear(config, width, width, rngs=rngs, bias=bias)
        self.wk = BlockLinear(config, width, kv_width, rngs=rngs, bias=bias)
        self.wv = BlockLinear(config, width, kv_width, rngs=rngs, bias=bias)
        self.wo = BlockLinear(config, width, width, rngs=rngs, bias=bias)
        if config.qk_norm:
            self.q_norm = LayerNorm(width)
            self.k_norm = LayerNorm(kv_width)

    def operands(self, config: DiTConfig, make_linear: MakeLinear) -> dict:
        """The operands of `attention`, from parameters with the depth in front."""
        maps = {"qkv": [self.wq, self.wk, self.wv], "out": [self.wo]}
        operands: dict[str, Any] = group(config, maps, make_linear)
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                norm = getattr(self, name)
                operands[name] = {"scale": norm.scale[...], "bias": norm.bias[...]}
        return operands


def attention(
    config: DiTConfig, operands: dict, x: Array, rope: Array | None, implementation: Implementation = "xla"
) -> Array:
    """Self-attention over all tokens.

    Args:
      config: the architecture.
      operands: one layer's, of `Attention.operands`.
      x: (B, T, D).
      rope: (2, T, head_dim / 2) of `rope_table`; None in DiT.
      implementation: of `jax.nn.dot_product_attention`, "xla" or "cudnn".

    Returns:
      (B, T, D) in x's dtype.
    """
    B, T, D = x.shape
    kv_heads, head_dim, repeats = config.num_kv_heads, config.head_dim, config.num_heads // config.num_kv_heads
    qkv = apply(operands, "qkv", x)  # (B, T, repeats + 2, kv_width)
    q, k, v = qkv[..., :repeats, :], qkv[..., -2, :], qkv[..., -1, :]
    # Back to the published head order (kv head, repeat, head_dim).
    q = q.reshape(B, T, repeats, kv_heads, head_dim).swapaxes(2, 3).reshape(B, T, D)
    if config.qk_norm:
        q = layer_norm(q, **operands["q_norm"])
        k = layer_norm(k, **operands["k_norm"])
    q, k, v = (a.reshape(B, T, -1, head_dim) for a in (q, k, v))
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)
    q, k, v = (constrain(a, "batch", "tokens", "heads", None) for a in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, implementation=implementation)
    return apply(operands, "out", out.reshape(B, T, D))[..., 0, :]


def rotate(x: Array, rope: Array) -> Array:
    """Rotates interleaved pairs (2i, 2i + 1) of (B, T, heads, head_dim) by the token's angles, in float32 (bf16 angles
    cannot tell neighbouring positions apart)."""
    cos, sin = rope[0][:, None], rope[1][:, None]  # (T, 1, head_dim / 2)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
