"""The passes between the matmuls of a block, over whole rows; equal to `model.block` between its matmuls.

The compiler fuses them as it can. All arithmetic is float32, rounded once at the end. `inference_pass` multiplies
between them; on Hopper GPUs `hopper.forward` has the same passes as kernels.
"""

import jax
from jax import Array
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from terdit_jax.fast.eight_bit import quantize
from terdit_jax.model.layers import layer_norm, rms_norm


def norm_modulate(x: Array, gain: Array, shift: Array) -> Array:
    """RMS norm and modulation: x (B, T, D), gain and shift (B, D) float32 -> (B, T, D) float32."""
    return rms_norm(x.astype(jnp.float32), gain[:, None]) + shift[:, None]


def add_gated(x: Array, y: Array, y_scale: Array | None, gate: Array) -> Array:
    """x (B, T, D) + gate (B, D) * y (B, T, D) with its scale, in x's dtype."""
    return (x.astype(jnp.float32) + gate[:, None] * _scaled(y, y_scale)).astype(x.dtype)


def add_norm_modulate(
    x: Array, y: Array, y_scale: Array | None, vectors: Array, site: Array, dtype: DTypeLike
) -> tuple[Array, Array, Array | None]:
    """A gated branch into the residual stream, then RMS norm, modulation and quantisation.

    Args:
      x: (B, T, D).
      y: (B, T, D) products of the branch's last matmul.
      y_scale: (B, T) float32, what each token's products stand for, or None.
      vectors: (S, 3, B, D) float32: gate, gain and shift of every such site in the network. The gate holds all scales
        of y that a token does not decide, the gain is the norm's scale times one plus the modulation's.
      site: () int, which of them.
      dtype: of the result, as in `quantize`.

    Returns:
      The new x (B, T, D), the normed rows (B, T, D), and their scale (B, T) or None.
    """
    gate, gain, shift = vectors[site]
    x = add_gated(x, y, y_scale, gate)
    return x, *quantize(norm_modulate(x, gain, shift), dtype)


def swiglu(y: Array, y_scale: Array | None, alphas: Array, dtype: DTypeLike) -> tuple[Array, Array | None]:
    """silu(a) * b and quantisation.

    Args:
      y: (B, T, 2 F) products, a then b.
      y_scale: (B, T) float32, what each token's products stand for, or None.
      alphas: (2,) float32, what a and b are multiplied by besides.
      dtype: of the result, as in `quantize`.

    Returns:
      The rows (B, T, F), and their scale (B, T) or None.
    """
    a, b = jnp.split(_scaled(y, y_scale), 2, axis=-1)
    return quantize(jax.nn.silu(a * alphas[0]) * (b * alphas[1]), dtype)


def queries_keys_values(
    y: Array, y_scale: Array | None, alphas: Array, norms: tuple[dict, dict] | None, rope: Array, heads: int
) -> tuple[Array, Array, Array]:
    """Queries and keys after their layer norm and RoPE, and values, from one projection.

    Args:
      y: (B, T, D + 2 kv_width) products; features of a head ordered by `rotary_order` in queries and keys.
      y_scale: (B, T) float32, what each token's products stand for, or None.
      alphas: (3,) float32, what queries, keys and values are multiplied by besides.
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
