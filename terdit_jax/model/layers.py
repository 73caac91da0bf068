"""The parameters of a linear map and of the norms, and how linear maps become what a forward pass multiplies by.

Parameters stay one array a map (wq, wk, wv, w1, w3). Maps that share an input are stacked once an optimizer step, so
that each group is one matmul.
"""

from collections.abc import Callable

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp
from jax.typing import DTypeLike

from terdit_jax.model.config import DiTConfig
from terdit_jax.ternary import linear as forms
from terdit_jax.ternary.packing import pack
from terdit_jax.ternary.quantize import absmean_codes, least_squares_alpha, soften, sound_alpha, ternarize

xavier_uniform = nnx.initializers.xavier_uniform(in_axis=-1, out_axis=-2)
zeros = nnx.initializers.zeros_init()
normal_002 = nnx.initializers.normal(0.02)

# Makes what a matmul reads of one map, (config, weight (L, out, in), alpha (L,), (L, out) or None) -> leaves (L, ...).
MakeLinear = Callable[[DiTConfig, Array, Array | None], forms.Linear]


class Linear(nnx.Module):
    """weight (out, in) and, if asked for, bias (out,), both float32; full precision in every model."""

    def __init__(
        self, in_features: int, out_features: int, init: nnx.Initializer, *, rngs: nnx.Rngs, bias: bool = True
    ):
        self.weight = nnx.Param(init(rngs.params(), (out_features, in_features), jnp.float32))
        if bias:
            self.bias = nnx.Param(jnp.zeros(out_features, jnp.float32))

    def operands(self) -> dict[str, Array]:
        return {name: value[...] for name, value in (("weight", self.weight), ("bias", self.bias))}


class BlockLinear(nnx.Module):
    """A block's linear map: weight (out, in), the scale alpha () or (out,) if the model is ternary, bias (out,) if
    asked for."""

    def __init__(
        self,
        config: DiTConfig,
        in_features: int,
        out_features: int,
        init: nnx.Initializer = xavier_uniform,
        *,
        rngs: nnx.Rngs,
        bias: bool = False,
    ):
        self.weight = nnx.Param(init(rngs.params(), (out_features, in_features), jnp.float32))
        if bias:
            self.bias = nnx.Param(jnp.zeros(out_features, jnp.float32))
        if config.ternary:
            if config.alpha_init == "normal":  # as published
                shape = (out_features,) if config.alpha_per == "channel" else ()
                alpha = jax.random.normal(rngs.params(), shape, jnp.float32)
            else:
                alpha = least_squares_alpha(self.weight[...], config.alpha_per, config.rounding)
            self.alpha = nnx.Param(alpha)


def trained_linear(config: DiTConfig, weight: Array, alpha: Array | None) -> forms.Linear:
    """A map under training, of leaves with L in front; the pullback of a ternary one is straight-through."""
    if alpha is None:
        return forms.FullLinear(weight.astype(config.activation_dtype))
    return forms.TernaryLinear(*ternarize(weight, alpha, config.grad_dtype, config.rounding))


def softened_linear(share: Array, config: DiTConfig, weight: Array, alpha: Array | None) -> forms.Linear:
    """A map in a soft start, `share` () of the way from its master weight to the ternary one (`quantize.soften`)."""
    return trained_linear(config, weight if alpha is None else soften(weight, alpha, share, config.rounding), None)


def packed_linear(config: DiTConfig, weight: Array, alpha: Array | None) -> forms.Linear:
    """A map for inference, codes (L, out, in / 4) uint8, from float32 weights or from such codes."""
    if alpha is None:
        return trained_linear(config, weight, alpha)
    if weight.dtype == jnp.uint8:
        return forms.PackedLinear(weight, alpha)
    codes = absmean_codes(weight, config.rounding)
    return forms.PackedLinear(pack(codes), sound_alpha(weight, alpha, config.rounding))


def group(config: DiTConfig, groups: dict[str, list[BlockLinear]], make_linear: MakeLinear) -> dict:
    """The operands of groups of maps: by name each group's map, and NAME_bias (L, n, out) where it has one."""
    operands: dict[str, forms.Linear | Array] = {}
    for name, layers in groups.items():
        operands[name] = stack(config, layers, make_linear)
        if hasattr(layers[0], "bias"):
            operands[f"{name}_bias"] = jnp.stack([layer.bias[...] for layer in layers], axis=1)
    return operands


def apply(operands: dict, name: str, x: Array) -> Array:
    """A group's maps with their biases, (..., in) -> (..., n, out) in x's dtype."""
    return add_bias(operands[name](x), operands.get(f"{name}_bias"))


def add_bias(y: Array, bias: Array | None) -> Array:
    """y (..., n, out) + bias (n, out) float32, in y's dtype; y without one."""
    return y if bias is None else (y.astype(jnp.float32) + bias).astype(y.dtype)


def stack(config: DiTConfig, layers: list[BlockLinear], make_linear: MakeLinear) -> forms.Linear:
    """Stacks the maps that share an input into one; every leaf has the layers, then the maps, in front.

    Maps of unequal width (queries beside grouped keys and values) are cut into parts of the narrowest: see
    `_split_heads`. A wider map spans several.
    """
    width = min(layer.weight.shape[-2] for layer in layers)

    def split(leaf: Array, parts: int) -> Array:
        if leaf.ndim == 1:  # one alpha, which the parts share
            return jnp.stack([leaf] * parts, axis=1)
        return _split_heads(leaf, parts, config.head_dim)

    maps = []
    for layer in layers:
        parts = layer.weight.shape[-2] // width
        made = make_linear(config, layer.weight[...], layer.alpha[...] if config.ternary else None)
        maps.append(jax.tree.map(lambda leaf, parts=parts: split(leaf, parts), made))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *maps)


def _split_heads(leaf: Array, parts: int, head_dim: int) -> Array:
    """(L, parts * width, ...) -> (L, parts, width, ...), where part r holds the r-th query head of every kv group.

    Published query heads are ordered (kv head, r, head_dim); cutting them this way leaves each part's heads aligned
    with the kv heads, so that a shard over kv heads holds whole groups.
    """
    if parts == 1:
        return leaf[:, None]
    layers, _, *rest = leaf.shape
    return leaf.reshape(layers, -1, parts, head_dim, *rest).swapaxes(1, 2).reshape(layers, parts, -1, *rest)


class RMSNorm(nnx.Module):
    """scale (D,) of a root-mean-square norm."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))


class LayerNorm(RMSNorm):
    """scale and bias (D,) of a layer norm."""

    def __init__(self, width: int):
        super().__init__(width)
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))


def rms_norm(x: Array, scale: Array, eps: float = 1e-5) -> Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32 (squares exceed bf16's precision)."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps) * scale).astype(x.dtype)


def layer_norm(x: Array, scale: Array | float = 1.0, bias: Array | float = 0.0, eps: float = 1e-5) -> Array:
    """Layer norm over the last axis, in float32 (the variance is a difference of large sums)."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps) * scale + bias).astype(x.dtype)


def linear(x: Array, operands: dict[str, Array], dtype: DTypeLike = jnp.float32) -> Array:
    """x W^T + b of a full-precision map, computed in `dtype`, returned in float32."""
    # Accelerators multiply float32 in fewer bits unless told otherwise; what asks for float32 here is small.
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    weight = operands["weight"].astype(dtype).T
    y = jnp.matmul(x.astype(dtype), weight, precision=precision, preferred_element_type=jnp.float32)
    return y + operands["bias"]
