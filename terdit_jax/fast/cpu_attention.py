"""Attention on CPUs; equals `jax.nn.dot_product_attention`.

There XLA multiplies 16-bit numbers in 16 bits only where the product leaves in float32, transposes what an einsum does
not name in its order, and is slow at dividing (B, heads, T, T) numbers: here rows are divided after the second product.
"""

from jax import Array, lax
import jax.numpy as jnp


def attention(q: Array, k: Array, v: Array) -> Array:
    """softmax(q k^T / sqrt(head_dim)) v, the softmax in float32.

    Args:
      q: (B, T, heads, head_dim).
      k, v: (B, T, kv_heads, head_dim) in q's dtype, each for heads / kv_heads neighbouring heads of q.

    Returns:
      (B, T, heads, head_dim) in q's dtype.
    """
    B, T, heads, head_dim = q.shape
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    q = q.reshape(B, k.shape[1], -1, head_dim)  # the heads that share keys as further rows
    logits = _product(q, k, 3)
    weights = jnp.exp((logits - jnp.max(logits, axis=-1, keepdims=True)) * head_dim**-0.5)
    out = _product(weights.astype(q.dtype), v, 2) / jnp.sum(weights, axis=-1, keepdims=True)
    return out.astype(q.dtype).reshape(B, heads, T, head_dim).swapaxes(1, 2)


def _product(a: Array, b: Array, axis: int) -> Array:
    """(B, kv_heads, rows, n) times (B, kv_heads, ...), over the last axis of `a` and that of `b`, in float32."""
    return lax.dot_general(a, b, (((3,), (axis,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
