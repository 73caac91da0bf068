"""The passes of a fused block by its family, forward and backward, run by each device on its own images.

Which kernels those are, with which of the block's vectors, and what to make of their sums over tokens: for
`fused_block`, which calls them between its matmuls.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from terdit_jax.fast import xla_passes
from terdit_jax.fast.hopper import backward, biased, forward
from terdit_jax.fast.hopper.forward import Stored
from terdit_jax.fast.linear import FastLinear, alphas_of
from terdit_jax.model.attention import Implementation
from terdit_jax.model.traits import Norm
from terdit_jax.parallel.sharding import LOGICAL_TO_MESH
from terdit_jax.ternary.linear import FullLinear, TernaryLinear

Map = FullLinear | TernaryLinear | FastLinear


class Static(NamedTuple):
    """heads: of queries, keys and values alike. attention: implementation. matmul_dtype: EIGHT_BIT, or None for
    bfloat16. recompute: whether the backward pass makes anew what kernels and not matmuls have made. dit: whether the
    block is that of DiT, with layer norms, biases and GELU for RMS norms, qk-norm, RoPE and SwiGLU."""

    heads: int
    attention: Implementation
    matmul_dtype: str | None
    recompute: bool
    dit: bool

    @property
    def norm(self) -> Norm:
        return "layer" if self.dit else "rms"


class Rows(NamedTuple):
    """Activations on their way into a matmul, (B, T, W): in bfloat16 (None where only 8 bits are
    read), and in 8 bits with a scale (B, T), or None."""

    bfloat16: Any
    rounded: Array | None = None
    scale: Array | None = None


class Product(NamedTuple):
    """The result of a matmul, (B, T, n out) bfloat16, still to be multiplied by scale (B, T), if there is one."""

    values: Array
    scale: Array | None


def norm_modulate(static: Static, x: Array, vectors: dict[str, Array], stored: Stored) -> Rows:
    run = partial(forward.norm_modulate, stored=stored, norm=static.norm)
    return Rows(*over_batch(run)(x, vectors["gain"], vectors["shift"]))


def add_norm_modulate(
    static: Static, x: Array, out: Product, vectors: dict[str, Array], stored: Stored
) -> tuple[Array, Rows]:
    def run(x: Array, y: Array, y_scale: Array | None, *vectors: Array) -> tuple[Array | None, ...]:
        stacked = jnp.stack(vectors)[None]
        return forward.add_norm_modulate(x, y, y_scale, stacked, jnp.int32(0), stored, static.norm)

    names = ("gate", "ffn_gain", "ffn_shift", *(["offset"] if static.dit else []))
    x, *h = over_batch(run)(x, *out, *(vectors[name] for name in names))
    return x, Rows(*h)


def norm_modulate_backward(
    static: Static, x: Array, vectors: dict[str, Array], dx: Array, dh: Array, dh_scale: Array | None
) -> tuple[Array, dict[str, Array]]:
    """The gradient of x, to which dx leads beside dh, and those of vectors."""
    run = lambda x, gain, *d: backward.add_norm_modulate(x, None, None, None, gain, *d, norm=static.norm)  # noqa: E731
    dx, *_, sums = over_batch(run)(x, vectors["gain"], dx, dh, dh_scale)
    return dx, _named(sums, "shift", "gain")


def add_norm_modulate_backward(
    static: Static,
    x: Array,
    out: Product,
    vectors: dict[str, Array],
    dx: Array,
    dh: Array,
    dh_scale: Array | None,
) -> tuple[Array, Rows, dict[str, Array]]:
    """The gradients of the residual stream and of the product, from x after both were added, and those of vectors."""
    run = partial(backward.add_norm_modulate, eight=static.matmul_dtype, norm=static.norm, offset=static.dit)
    dx, *dy, sums = over_batch(run)(x, *out, vectors["gate"], vectors["ffn_gain"], dx, dh, dh_scale)
    return dx, Rows(*dy), _named(sums, "ffn_shift", "ffn_gain", "gate", "offset")


def add_gated(x: Array, down: Product, vectors: dict[str, Array]) -> Array:
    return xla_passes.add_gated(x, *down, vectors["ffn_gate"], vectors.get("ffn_offset"))


def add_gated_backward(
    static: Static, down: Product, vectors: dict[str, Array], dx: Array
) -> tuple[Rows, dict[str, Array]]:
    """The gradient of the product, and those of vectors; that of the residual stream is dx."""
    run = partial(backward.add_gated, eight=static.matmul_dtype, offset=static.dit)
    *dy, sums = over_batch(run)(*down, vectors["ffn_gate"], dx)
    return Rows(*dy), _named(sums, "ffn_gate", "ffn_offset")


def quantize(static: Static, rows: Array) -> Rows:
    """Attention's output for its matmul, (B, T, D) bfloat16."""
    if static.matmul_dtype is None:
        return Rows(rows)
    return Rows(rows, *over_batch(partial(forward.quantize, dtype=static.matmul_dtype))(rows))


def queries_keys_values(
    static: Static, qkv: Product, maps: dict[str, Map], shared: dict[str, Any]
) -> tuple[Array, Array, Array]:
    alphas = alphas_of(maps["qkv"])
    if static.dit:  # one elementwise pass, which the compiler makes as well
        run = partial(xla_passes.split_heads, heads=static.heads)
        return over_batch(run, whole=(2, 3))(*qkv, alphas, shared["qkv_bias"])
    run = partial(forward.queries_keys_values, heads=static.heads)
    return over_batch(run, whole=(2, 3, 4))(*qkv, alphas, shared["norms"], shared["rope"])


def queries_keys_values_backward(
    static: Static, qkv: Product, maps: dict[str, Map], shared: dict[str, Any], d: tuple
) -> tuple[Rows, dict[str, Any]]:
    """The gradient of the product, and those of what images share."""
    alphas = alphas_of(maps["qkv"])
    if static.dit:
        run = partial(biased.split_heads, eight=static.matmul_dtype)
        *dy, sums = over_batch(run, whole=(3,))(*d, alphas)
        return Rows(*dy), {"qkv_bias": jnp.sum(sums, axis=0)}
    run = partial(backward.queries_keys_values, heads=static.heads, eight=static.matmul_dtype)
    *dy, sums = over_batch(run, whole=(2, 3, 4))(*qkv, alphas, shared["norms"], shared["rope"], *d)
    q_scale, q_bias, k_scale, k_bias = jnp.sum(sums, axis=0)
    dnorms = {"scale": q_scale, "bias": q_bias}, {"scale": k_scale, "bias": k_bias}
    return Rows(*dy), {"norms": dnorms, "rope": jnp.zeros_like(shared["rope"])}


def activate(static: Static, up: Product, maps: dict[str, Map], shared: dict[str, Any], stored: Stored) -> Rows:
    """SwiGLU, or GELU with its bias."""
    alphas = alphas_of(maps["up"])
    if static.dit:
        return Rows(*over_batch(partial(forward.gelu, dtype=stored), whole=(2, 3))(*up, alphas, shared["up_bias"]))
    return Rows(*over_batch(partial(forward.swiglu, dtype=stored), whole=(2,))(*up, alphas))


def activate_backward(
    static: Static, up: Product, maps: dict[str, Map], shared: dict[str, Any], dh: Array, dh_scale: Array | None
) -> tuple[Rows, dict[str, Array]]:
    """The gradient of the product, and those of what images share."""
    alphas = alphas_of(maps["up"])
    if static.dit:
        run = partial(biased.gelu, eight=static.matmul_dtype)
        *dy, sums = over_batch(run, whole=(2, 3))(*up, alphas, shared["up_bias"], dh, dh_scale)
        return Rows(*dy), {"up_bias": jnp.sum(sums, axis=0)}
    run = partial(backward.swiglu, eight=static.matmul_dtype)
    return Rows(*over_batch(run, whole=(2,))(*up, alphas, dh, dh_scale)), {}


def _named(sums: Array, *names: str) -> dict[str, Array]:
    """Sums over tokens (B, n, D) by the names of the first n vectors."""
    return {name: sums[:, k] for k, name in zip(range(sums.shape[1]), names, strict=False)}


def over_batch(run: Callable, whole: tuple[int, ...] = ()) -> Callable:
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
