"""The passes between the matmuls of a block, over whole rows; equal to `model.block` between its matmuls.

Blocks of TerDiT have RMS norms, qk-norm, RoPE and SwiGLU; blocks of DiT have layer norms without parameters, biases and
GELU. The compiler fuses them as it can. All arithmetic is float32, rounded once at the end. `inference_pass` multiplies
between them; on Hopper GPUs `hopper.forward` has the same passes as kernels.
"""

import jax
from jax import Array
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from terdit_jax.fast.eight_bit import quantize
from terdit_jax.model.layers import layer_norm, rms_norm
from terdit_jax.model.traits import NORM_EPS, Norm


def norm_modulate(x: Array, gain: Array, shift: Array, norm: Norm = "rms") -> Array:
    """Norm and modulation: x (B, T, D), gain and shift (B, D) float32 -> (B, T, D) float32."""
    run = rms_norm if norm == "rms" else layer_norm
    return run(x.astype(jnp.float32), gain[:, None], eps=NORM_EPS[norm]) + shift[:, None]


def add_gated(x: Array, y: Array, y_scale: Array | None, gate: Array, offset: Array | None = None) -> Array:
    """x (B, T, D) + gate (B, D) * y (B, T, D) with its scale + offset (B, D), in x's dtype."""
    x32 = x.astype(jnp.float32) + gate[:, None] * _scaled(y, y_scale)
    return (x32 if offset is None else x32 + offset[:, None]).astype(x.dtype)


def add_norm_modulate(
    x: Array, y: Array, y_scale: Array | None, vectors: Array, site: Array, dtype: DTypeLike, norm: Norm = "rms"
) -> tuple[Array, Array, Array | None]:
    """A gated branch into the residual stream, then norm, modulation and quantisation.

    Args:
      x: (B, T, D).
      y: (B, T, D) products of the branch's last matmul.
      y_scale: (B, T) float32, what each token's products stand for, or None.
      vectors: (S, 3 or 4, B, D) float32: gate, gain and shift of every such site in the network, and offset if the
        matmul has a bias. The gate holds all scales of y that a token does not decide, the gain is the norm's scale
        times one plus the modulation's, the offset is the modulation's gate times the bias.
      site: () int, which of them.
      dtype: of the result, as in `quantize`.
      norm: the RMS norm, or the layer norm without parameters.

    Returns:
      The new x (B, T, D), the normed rows (B, T, D), and their scale (B, T) or None.
    """
    gate, gain, shift, *offset = vectors[site]
    x = add_gated(x, y, y_scale, gate, *offset)
    return x, *quantize(norm_modulate(x, gain, shift, norm), dtype)


def swiglu(y: Array, y_scale: Array | None, alphas: Array, dtype: DTypeLike) -> tuple[Array, Array | None]:
    """silu(a) * b and quantisation.

    Args:
      y: (B, T, 2 F) products, a then b.
      y_scale: (B, T) float32, what each token's products stand for, or None.
      alphas: (2,) or (2, F) float32, what a and b are multiplied by besides.
      dtype: of the result, as in `quantize`.

    Returns:
      The rows (B, T, F), and their scale (B, T) or None.
    """
    a, b = jnp.split(_scaled(y, y_scale), 2, axis=-1)
    return quantize(jax.nn.silu(a * alphas[0]) * (b * alphas[1]), dtype)


def gelu(y: Array, y_scale: Array | None, alphas: Array, bias: Array, dtype: DTypeLike) -> tuple[Array, Array | None]:
    """GELU, by its approximation with tanh, of a map with a bias, and quantisation.

    Args:
      y: (B, T, F) products.
      y_scale: (B, T) float32, what each token's products stand for, or None.
      alphas: (1,) or (1, F) float32, what they are multiplied by besides.
      bias: (F,) float32.
      dtype: of the result, as in `quantize`.

    Returns:
      The rows (B, T, F), and their scale (B, T) or None.
    """
    return quantize(jax.nn.gelu(_scaled(y, y_scale) * alphas[0] + bias, approximate=True), dtype)


def split_heads(y: Array, y_scale: Array | None, alphas: Array, bias: Array, heads: int) -> tuple[Array, Array, Array]:
    """Queries, keys and values from one projection with a bias, and nothing else; as many heads of each.

    Args:
      y: (B, T, 3 D) products.
      y_scale: (B, T) float32, what each token's products stand for, or None.
      alphas: (3,) or (3, D) float32, what queries, keys and values are multiplied by besides.
      bias: (3 D,) float32.
      heads: their number.

    Returns:
      (B, T, heads, head_dim) three times, in bfloat16, or float32 if y is.
    """
    dtype = jnp.float32 if y.dtype == jnp.float32 else jnp.bfloat16
    q, k, v = (
        (part * alpha + part_bias).astype(dtype).reshape(*y.shape[:2], heads, -1)
        for part, alpha, part_bias in zip(
            jnp.split(_scaled(y, y_scale), 3, axis=-1), alphas, jnp.split(bias, 3), strict=True
        )
    )
    return q, k, v


def queries_keys_values(
    y: Array,
    y_scale: Array | None,
    alphas: Array | tuple[Array, ...],
    norms: tuple[dict, dict] | None,
    rope: Array,
    heads: int,
) -> tuple[Array, Array, Array]:
    """Queries and keys after their layer norm and RoPE, and values, from one projection.

    Args:
      y: (B, T, D + 2 kv_width) products; features of a head ordered by `rotary_order` in queries and keys.
      y_scale: (B, T) float32, what each token's products stand for, or None.
      alphas: what queries, keys and values are multiplied by besides: (3,) float32, or three rows of their widths, in
        the same order.
      norms: scale and bias of queries and of keys, in the same order; None without qk-norm.
      rope: (2, T, head_dim / 2) of `rope_table`.
      heads: of the queries.

    Returns:
      (B, T, heads, head_dim), and (B, T, kv_heads, head_dim) twice, in bfloat16, or float32 if y is. Attention's
      products do not depend on the order of queries and keys within a head.
    """
    dtype = jnp.float32 if y.dtype == jnp.float32 else jnp.bfloat16
    half = rope.shape[-1]
    width = heads * 2 * half
    kv_width = (y.shape[-1] - width) // 2
    parts = jnp.split(_scaled(y, y_scale), (width, width + kv_width), axis=-1)
    q, k, v = (part * alpha for part, alpha in zip(parts, alphas, strict=True))
    if norms is not None:
        # Rounded as a whole row, or the compiler keeps rows in float32 between the norm and the rotation.
        q, k = (layer_norm(a, **norm).astype(dtype) for a, norm in zip((q, k), norms, strict=True))
    q, k = (_rotate(a, rope).astype(dtype) for a in (q, k))
    return q, k, v.astype(dtype).reshape(*v.shape[:2], -1, 2 * half)


def rotary_order(num_heads: int, head_dim: int) -> np.ndarray:
    """The order (num_heads * head_dim,) that puts each head's even features before its odd ones."""
    within = np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])
    return (np.arange(num_heads)[:, None] * head_dim + within).ravel()


def _rotate(x: Array, rope: Array) -> Array:
    half = rope.shape[-1]
    cos, sin = rope[0][:, None], rope[1][:, None]  # (T, 1, head_dim / 2)
    x = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2 * half)
    even, odd = x[..., :half], x[..., half:]
    return jnp.concatenate([even * cos - odd * sin, even * sin + odd * cos], axis=-1)


def _scaled(y: Array, y_scale: Array | None) -> Array:
    y = y.astype(jnp.float32)
    return y if y_scale is None else y * y_scale[..., None]
