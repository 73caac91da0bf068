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
from terdit_jax.kernels.mosaic import Kinds
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.implementations import attention_implementation
from terdit_jax.parallel.sharding import LOGICAL_TO_MESH, constrain
from terdit_jax.ternary.activations import Rows
from terdit_jax.ternary.linear import as_operand, scale_product, scaled

EIGHT = "float8_e4m3fn"  # dtype of 8 bits that kernels round to


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
    eight, apart = EIGHT if config.matmul_dtype == EIGHT else None, config.remat == "dots"
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (m[:, part].astype(jnp.float32) for part in range(6))
    attention, feed_forward = operands["attention"], operands["feed_forward"]
    norms = attention["q_norm"], attention["k_norm"]
    x, h = norm_modulate(x, operands["attention_norm"]["scale"] * (1 + scale), shift, eight, apart)
    y, alphas = attention["qkv"].product(h)
    q, k, v = queries_keys_values(y, alphas, norms, rope, config.num_heads)
    h = jax.nn.dot_product_attention(q, k, v, implementation=attention_implementation(config)).reshape(x.shape)
    attended, out_alpha = attention["out"].product(as_rows(h, eight))
    gain = operands["ffn_norm"]["scale"] * (1 + ffn_scale)
    x, h = add_norm_modulate(x, attended, gate * out_alpha, gain, ffn_shift)
    y, alphas = feed_forward["w13"].product(h)
    fed, down_alpha = feed_forward["down"].product(swiglu(y, alphas, apart))
    x = constrain(add_gated(x, fed, ffn_gate * down_alpha), "batch", "tokens", None)
    # Watched only: gradients of `Rows` must come from one reader.
    attended, fed = jax.lax.stop_gradient((attended, fed))
    kinds = {"attention": scale_product(attended, out_alpha), "feed_forward": scale_product(fed, down_alpha)}
    return x, {name: a[:, :, 0] for name, a in kinds.items()} | {"residual": x}


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def norm_modulate(
    x: Array, gain: Array, shift: Array, eight: DTypeLike | None = None, apart: bool = False
) -> tuple[Array, Rows]:
    """x / sqrt(mean(x^2) + 1e-5) * gain + shift behind x itself, so that both gradients of x meet in one pass.

    Args:
      x: (B, T, D) bfloat16.
      gain: (B, D) float32.
      shift: (B, D) float32.
      eight: dtype of 8 bits in which h is also to be, if at all.
      apart: as of `_make_rows`.

    Returns:
      x, and the operand h (B, T, D), bfloat16.
    """
    return _norm_modulate_fwd(x, gain, shift, eight, apart)[0]


def _norm_modulate_fwd(
    x: Array, gain: Array, shift: Array, eight: DTypeLike | None, apart: bool
) -> tuple[tuple[Array, Rows], tuple[Array, Array]]:
    make = lambda kinds: _over_batch(partial(mosaic.norm_modulate, kinds=kinds))(x, gain, shift)  # noqa: E731
    return (x, _make_rows(make, eight, apart)), (x, gain)


def _norm_modulate_bwd(_, __, residuals: tuple, gradients: tuple[Array, Rows]) -> tuple[Array, Array, Array]:
    dx, dh = gradients
    run = lambda x, gain, *d: backward.add_norm_modulate(x, None, None, None, gain, *d)  # noqa: E731
    dx, *_, sums = _over_batch(run)(*residuals, dx, dh.values, dh.scale)
    return dx, sums[:, 1], sums[:, 0]


norm_modulate.defvjp(_norm_modulate_fwd, _norm_modulate_bwd)


@jax.custom_vjp
def add_norm_modulate(x: Array, y: Rows, gate: Array, gain: Array, shift: Array) -> tuple[Array, Rows]:
    """x' = x + gate y, and h = x' / sqrt(mean(x'^2) + 1e-5) * gain + shift.

    Args:
      x: (B, T, D) bfloat16.
      y: (B, T, 1, D) bfloat16 product.
      gate: (B, D) float32.
      gain: (B, D) float32.
      shift: (B, D) float32.

    Returns:
      x', and the operand h (B, T, D), bfloat16.
    """
    return _add_norm_modulate_fwd(x, y, gate, gain, shift)[0]


def _add_norm_modulate_fwd(x: Array, y: Rows, gate: Array, gain: Array, shift: Array) -> tuple[tuple, tuple]:
    def run(x: Array, y: Array, y_scale: Array | None, *vectors: Array) -> tuple[Array | None, ...]:
        kinds = Kinds(True, eight)
        return mosaic.add_norm_modulate(x, y, y_scale, jnp.stack(vectors)[None], jnp.int32(0), kinds)

    eight = _eight(y)
    x, *h = _over_batch(run)(x, _flat(y), y.scale, gate, gain, shift)
    return (x, Rows(*h)), (x, y.kept(y.scale), gate, gain)


def _add_norm_modulate_bwd(residuals: tuple, gradients: tuple[Array, Rows]) -> tuple[Array | Rows, ...]:
    x, y, gate, gain = residuals
    dx, dh = gradients
    run = partial(backward.add_norm_modulate, eight=_eight(y))
    dx, *dy, sums = _over_batch(run)(x, _flat(y), y.scale, gate, gain, dx, dh.values, dh.scale)
    return dx, as_operand(y, *dy), sums[:, 2], sums[:, 1], sums[:, 0]


add_norm_modulate.defvjp(_add_norm_modulate_fwd, _add_norm_modulate_bwd)


@jax.custom_vjp
def add_gated(x: Array, y: Rows, gate: Array) -> Array:
    """x + gate y: x (B, T, D) bfloat16, y (B, T, 1, D) bfloat16 product, gate (B, D) float32 -> (B, T, D) bfloat16."""
    values = _flat(y).astype(jnp.float32)
    if y.scale is not None:
        values = values * y.scale[..., None]
    return (x.astype(jnp.float32) + gate[:, None] * values).astype(x.dtype)


def _add_gated_bwd(residuals: tuple[Rows, Array], dx: Array) -> tuple[Array, Rows, Array]:
    y, gate = residuals
    *dy, dgate = _over_batch(partial(backward.add_gated, eight=_eight(y)))(_flat(y), y.scale, gate, dx)
    return dx, as_operand(y, *dy), dgate


add_gated.defvjp(lambda x, y, gate: (add_gated(x, y, gate), (y.kept(y.scale), gate)), _add_gated_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def swiglu(y: Rows, alphas: Array, apart: bool = False) -> Rows:
    """silu(alpha_0 a) alpha_1 b of y = (a, b).

    Args:
      y: (B, T, 2, F) bfloat16 product.
      alphas: (2,) float32; no gradient to them.
      apart: as of `_make_rows`.

    Returns:
      An operand (B, T, F), bfloat16.
    """
    return _swiglu_fwd(y, alphas, apart)[0]


def _swiglu_fwd(y: Rows, alphas: Array, apart: bool) -> tuple[Rows, tuple[Rows, Array]]:
    make = lambda kinds: _over_batch(partial(mosaic.swiglu, dtype=kinds), whole=(2,))(_flat(y), y.scale, alphas)  # noqa: E731
    return _make_rows(make, _eight(y), apart), (y.kept(y.scale), alphas)


def _swiglu_bwd(_, residuals: tuple[Rows, Array], dh: Rows) -> tuple[Rows, Array]:
    y, alphas = residuals
    run = partial(backward.swiglu, eight=_eight(y))
    dy = _over_batch(run, whole=(2,))(_flat(y), y.scale, alphas, dh.values, dh.scale)
    return as_operand(y, *dy), jnp.zeros_like(alphas)


swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def queries_keys_values(
    y: Rows, alphas: Array, norms: tuple[dict, dict], rope: Array, heads: int
) -> tuple[Array, Array, Array]:
    """Queries and keys behind their layer norm and RoPE, and values, as many heads of each.

    Args:
      y: (B, T, 3, D) bfloat16 product.
      alphas: (3,) float32, what y is multiplied by besides; no gradient to them.
      norms: scale and bias (D,) float32 of queries and of keys.
      rope: (2, T, head_dim / 2) float32; no gradient to it.
      heads: their number.

    Returns:
      Three of (B, T, heads, head_dim) bfloat16.
    """
    return _queries_keys_values_fwd(y, alphas, norms, rope, heads)[0]


def _queries_keys_values_fwd(y: Rows, alphas: Array, norms: tuple, rope: Array, heads: int) -> tuple[tuple, tuple]:
    run = partial(mosaic.queries_keys_values, heads=heads)
    made = _over_batch(run, whole=(2, 3, 4))(_flat(y), y.scale, alphas, norms, rope)
    return made, (y.kept(y.scale), alphas, norms, rope)


def _queries_keys_values_bwd(heads: int, residuals: tuple, gradients: tuple[Array, ...]) -> tuple:
    y, alphas, norms, rope = residuals
    run = partial(backward.queries_keys_values, heads=heads, eight=_eight(y))
    *dy, sums = _over_batch(run, whole=(2, 3, 4))(_flat(y), y.scale, alphas, norms, rope, *gradients)
    q_scale, q_bias, k_scale, k_bias = jnp.sum(sums, axis=0)
    norms = {"scale": q_scale, "bias": q_bias}, {"scale": k_scale, "bias": k_bias}
    return as_operand(y, *dy), jnp.zeros_like(alphas), norms, jnp.zeros_like(rope)


queries_keys_values.defvjp(_queries_keys_values_fwd, _queries_keys_values_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def as_rows(h: Array, eight: DTypeLike | None) -> Rows:
    """The operand h (B, T, D) bfloat16 of another's making, in 8 bits too if asked for, by a pass of its own, as is
    its gradient's scaling."""
    return Rows(h) if eight is None else Rows(h, *_over_batch(partial(mosaic.quantize, dtype=eight))(h))


as_rows.defvjp(
    lambda h, eight: (as_rows(h, eight), None),
    lambda eight, _, dh: (dh.values if dh.scale is None else scaled(dh.values, dh.scale, dh.values.dtype),),
)


def _flat(y: Rows) -> Array:
    """The values of all maps of a token side by side, (B, T, n, out) -> (B, T, n out)."""
    return y.values.reshape(*y.values.shape[:2], -1)


def _eight(y: Rows) -> DTypeLike | None:
    return None if y.eight is None else y.eight.dtype


def _make_rows(make: Callable, eight: DTypeLike | None, apart: bool) -> Rows:
    """The rows that make(kinds) makes: of both kinds at once or, `apart`, of each by a kernel of its own.

    Where matmuls' results are kept and passes rematerialised (`config.remat` "dots"), the forward pass reads rows in 8
    bits alone, the backward pass rows in bfloat16: of two kernels the compiler drops the one whose rows nobody reads.
    """
    if eight is None or not apart:
        return Rows(*make(Kinds(True, eight)))
    return Rows(make(Kinds(True, None))[0], *make(Kinds(False, eight))[1:])


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
