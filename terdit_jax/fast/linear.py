"""The ternary map with codes cut over `fsdp` or matmuls in 8 bits; equals `ternary.linear.TernaryLinear`."""

import dataclasses
from functools import partial
from typing import Any

from flax import struct
import jax
from jax import Array, lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.typing import DTypeLike
import numpy as np

from terdit_jax.fast.eight_bit import SAME, rounded_input_gradient, rounded_product
from terdit_jax.fast.gather import CodesCut, cut_codes, gather_codes, scattered_weight_gradient
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.layers import trained_linear
from terdit_jax.parallel.sharding import path_name
from terdit_jax.ternary.linear import (
    FullLinear,
    Linear,
    TernaryLinear,
    code_product,
    input_gradient,
    no_gradient,
    scale_product,
    weight_gradient,
)
from terdit_jax.ternary.quantize import PUBLISHED, Rounding, straight_through, ternarize


@struct.dataclass
class FastLinear:
    """y = alpha x T^T under training.

    codes: (n, out, in) int8, or each device's part of them as `cut_codes` makes it.
    alpha: (n,) or (n, out) float32.
    sink: (n, out, in) zeros, cut as the weight, through which the gradient of W leaves.
    cut: how the codes are cut over `fsdp`; None if each device has them whole.
    matmul_dtype: of the matmuls with T, "same" as the activations or one of 8 bits. The weight gradient's is "same".
    """

    codes: Array
    alpha: Array
    sink: Array
    cut: CodesCut | None = struct.field(pytree_node=False, default=None)
    matmul_dtype: str = struct.field(pytree_node=False, default=SAME)

    def __call__(self, x: Array) -> Array:
        """(B, ..., in) -> (B, ..., n, out) in x's dtype; on a mesh B is cut over data and fsdp."""
        y = fast_matmul(self.cut, self.matmul_dtype, x, self.codes, self.sink)
        return scale_product(y, lax.stop_gradient(self.alpha))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def fast_matmul(cut: CodesCut | None, matmul_dtype: str, x: Array, codes: Array, sink: Array) -> Array:
    """`ternary.linear.ternary_matmul`, with codes and sink as `FastLinear` has them."""
    return _product(cut, matmul_dtype, x, codes)


def _product(cut: CodesCut | None, matmul_dtype: str, x: Array, codes: Array) -> Array:
    whole = gather_codes(codes, cut)
    return code_product(x, whole) if matmul_dtype == SAME else rounded_product(x, whole, matmul_dtype)


def _fast_matmul_fwd(
    cut: CodesCut | None, matmul_dtype: str, x: Array, codes: Array, sink: Array
) -> tuple[Array, tuple[Array, ...]]:
    # The part is kept for the backward pass, not what was gathered. Inside a call of `fast_matmul`, policies of
    # rematerialisation would not see the matmul.
    return _product(cut, matmul_dtype, x, codes), (x, codes, jnp.zeros((0,), sink.dtype))


def _fast_matmul_bwd(
    cut: CodesCut | None, matmul_dtype: str, residuals: tuple[Array, ...], dy: Array
) -> tuple[Array, np.ndarray, Array]:
    x, codes, sink = residuals
    whole = gather_codes(codes, cut)
    dx = input_gradient(dy, whole) if matmul_dtype == SAME else rounded_input_gradient(dy, whole, matmul_dtype)
    return dx, no_gradient(codes), scattered_weight_gradient(x, dy, cut, sink.dtype)


fast_matmul.defvjp(_fast_matmul_fwd, _fast_matmul_bwd)


def whole_weight(linear: FullLinear | TernaryLinear | FastLinear) -> Array:
    """The (n, out, in) array that activations are multiplied by: a weight, or codes, gathered if they are cut."""
    if isinstance(linear, FullLinear):
        return linear.weight
    return gather_codes(linear.codes, linear.cut) if isinstance(linear, FastLinear) else linear.codes


def alphas_of(linear: Linear | FastLinear) -> Array:
    """The scales of maps, (..., n) or (..., n, out) float32, ones in full precision; detached: `ternarize` computes
    their gradient."""
    if isinstance(linear, FullLinear):
        return jnp.ones(linear.weight.shape[:-2], jnp.float32)
    return lax.stop_gradient(linear.alpha)


def without_sink(linear: FullLinear | TernaryLinear | FastLinear) -> FullLinear | TernaryLinear | FastLinear:
    """The map with an empty sink of the same dtype, as a backward pass keeps it."""
    if isinstance(linear, FullLinear):
        return linear
    return dataclasses.replace(linear, sink=jnp.zeros((0,), linear.sink.dtype))


def linear_gradient(
    linear: FullLinear | TernaryLinear | FastLinear, x: Array, dy: Array
) -> FullLinear | TernaryLinear | FastLinear:
    """The gradient of a map, from its input x (B, T, in) and dy (B, T, n, out), the gradient of their product."""
    if isinstance(linear, FullLinear):
        return FullLinear(weight_gradient(x, dy, linear.weight.dtype))
    cut = linear.cut if isinstance(linear, FastLinear) else None
    dw = scattered_weight_gradient(x, dy, cut, linear.sink.dtype)
    nothing: Any = no_gradient(linear.codes)
    return dataclasses.replace(linear, codes=nothing, alpha=jnp.zeros_like(linear.alpha), sink=dw)


def make_fast(operands: dict, matmul_dtype: str, gather: str, rings: tuple[int, ...]) -> dict:
    """The operands with `FastLinear` for every ternary map that the mesh in context cuts over `fsdp`, and for those
    whose matmuls are to be in 8 bits.

    adaLN's map stays in the activations' dtype: it reads a row an image, and every token would feel the rounding.

    Args:
      operands: of `model.transformer.make_operands`.
      matmul_dtype: "same" or one of 8 bits.
      gather: in what form codes travel, of `gather.GATHERS`.
      rings: of `mesh.fsdp_rings`; one ring if empty.

    Raises:
      UserError: a side too narrow to be packed in each device's part.
    """

    def convert(path: tuple, leaf: Array | TernaryLinear) -> Array | TernaryLinear | FastLinear:
        if not isinstance(leaf, TernaryLinear):
            return leaf
        name = path_name(path)
        dtype = SAME if "adaLN" in name else matmul_dtype
        codes, cut = cut_codes(name, leaf.codes, gather, rings)
        if cut is None and dtype == SAME:
            return leaf
        return FastLinear(codes, leaf.alpha, leaf.sink, cut, dtype)

    return jtu.tree_map_with_path(convert, operands, is_leaf=lambda leaf: isinstance(leaf, TernaryLinear))


def trained_by_layer(config: DiTConfig, weight: Array, alpha: Array | None) -> Linear:
    """`model.layers.trained_linear` for unrolled layers, whose gradients come one by one: each layer's sum for alpha
    reads its own, so XLA never makes the stack of all."""
    if alpha is None:
        return trained_linear(config, weight, alpha)
    return TernaryLinear(*ternarize_by_layer(weight, alpha, config.grad_dtype, config.rounding))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def ternarize_by_layer(
    weight: Array, alpha: Array, grad_dtype: DTypeLike = jnp.float32, rounding: Rounding = PUBLISHED
) -> tuple[Array, Array, Array]:
    """`ternary.quantize.ternarize` of stacked layers, (L, out, in) and (L,) or (L, out)."""
    return ternarize(weight, alpha, grad_dtype, rounding)


def _ternarize_by_layer_bwd(
    _, __, residuals: tuple[Array, Array], cotangents: tuple[Array, ...]
) -> tuple[Array, Array]:
    dweight = cotangents[2].astype(jnp.float32)
    layers = zip(*residuals, cotangents[1], dweight, strict=True)
    return dweight, jnp.stack([straight_through(*layer)[1] for layer in layers])


ternarize_by_layer.defvjp(lambda *arguments: (made := ternarize(*arguments), made[:2]), _ternarize_by_layer_bwd)
