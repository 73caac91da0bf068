"""A block under training with kernels between its matmuls; equals `model.block.block`.

One custom_vjp holds the whole block. The forward pass names what the backward pass reads; the backward pass is written
out, step by step in reverse. Between matmuls, each array is read and written once. Matmuls with ternary matrices take
activations in bfloat16, or in 8 bits with a scale a token; weight gradients always take bfloat16. Kernels live in
`hopper`. On a mesh every device runs them on its own images.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from terdit_jax.fast.eight_bit import SAME, apply_scale, multiply, multiply_transposed
from terdit_jax.fast.hopper import backward, forward
from terdit_jax.fast.hopper.forward import Stored
from terdit_jax.fast.linear import FastLinear, linear_gradient, whole_weight, without_sink
from terdit_jax.model.attention import Implementation
from terdit_jax.model.config import DiTConfig
from terdit_jax.parallel.sharding import LOGICAL_TO_MESH, constrain
from terdit_jax.ternary.linear import FullLinear, TernaryLinear, code_product, input_gradient, scale_product

EIGHT_BIT = "float8_e4m3fn"  # the dtype of 8 bits that kernels round to

_Map = FullLinear | TernaryLinear | FastLinear


class _Static(NamedTuple):
    """heads: of queries, keys and values alike. attention: implementation. matmul_dtype: EIGHT_BIT, or None for
    bfloat16. recompute: whether the backward pass makes anew what kernels and not matmuls have made."""

    heads: int
    attention: Implementation
    matmul_dtype: str | None
    recompute: bool


class _Rows(NamedTuple):
    """Activations on their way into a matmul, (B, T, W): in bfloat16 (None where only 8 bits are
    read), and in 8 bits with a scale (B, T), or None."""

    bfloat16: Any
    rounded: Array | None = None
    scale: Array | None = None


class _Product(NamedTuple):
    """The result of a matmul, (B, T, n out) bfloat16, still to be multiplied by scale (B, T), if there is one."""

    values: Array
    scale: Array | None


class _Kept(NamedTuple):
    """The residuals beside the arguments: products, attention's output, and what `_between` makes."""

    qkv: _Product
    attended: Array
    attention_residuals: Any
    out: _Product
    w13: _Product
    down: _Product
    between: "_Between | None"


class _Between(NamedTuple):
    """Made by kernels from products and the block's input: inputs of matmuls in bfloat16 (`h_qkv`, `h_w13`, `h_down`),
    queries, keys and values (B, T, heads, head_dim), and the residual stream after attention."""

    h_qkv: Array
    q_k_v: tuple[Array, Array, Array]
    x: Array
    h_w13: Array
    h_down: Array


def fused_block(
    config: DiTConfig,
    matmul_dtype: str,
    attention: Implementation,
    operands: dict,
    x: Array,
    m: Array,
    rope: Array | None,
) -> Array:
    """Runs one block; differentiable with respect to operands, x and m.

    Args:
      config: the architecture.
      matmul_dtype: "same" or EIGHT_BIT.
      attention: implementation of `jax.nn.dot_product_attention`.
      operands: one layer's, of `Block.operands`.
      x: (B, T, D) bfloat16 residual stream.
      m: (B, 6, D) of `block.modulation`.
      rope: (2, T, head_dim / 2).

    Returns:
      The new residual stream.
    """
    return _block(*_arguments(config, matmul_dtype, attention, operands, x, m, rope))


def fused_activations(
    config: DiTConfig,
    matmul_dtype: str,
    attention: Implementation,
    operands: dict,
    x: Array,
    m: Array,
    rope: Array | None,
) -> tuple[Array, dict[str, Array]]:
    """Runs one block as `fused_block` does and returns the activations of `block.block` too; without a gradient."""
    arguments = _arguments(config, matmul_dtype, attention, operands, x, m, rope)
    x, kept = _block_fwd(*arguments)
    products = {"attention": (kept[-1].out, "out"), "feed_forward": (kept[-1].down, "down")}
    activations = {}
    for name, (product, which) in products.items():
        values = apply_scale(product.values, product.scale, product.values.dtype)
        activations[name] = scale_product(values[:, :, None], _alphas(arguments[2][which]))[:, :, 0]
    return x, activations | {"residual": x}


def _arguments(
    config: DiTConfig,
    matmul_dtype: str,
    attention: Implementation,
    operands: dict,
    x: Array,
    m: Array,
    rope: Array | None,
) -> tuple:
    static = _Static(config.num_heads, attention, None if matmul_dtype == SAME else EIGHT_BIT, config.remat == "dots")
    attention_maps, ffn_maps = operands["attention"], operands["feed_forward"]
    maps = {name: attention_maps[name] for name in ("qkv", "out")} | {name: ffn_maps[name] for name in ("w13", "down")}
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (m[:, part].astype(jnp.float32) for part in range(6))
    vectors = {
        "gain": operands["attention_norm"]["scale"] * (1 + scale),
        "shift": shift,
        "gate": gate * _alphas(maps["out"]),
        "ffn_gain": operands["ffn_norm"]["scale"] * (1 + ffn_scale),
        "ffn_shift": ffn_shift,
        "ffn_gate": ffn_gate * _alphas(maps["down"]),
    }
    return static, x, maps, vectors, (attention_maps["q_norm"], attention_maps["k_norm"]), rope


def _alphas(linear: _Map) -> Array:
    """(n,) float32, detached: `ternarize` computes alpha's gradient."""
    if isinstance(linear, FullLinear):
        return jnp.ones(linear.weight.shape[0], jnp.float32)
    return jax.lax.stop_gradient(linear.alpha)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(
    static: _Static,
    x: Array,
    maps: dict[str, _Map],
    vectors: dict[str, Array],
    norms: tuple[dict, dict],
    rope: Array | None,
) -> Array:
    """The block of x (B, T, D); vectors (B, D) float32 hold norms' gains, shifts and gates, alphas included."""
    return _block_fwd(static, x, maps, vectors, norms, rope)[0]


def _block_fwd(
    static: _Static,
    x: Array,
    maps: dict[str, _Map],
    vectors: dict[str, Array],
    norms: tuple[dict, dict],
    rope: Array | None,
) -> tuple[Array, tuple]:
    start, dtype = x, static.matmul_dtype
    # With 8 bits and recomputation, the forward pass needs rows in 8 bits alone, the backward pass in bfloat16 alone.
    stored = Stored(dtype is None or not static.recompute, dtype)
    h_qkv = _Rows(*_over_batch(partial(forward.norm_modulate, stored=stored))(x, vectors["gain"], vectors["shift"]))
    qkv = _multiply(h_qkv, maps["qkv"])
    q_k_v = _queries_keys_values(static, qkv, maps, norms, rope)
    attended, attention_residuals = _attend(static, q_k_v)
    h = _Rows(attended, *(_over_batch(partial(forward.quantize, dtype=dtype))(attended) if dtype else ()))
    out = _multiply(h, maps["out"])
    x, h_w13 = _add_norm_modulate(x, out, vectors, stored)
    w13 = _multiply(h_w13, maps["w13"])
    h_down = _swiglu(w13, maps, stored)
    down = _multiply(h_down, maps["down"])
    between = None
    if not static.recompute:
        between = _Between(h_qkv.bfloat16, q_k_v, x, h_w13.bfloat16, h_down.bfloat16)
    kept = _Kept(qkv, attended, attention_residuals, out, w13, down, between)
    gated = vectors["ffn_gate"][:, None] * apply_scale(down.values.astype(jnp.float32), down.scale, jnp.float32)
    x = constrain((x.astype(jnp.float32) + gated).astype(x.dtype), "batch", "tokens", None)
    return x, (start, {name: without_sink(linear) for name, linear in maps.items()}, vectors, norms, rope, kept)


def _block_bwd(static: _Static, residuals: tuple, dx: Array) -> tuple:
    if static.recompute:
        # Without a barrier the compiler would keep what the forward pass made instead of making it anew.
        residuals, dx = jax.lax.optimization_barrier((residuals, dx))
    start, maps, vectors, norms, rope, kept = residuals
    dtype, dvectors, dmaps = static.matmul_dtype, {}, {}
    between = kept.between or _between(static, *residuals)

    run = partial(backward.add_gated, eight=dtype)
    *d, sums = _over_batch(run)(*kept.down, vectors["ffn_gate"], dx)
    dvectors["ffn_gate"] = sums[:, 0]
    dh, dh_scale, dmaps["down"] = _multiply_backward(_Rows(*d), maps["down"], between.h_down)

    run, alphas = partial(backward.swiglu, eight=dtype), _alphas(maps["w13"])
    d = _over_batch(run, whole=(2,))(*kept.w13, alphas, dh, dh_scale)
    dh, dh_scale, dmaps["w13"] = _multiply_backward(_Rows(*d), maps["w13"], between.h_w13)

    run = partial(backward.add_norm_modulate, eight=dtype)
    dx, *d, sums = _over_batch(run)(between.x, *kept.out, vectors["gate"], vectors["ffn_gain"], dx, dh, dh_scale)
    dvectors |= {"ffn_shift": sums[:, 0], "ffn_gain": sums[:, 1], "gate": sums[:, 2]}
    dh, dh_scale, dmaps["out"] = _multiply_backward(_Rows(*d), maps["out"], kept.attended)

    dq_k_v = _attend_backward(static, between.q_k_v, kept.attention_residuals, apply_scale(dh, dh_scale, dh.dtype))
    run, alphas = partial(backward.queries_keys_values, heads=static.heads, eight=dtype), _alphas(maps["qkv"])
    *d, sums = _over_batch(run, whole=(2, 3, 4))(*kept.qkv, alphas, norms, rope, *dq_k_v)
    q_scale, q_bias, k_scale, k_bias = jnp.sum(sums, axis=0)
    dnorms = {"scale": q_scale, "bias": q_bias}, {"scale": k_scale, "bias": k_bias}
    dh, dh_scale, dmaps["qkv"] = _multiply_backward(_Rows(*d), maps["qkv"], between.h_qkv)

    norm = lambda x, gain, *d: backward.add_norm_modulate(x, None, None, None, gain, *d)  # noqa: E731
    dx, *_, sums = _over_batch(norm)(start, vectors["gain"], dx, dh, dh_scale)
    dvectors |= {"shift": sums[:, 0], "gain": sums[:, 1]}
    return dx, dmaps, dvectors, dnorms, jnp.zeros_like(rope)


_block.defvjp(_block_fwd, _block_bwd)


def _between(
    static: _Static,
    x: Array,
    maps: dict[str, _Map],
    vectors: dict[str, Array],
    norms: tuple,
    rope: Array | None,
    kept: _Kept,
) -> _Between:
    """Makes anew, from what is kept, what kernels made in the forward pass: no matmul is done twice."""
    stored = Stored(True, None)
    h_qkv, *_ = _over_batch(partial(forward.norm_modulate, stored=stored))(x, vectors["gain"], vectors["shift"])
    q_k_v = _queries_keys_values(static, kept.qkv, maps, norms, rope)
    x, h_w13 = _add_norm_modulate(x, kept.out, vectors, stored)
    return _Between(h_qkv, q_k_v, x, h_w13.bfloat16, _swiglu(kept.w13, maps, stored).bfloat16)


def _queries_keys_values(
    static: _Static, qkv: _Product, maps: dict[str, _Map], norms: tuple[dict, dict], rope: Array | None
) -> tuple[Array, Array, Array]:
    run = partial(forward.queries_keys_values, heads=static.heads)
    return _over_batch(run, whole=(2, 3, 4))(*qkv, _alphas(maps["qkv"]), norms, rope)


def _add_norm_modulate(x: Array, out: _Product, vectors: dict[str, Array], stored: Stored) -> tuple[Array, _Rows]:
    def run(x: Array, y: Array, y_scale: Array | None, *vectors: Array) -> tuple[Array | None, ...]:
        return forward.add_norm_modulate(x, y, y_scale, jnp.stack(vectors)[None], jnp.int32(0), stored)

    x, *h = _over_batch(run)(x, *out, vectors["gate"], vectors["ffn_gain"], vectors["ffn_shift"])
    return x, _Rows(*h)


def _swiglu(w13: _Product, maps: dict[str, _Map], stored: Stored) -> _Rows:
    return _Rows(*_over_batch(partial(forward.swiglu, dtype=stored), whole=(2,))(*w13, _alphas(maps["w13"])))


def _multiply(h: _Rows, linear: _Map) -> _Product:
    weight = whole_weight(linear)
    if h.rounded is None:
        y = code_product(h.bfloat16, weight)
    else:
        y = multiply(h.rounded, weight, jnp.bfloat16)
    return _Product(y.reshape(*y.shape[:2], -1), h.scale)


def _multiply_backward(dy: _Rows, linear: _Map, h: Array) -> tuple[Array, Array | None, _Map]:
    """The gradient of a matmul's input (B, T, in), its scale (B, T) or None, and the gradient of the map."""
    weight = whole_weight(linear)
    of_maps = lambda rows: rows.reshape(*rows.shape[:2], *weight.shape[:2])  # noqa: E731
    if dy.rounded is None:
        dh = input_gradient(of_maps(dy.bfloat16), weight)
    else:
        dh = multiply_transposed(of_maps(dy.rounded), weight, jnp.bfloat16)
    return dh, dy.scale, linear_gradient(linear, h, of_maps(dy.bfloat16))


def _attend(static: _Static, q_k_v: tuple[Array, Array, Array]) -> tuple[Array, Any]:
    """Attention's output (B, T, D), and what `_attend_backward` takes: its pullback, in which None stands for queries,
    keys and values if they are to be made anew."""
    out, pullback = jax.vjp(partial(jax.nn.dot_product_attention, implementation=static.attention), *q_k_v)
    out = out.reshape(*out.shape[:2], -1)
    if not static.recompute:
        return out, pullback
    if static.attention != "cudnn":  # which keeps the scores of all pairs of tokens: all of it is done again
        return out, None
    leaves, structure = jax.tree.flatten(pullback)
    places = tuple(next((i for i, a in enumerate(q_k_v) if a is leaf), None) for leaf in leaves)
    kept = [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]
    return out, jax.tree_util.Partial(partial(_with_inputs, structure, places), kept)


def _with_inputs(structure: Any, places: tuple[int | None, ...], kept: list[Array], q_k_v: tuple) -> Callable:
    rest = iter(kept)
    return jax.tree.unflatten(structure, [next(rest) if place is None else q_k_v[place] for place in places])


def _attend_backward(static: _Static, q_k_v: tuple[Array, Array, Array], residuals: Any, d: Array) -> tuple:
    if not static.recompute:
        pullback = residuals
    elif residuals is not None:
        pullback = residuals(q_k_v)
    else:
        pullback = jax.vjp(partial(jax.nn.dot_product_attention, implementation=static.attention), *q_k_v)[1]
    return pullback(d.reshape(q_k_v[0].shape))


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
