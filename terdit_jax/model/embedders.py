"""Everything that enters or leaves the transformer: patches, timesteps, labels, positions and the final layer.

All of it is full precision in every model, as published; the blocks between live in `block`.
"""

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from terdit_jax.model.config import DiTConfig
from terdit_jax.model.layers import Linear, layer_norm, linear, normal_002, xavier_uniform, zeros

FREQUENCY_WIDTH = 256
MAX_PERIOD = 10_000.0


class TimestepEmbedder(nnx.Module):
    """Two linear maps with a SiLU between them, on the timestep's sinusoids."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.mlp_in = Linear(FREQUENCY_WIDTH, width, normal_002, rngs=rngs)
        self.mlp_out = Linear(width, width, normal_002, rngs=rngs)


class LabelEmbedder(nnx.Module):
    """A row a class, and a last one for the null class that guidance subtracts."""

    def __init__(self, num_classes: int, width: int, *, rngs: nnx.Rngs):
        self.embedding_table = nnx.Param(normal_002(rngs.params(), (num_classes + 1, width), jnp.float32))


class FinalLayer(nnx.Module):
    """A two-way adaLN and the map from a token to its patch of the output's channels; both start at zero."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        out_features = config.patch_size**2 * config.out_channels
        self.adaLN_modulation = Linear(config.condition_width, 2 * config.hidden_size, zeros, rngs=rngs)
        self.linear = Linear(config.hidden_size, out_features, zeros, rngs=rngs)


def patch_embedder(config: DiTConfig, *, rngs: nnx.Rngs) -> Linear:
    """The map from a patch vector, ordered (C, pH, pW), to a token."""
    return Linear(config.patch_size**2 * config.in_channels, config.hidden_size, xavier_uniform, rngs=rngs)


def patchify(x: Array, patch_size: int) -> Array:
    """(B, H, W, C) -> (B, T, C * p * p): row-major patches, ordered (C, pH, pW) as the published weights expect."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // patch_size, patch_size, W // patch_size, patch_size, C)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(B, -1, C * patch_size**2)


def embed(config: DiTConfig, operands: dict[str, Array], x_t: Array) -> Array:
    """x_t (B, H, W, C) -> tokens (B, T, D) in the activations' dtype, with absolute positions if the model has them."""
    x = linear(patchify(x_t, config.patch_size), operands, config.activation_dtype)
    if config.positions != "rope_1d":
        x = x + sincos_2d_table(config.grid_size, config.hidden_size)
    return x.astype(config.activation_dtype)


def unpatchify(x: Array, grid_size: int, patch_size: int) -> Array:
    """(B, T, p * p * C) with patches ordered (pH, pW, C) -> (B, H, W, C)."""
    B = x.shape[0]
    x = x.reshape(B, grid_size, grid_size, patch_size, patch_size, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, grid_size * patch_size, grid_size * patch_size, -1)


def timestep_frequencies(t: Array) -> Array:
    """(B,) timesteps -> (B, 256): cosines, then sines, of t times 1e4^(-i / 128). Source: DiT's TimestepEmbedder."""
    half = FREQUENCY_WIDTH // 2
    angles = t.astype(jnp.float32)[:, None] * np.exp(-np.log(MAX_PERIOD) * np.arange(half) / half).astype(np.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def condition(operands: dict, t: Array, y: Array) -> Array:
    """t (B,), y (B,) -> SiLU(t_embed + y_embed), (B, condition_width) float32; the adaLN linears read only this.

    In float32: B rows cost nothing beside B * T, and every modulation depends on it.
    """
    t_embedder = operands["t_embedder"]
    hidden = jax.nn.silu(linear(timestep_frequencies(t), t_embedder["mlp_in"]))
    return jax.nn.silu(linear(hidden, t_embedder["mlp_out"]) + operands["y_embedder"]["embedding_table"][y])


def final_layer(operands: dict, x: Array, c: Array) -> Array:
    """x (B, T, D), c (B, C') -> (B, T, p * p * out_channels) float32: layer norm without affine, modulate, project."""
    shift, scale = jnp.split(linear(c, operands["adaLN_modulation"]), 2, axis=-1)
    normed = layer_norm(x, eps=1e-6).astype(jnp.float32)
    return linear(normed * (1 + scale[:, None]) + shift[:, None], operands["linear"], x.dtype)


def rope_table(num_tokens: int, head_dim: int) -> np.ndarray:
    """(2, T, head_dim / 2) float32: cosine and sine of token index * 1e4^(-2i / head_dim).

    Source: RoFormer (arXiv 2104.09864); TerDiT applies it over the row-major token index.
    """
    frequencies = MAX_PERIOD ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles = np.outer(np.arange(num_tokens), frequencies)
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def sincos_2d_table(grid_size: int, width: int) -> np.ndarray:
    """(T, width) float32 absolute positions: a quarter each of sin and cos of the column, then of the row.

    Source: DiT (arXiv 2212.09748), after MAE. With few tokens 1-D RoPE alone leaves a model unable to place strokes.
    """
    frequencies = MAX_PERIOD ** (-np.arange(width // 4, dtype=np.float64) / (width / 4))
    rows, columns = np.mgrid[:grid_size, :grid_size].reshape(2, -1)
    waves = [wave(np.outer(place, frequencies)) for place in (columns, rows) for wave in (np.sin, np.cos)]
    return np.concatenate(waves, axis=1).astype(np.float32)
