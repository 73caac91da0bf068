"""A block under training with kernels between its matmuls; equals `model.block.block`.

One custom_vjp holds the whole block. The forward pass names what the backward pass reads; the backward pass is written
out, step by step in reverse. Between matmuls, each array is read and written once. Matmuls with ternary matrices take
activations in bfloat16, or in 8 bits with a scale a token; weight gradients always take bfloat16. `fused_passes` has
what runs between the matmuls.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from terdit_jax.fast import fused_passes as passes
from terdit_jax.fast.eight_bit import SAME, apply_scale, multiply, multiply_transposed
from terdit_jax.fast.fused_passes import Map, Product, Rows, Static
from terdit_jax.fast.hopper.forward import Stored
from terdit_jax.fast.linear import alphas_of, linear_gradient, whole_weight, without_sink
from terdit_jax.model.attention import Implementation
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.layers import add_bias
from terdit_jax.parallel.sharding import constrain
from terdit_jax.ternary.linear import code_product, input_gradient, scale_product

EIGHT_BIT = "float8_e4m3fn"  # the dtype of 8 bits that kernels round to


class _Kept(NamedTuple):
    """The residuals beside the arguments: products (`up` of w1 and w3, or of fc1), attention's output, and what
    `_between` makes."""

    qkv: Product
    attended: Array
    attention_residuals: Any
    out: Product
    up: Product
    down: Product
    between: "_Between | None"


class _Between(NamedTuple):
    """Made by kernels from products and the block's input: inputs of matmuls in bfloat16 (`h_qkv`, `h_up`, `h_down`),
    queries, keys and values (B, T, heads, head_dim), and the residual stream after attention."""

    h_qkv: Array
    q_k_v: tuple[Array, Array, Array]
    x: Array
    h_up: Array
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
      rope: (2, T, head_dim / 2); None in DiT.

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
        values = scale_product(values[:, :, None], alphas_of(arguments[2][which]))
        activations[name] = add_bias(values, operands[name].get(f"{which}_bias"))[:, :, 0]
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
    dit, dtype = config.traits.feed_forward == "gelu", None if matmul_dtype == SAME else EIGHT_BIT
    static = Static(config.num_heads, attention, dtype, config.remat == "dots", dit)
    attention_maps, ffn_maps = operands["attention"], operands["feed_forward"]
    maps = {name: attention_maps[name] for name in ("qkv", "out")} | {"down": ffn_maps["down"]}
    maps["up"] = ffn_maps["up" if dit else "w13"]
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (m[:, part].astype(jnp.float32) for part in range(6))
    vectors = {
        "gain": 1 + scale,
        "shift": shift,
        "gate": gate * alphas_of(maps["out"]),
        "ffn_gain": 1 + ffn_scale,
        "ffn_shift": ffn_shift,
        "ffn_gate": ffn_gate * alphas_of(maps["down"]),
    }
    if dit:
        vectors |= {"offset": gate * attention_maps["out_bias"], "ffn_offset": ffn_gate * ffn_maps["down_bias"]}
        shared = {"qkv_bias": attention_maps["qkv_bias"].ravel(), "up_bias": ffn_maps["up_bias"].ravel()}
    else:
        vectors["gain"] *= operands["attention_norm"]["scale"]
        vectors["ffn_gain"] *= operands["ffn_norm"]["scale"]
        shared = {"norms": (attention_maps["q_norm"], attention_maps["k_norm"]), "rope": rope}
    return static, x, maps, vectors, shared


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(static: Static, x: Array, maps: dict[str, Map], vectors: dict[str, Array], shared: dict[str, Any]) -> Array:
    """The block of x (B, T, D).

    vectors (B, D) float32 hold norms' gains, shifts, gates with alphas, and what gates make of biases; shared holds
    what all images share: norms of queries and keys, and RoPE's table, or biases.
    """
    return _block_fwd(static, x, maps, vectors, shared)[0]


def _block_fwd(
    static: Static, x: Array, maps: dict[str, Map], vectors: dict[str, Array], shared: dict[str, Any]
) -> tuple[Array, tuple]:
    start, dtype = x, static.matmul_dtype
    # With 8 bits and recomputation, the forward pass needs rows in 8 bits alone, the backward pass in bfloat16 alone.
    stored = Stored(dtype is None or not static.recompute, dtype)
    h_qkv = passes.norm_modulate(static, x, vectors, stored)
    qkv = _multiply(h_qkv, maps["qkv"])
    q_k_v = passes.queries_keys_values(static, qkv, maps, shared)
    attended, attention_residuals = _attend(static, q_k_v)
    out = _multiply(passes.quantize(static, attended), maps["out"])
    x, h_up = passes.add_norm_modulate(static, x, out, vectors, stored)
    up = _multiply(h_up, maps["up"])
    h_down = passes.activate(static, up, maps, shared, stored)
    down = _multiply(h_down, maps["down"])
    between = None
    if not static.recompute:
        between = _Between(h_qkv.bfloat16, q_k_v, x, h_up.bfloat16, h_down.bfloat16)
    kept = _Kept(qkv, attended, attention_residuals, out, up, down, between)
    x = constrain(passes.add_gated(x, down, vectors), "batch", "tokens", None)
    return x, (start, {name: without_sink(linear) for name, linear in maps.items()}, vectors, shared, kept)


def _block_bwd(static: Static, residuals: tuple, dx: Array) -> tuple:
    if static.recompute:
        # Without a barrier the compiler would keep what the forward pass made instead of making it anew.
        residuals, dx = jax.lax.optimization_barrier((residuals, dx))
    start, maps, vectors, shared, kept = residuals
    between = kept.between or _between(static, *residuals)
    dmaps: dict[str, Map] = {}

    d, dvectors = passes.add_gated_backward(static, kept.down, vectors, dx)
    dh, dh_scale, dmaps["down"] = _multiply_backward(d, maps["down"], between.h_down)

    d, dshared = passes.activate_backward(static, kept.up, maps, shared, dh, dh_scale)
    dh, dh_scale, dmaps["up"] = _multiply_backward(d, maps["up"], between.h_up)

    dx, d, more = passes.add_norm_modulate_backward(static, between.x, kept.out, vectors, dx, dh, dh_scale)
    dvectors |= more
    dh, dh_scale, dmaps["out"] = _multiply_backward(d, maps["out"], kept.attended)

    dq_k_v = _attend_backward(static, between.q_k_v, kept.attention_residuals, apply_scale(dh, dh_scale, dh.dtype))
    d, more = passes.queries_keys_values_backward(static, kept.qkv, maps, shared, dq_k_v)
    dshared |= more
    dh, dh_scale, dmaps["qkv"] = _multiply_backward(d, maps["qkv"], between.h_qkv)

    dx, more = passes.norm_modulate_backward(static, start, vectors, dx, dh, dh_scale)
    return dx, dmaps, dvectors | more, dshared


_block.defvjp(_block_fwd, _block_bwd)


def _between(
    static: Static, x: Array, maps: dict[str, Map], vectors: dict[str, Array], shared: dict[str, Any], kept: _Kept
) -> _Between:
    """Makes anew, from what is kept, what kernels made in the forward pass: no matmul is done twice."""
    stored = Stored(True, None)
    h_qkv = passes.norm_modulate(static, x, vectors, stored).bfloat16
    q_k_v = passes.queries_keys_values(static, kept.qkv, maps, shared)
    x, h_up = passes.add_norm_modulate(static, x, kept.out, vectors, stored)
    return _Between(h_qkv, q_k_v, x, h_up.bfloat16, passes.activate(static, kept.up, maps, shared, stored).bfloat16)


def _multiply(h: Rows, linear: Map) -> Product:
    weight = whole_weight(linear)
    if h.rounded is None:
        y = code_product(h.bfloat16, weight)
    else:
        y = multiply(h.rounded, weight, jnp.bfloat16)
    return Product(y.reshape(*y.shape[:2], -1), h.scale)


def _multiply_backward(dy: Rows, linear: Map, h: Array) -> tuple[Array, Array | None, Map]:
    """The gradient of a matmul's input (B, T, in), its scale (B, T) or None, and the gradient of the map."""
    weight = whole_weight(linear)
    of_maps = lambda rows: rows.reshape(*rows.shape[:2], *weight.shape[:2])  # noqa: E731
    if dy.rounded is None:
        dh = input_gradient(of_maps(dy.bfloat16), weight)
    else:
        dh = multiply_transposed(of_maps(dy.rounded), weight, jnp.bfloat16)
    return dh, dy.scale, linear_gradient(linear, h, of_maps(dy.bfloat16))


def _attend(static: Static, q_k_v: tuple[Array, Array, Array]) -> tuple[Array, Any]:
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


def _attend_backward(static: Static, q_k_v: tuple[Array, Array, Array], residuals: Any, d: Array) -> tuple:
    if not static.recompute:
        pullback = residuals
    elif residuals is not None:
        pullback = residuals(q_k_v)
    else:
        pullback = jax.vjp(partial(jax.nn.dot_product_attention, implementation=static.attention), *q_k_v)[1]
    return pullback(d.reshape(q_k_v[0].shape))
