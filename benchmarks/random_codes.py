"""A model of random codes, or random weights, made on the device: speed does not depend on what is in them."""

import functools
import zlib

import jax
import jax.numpy as jnp

from terdit_jax.model.config import DiTConfig
from terdit_jax.model.transformer import abstract_params, packed_operands
from terdit_jax.parallel.sharding import path_name


def random_operands(model: DiTConfig) -> dict:
    """Packed operands of random codes, as `packed_operands(...)` makes them, of scales that keep the size of
    activations."""
    zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract_params(model))  # noqa: E731
    shapes = jax.eval_shape(lambda: packed_operands(model, zeros()))

    @functools.partial(jax.jit, static_argnums=1)
    def codes(key, shape):
        quads = jax.random.randint(key, (*shape, 4), 0, 3, jnp.uint8)
        return quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6

    def draw(path, leaf):
        name = path_name(path)
        key = jax.random.fold_in(jax.random.key(0), zlib.crc32(name.encode()))
        if leaf.dtype == jnp.uint8:  # a layer at a time: the generator's bits are 32 times as large
            return jnp.stack([codes(k, leaf.shape[1:]) for k in jax.random.split(key, leaf.shape[0])])
        if name.endswith("alpha"):
            return jnp.full(leaf.shape, 0.02)
        if name.endswith("scale"):
            return jnp.full(leaf.shape, 0.3 if "adaLN" in name else 1.0)
        return (0.02 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)

    return jax.block_until_ready(jax.tree_util.tree_map_with_path(draw, shapes))
