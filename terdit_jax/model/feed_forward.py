"""The two feed-forwards: SwiGLU of Large-DiT and TerDiT, GELU of DiT.

`block` adds the result to the residual stream.
"""

from flax import nnx
import jax
from jax import Array

from terdit_jax.model.config import DiTConfig
from terdit_jax.model.layers import BlockLinear, MakeLinear, apply, group
from terdit_jax.parallel.sharding import constrain


class SwiGLU(nnx.Module):
    """w1 and w3 (mlp_width, D), w2 (D, mlp_width)."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.w1 = BlockLinear(config, config.hidden_size, config.mlp_width, rngs=rngs)
        self.w2 = BlockLinear(config, config.mlp_width, config.hidden_size, rngs=rngs)
        self.w3 = BlockLinear(config, config.hidden_size, config.mlp_width, rngs=rngs)

    def operands(self, config: DiTConfig, make_linear: MakeLinear) -> dict:
        """The operands of `swiglu`, from parameters with the depth in front."""
        return group(config, {"w13": [self.w1, self.w3], "down": [self.w2]}, make_linear)


class MLP(nnx.Module):
    """fc1 (mlp_width, D) and fc2 (D, mlp_width), with biases."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.fc1 = BlockLinear(config, config.hidden_size, config.mlp_width, rngs=rngs, bias=True)
        self.fc2 = BlockLinear(config, config.mlp_width, config.hidden_size, rngs=rngs, bias=True)

    def operands(self, config: DiTConfig, make_linear: MakeLinear) -> dict:
        """The operands of `mlp`, from parameters with the depth in front."""
        return group(config, {"up": [self.fc1], "down": [self.fc2]}, make_linear)


def feed_forward(config: DiTConfig, operands: dict, x: Array) -> Array:
    """The family's feed-forward, (B, T, D) -> (B, T, D)."""
    return mlp(operands, x) if config.traits.feed_forward == "gelu" else swiglu(operands, x)


def swiglu(operands: dict, x: Array) -> Array:
    """w2(silu(w1 x) * w3 x). Source: arXiv 2002.05202."""
    hidden = operands["w13"](x)  # (B, T, 2, mlp_width)
    hidden = jax.nn.silu(hidden[..., 0, :]) * hidden[..., 1, :]
    return operands["down"](constrain(hidden, "batch", "tokens", "mlp"))[..., 0, :]


def mlp(operands: dict, x: Array) -> Array:
    """fc2(gelu(fc1 x)) with the tanh approximation. Source: DiT (arXiv 2212.09748)."""
    hidden = jax.nn.gelu(apply(operands, "up", x)[..., 0, :], approximate=True)
    return apply(operands, "down", constrain(hidden, "batch", "tokens", "mlp"))[..., 0, :]
