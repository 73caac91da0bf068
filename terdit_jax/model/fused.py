"""A block of training whose passes between matmuls are kernels: as `block.block`, each array read and written once.

Forward passes are `kernels.mosaic`'s, backward passes `kernels.backward`'s; each is one differentiable function here,
and on a mesh every device runs it on its own pictures. Where there are no kernels, `block` stands.
"""

from collections.abc import Callable
from functools import partial

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from terdit_jax.kernels import backward, mosaic
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.implementations import attention_implementation
from terdit_jax.parallel.sharding import LOGICAL_TO_MESH, constrain
from terdit_jax.ternary import activations
from terdit_jax.ternary.linear import scale_product


def fused_block(config: DiTConfig, operands: dict, x: Array, m: Array, rope: Array) -> tuple[Array, dict[str, Array]]:
    """One block.

    Args:
      config: the architecture.
      operands: one layer's, of `Block.operands`.
      x: (B, T, D) bfloat16 residual stream.
      m: (B, 6, D) of `block.modulation`.
      rope: (2, T, head_dim / 2).

    Returns:
      As `block.block`, without the modulation.
    """
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (m[:, part].astype(jnp.float32) for part in range(6))
    attention, feed_forward = operands["attention"], operands["feed_forward"]
    norms = attention["q_norm"], attention["k_norm"]
    x, h = norm_modulate(x, operands["attention_norm"]["scale"] * (1 + scale), shift)
    y, y_scale, alphas = attention["qkv"].product(h, quantize)
    q, k, v = queries_keys_values(y.reshape(*y.shape[:2], -1), y_scale, alphas, norms, rope, config.num_heads)
    h = jax.nn.dot_product_attention(q, k, v, implementation=attention_implementation(config)).reshape(x.shape)
    out = attention["out"].product(h, quantize)
    gain = operands["ffn_norm"]["scale"] * (1 + ffn_scale)
    x, h = add_norm_modulate(x, out[0][:, :, 0], out[1], gate * out[2], gain, ffn_shift)
    y, y_scale, alphas = feed_forward["w13"].product(h, quantize)
    h = swiglu(y.reshape(*y.shape[:2], -1), y_scale, alphas)
    fed = scale_product(*feed_forward["down"].product(h, quantize))[:, :, 0]
    added = x.astype(jnp.float32) + ffn_gate[:, None] * fed.astype(jnp.float32)
    x = constrain(added.astype(x.dtype), "batch", "tokens", None)
    return x, {"attention": scale_product(*out)[:, :, 0], "feed_forward": fed, "residual": x}


@jax.custom_vjp
def norm_modulate(x: Array, gain: Array, shift: Array) -> tuple[Array, Array]:
    """x / sqrt(mean(x^2) + 1e-5) * gain + shift behind x itself, so that both gradients of x meet in one pass.

    Args:
      x: (B, T, D) bfloat16.
      gain: (B, D) float32.
      shift: (B, D) float32.

    Returns:
      x and h (B, T, D) bfloat16.
    """
    return _norm_modulate_fwd(x, gain, shift)[0]


def _norm_modulate_fwd(x: Array, gain: Array, shift: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    h = _over_batch(mosaic.norm_modulate)(x, gain, shift)
    return (x, h), (x, gain)


def _norm_modulate_bwd(residuals: tuple[Array, Array], gradients: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    x, gain = residuals
    run = lambda x, gain, *d: backward.add_norm_modulate(x, None, None, None, gain, *d)[::2]  # noqa: E731
    dx, sums = _over_batch(run)(x, gain, *gradients)
    return dx, sums[:, 1], sums[:, 0]


norm_modulate.defvjp(_norm_modulate_fwd, _norm_modulate_bwd)


@jax.custom_vjp
def add_norm_modulate(
    x: Array, y: Array, y_scale: Array | None, gate: Array, gain: Array, shift: Array
) -> tuple[Array, Array]:
    """x' = x + gate y_scale y, and h = x' / sqrt(mean(x'^2) + 1e-5) * gain + shift.

    Args:
      x: (B, T, D) bfloat16.
      y: (B, T, D) bfloat16; what is passed back to it is the gradient of y_scale y.
      y_scale: (B, T) float32, or None.
      gate: (B, D) float32.
      gain: (B, D) float32.
      shift: (B, D) float32.

    Returns:
      x' and h (B, T, D) bfloat16.
    """
    return _add_norm_modulate_fwd(x, y, y_scale, gate, gain, shift)[0]


def _add_norm_modulate_fwd(
    x: Array, y: Array, y_scale: Array | None, gate: Array, gain: Array, shift: Array
) -> tuple[tuple, tuple]:
    def run(x: Array, y: Array, y_scale: Array | None, *vectors: Array) -> tuple[Array, Array]:
        return mosaic.add_norm_modulate(x, y, y_scale, jnp.stack(vectors)[None], jnp.int32(0), "bfloat16")[:2]

    x, h = _over_batch(run)(x, y, y_scale, gate, gain, shift)
    return (x, h), (x, y, y_scale, gate, gain)


def _add_norm_modulate_bwd(residuals: tuple[Array, ...], gradients: tuple[Array, Array]) -> tuple[Array, ...]:
    dx, dy, sums = _over_batch(backward.add_norm_modulate)(*residuals, *gradients)
    return dx, dy, _no_gradient(residuals[2]), sums[:, 2], sums[:, 1], sums[:, 0]


add_norm_modulate.defvjp(_add_norm_modulate_fwd, _add_norm_modulate_bwd)


@jax.custom_vjp
def swiglu(y: Array, y_scale: Array | None, alphas: Array) -> Array:
    """silu(alpha_0 a) alpha_1 b of y_scale y = (a, b).

    Args:
      y: (B, T, 2 F) bfloat16; what is passed back to it is the gradient of y_scale y.
      y_scale: (B, T) float32, or None.
      alphas: (2,) float32; no gradient to them.

    Returns:
      (B, T, F) bfloat16.
    """
    return _swiglu_fwd(y, y_scale, alphas)[0]


def _swiglu_fwd(y: Array, y_scale: Array | None, alphas: Array) -> tuple[Array, tuple]:
    run = lambda *arguments: mosaic.swiglu(*arguments, "bfloat16")[0]  # noqa: E731
    return _over_batch(run, whole=(2,))(y, y_scale, alphas), (y, y_scale, alphas)


def _swiglu_bwd(residuals: tuple, dh: Array) -> tuple[Array, Array | None, Array]:
    dy = _over_batch(backward.swiglu, whole=(2,))(*residuals, dh)
    return dy, *(_no_gradient(leaf) for leaf in residuals[1:])


swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def queries_keys_values(
    y: Array, y_scale: Array | None, alphas: Array, norms: tuple[dict, dict], rope: Array, heads: int
) -> tuple[Array, Array, Array]:
    """Queries and keys behind their layer norm and RoPE, and values, as many heads of each.

    Args:
      y: (B, T, 3 D) bfloat16; what is passed back to it is the gradient of y_scale y.
      y_scale: (B, T) float32, or None.
      alphas: (3,) float32, what y is multiplied by besides; no gradient to them.
      norms: scale and bias (D,) float32 of queries and of keys.
      rope: (2, T, head_dim / 2) float32; no gradient to it.
      heads: their number.

    Returns:
      Three of (B, T, heads, head_dim) bfloat16.
    """
    return _queries_keys_values_fwd(y, y_scale, alphas, norms, rope, heads)[0]


def _queries_keys_values_fwd(
    y: Array, y_scale: Array | None, alphas: Array, norms: tuple, rope: Array, heads: int
) -> tuple[tuple, tuple]:
    arguments = y, y_scale, alphas, norms, rope
    run = partial(mosaic.queries_keys_values, heads=heads)
    return _over_batch(run, whole=(2, 3, 4))(*arguments), arguments


def _queries_keys_values_bwd(heads: int, residuals: tuple, gradients: tuple[Array, ...]) -> tuple:
    run = partial(backward.queries_keys_values, heads=heads)
    dy, sums = _over_batch(run, whole=(2, 3, 4))(*residuals, *gradients)
    q_scale, q_bias, k_scale, k_bias = jnp.sum(sums, axis=0)
    _, y_scale, alphas, _, rope = residuals
    norms = {"scale": q_scale, "bias": q_bias}, {"scale": k_scale, "bias": k_bias}
    return dy, _no_gradient(y_scale), _no_gradient(alphas), norms, _no_gradient(rope)


queries_keys_values.defvjp(_queries_keys_values_fwd, _queries_keys_values_bwd)


def quantize(h: Array, dtype: DTypeLike, num_axes: int = 1) -> tuple[Array, Array]:
    """As `ternary.activations.quantize` of (B, T, in) or, with two axes, (B, T, n, out) bfloat16."""
    if jnp.dtype(dtype) == jnp.int8:
        return activations.quantize(h, dtype, num_axes)
    rows = h.reshape(*h.shape[:-num_axes], -1)
    made, scale = _over_batch(lambda rows: backward.quantize(rows, dtype))(rows)
    return made.reshape(h.shape), scale


def _no_gradient(leaf: Array | None) -> Array | None:
    return None if leaf is None else jnp.zeros_like(leaf)


def _over_batch(run: Callable, whole: tuple[int, ...] = ()) -> Callable:
    """The function run by every device of the mesh in context on its part of the leading axis of arguments and results;
    arguments numbered in `whole` are the same on all. Compilers cannot cut kernels themselves."""

    def call(*arguments):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return run(*arguments)
        batch = PartitionSpec(LOGICAL_TO_MESH["batch"])
        specs = tuple(PartitionSpec() if place in whole else batch for place in range(len(arguments)))
        return jax.shard_map(run, in_specs=specs, out_specs=batch, check_vma=False)(*arguments)

    return call
