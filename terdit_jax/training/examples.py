"""From stored records to what one training step learns from, with every draw keyed by (seed, step, global index).

Because a draw depends on nothing else, mesh, process count and gradient accumulation change no example.
"""

from collections.abc import Iterator

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from terdit_jax.batches import in_flight
from terdit_jax.data.reader import make_batches
from terdit_jax.diffusion.objective import Objective
from terdit_jax.parallel.sharding import batch_sharding, local_block
from terdit_jax.reproducible import make_key
from terdit_jax.training.setup import Setup

Examples = dict[str, Array]  # x_0, noise, x_t (B, H, W, C) float32; t (B,) as the objective's, y (B,) int32


def device_batches(setup: Setup, start: int) -> Iterator[dict[str, Array]]:
    """Yields global batches on the mesh from step `start` on, one always on its way while another is used.

    Each process reads its own records.
    """
    config = setup.config
    batch_size = config.train.batch_size
    block, num_blocks = local_block(setup.mesh, batch_size)
    batches = make_batches(
        setup.dataset,
        seed=config.seed,
        batch_size=batch_size,
        start_step=start,
        process_index=block,
        process_count=num_blocks,
        horizontal_flip=config.data.horizontal_flip,
        in_memory=config.data.in_memory,
        read_threads=config.data.read_threads,
        prefetch=config.data.prefetch,
    )
    return in_flight(to_devices(setup.mesh, batch, batch_size) for batch in batches)


def to_devices(mesh: Mesh, batch: dict[str, np.ndarray], batch_size: int) -> dict[str, Array]:
    """Moves the records of this process to their part of the global batch, without their positions.

    Row r of a global batch is position r of its step, which is all that keys its draws.
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array, (batch_size, *array.shape[1:]))
        for name, array in batch.items()
        if name != "position"
    }


def example_keys(seed: int, step: Array | int, indices: Array) -> Array:
    """(B,) keys, one for each global example index (B,) of a step."""
    step_key = jax.random.fold_in(make_key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(step_key, indices)


def make_examples(
    batch: dict[str, Array],
    keys: Array,
    objective: Objective,
    *,
    latent_scale: float,
    num_classes: int,
    class_dropout_prob: float,
) -> Examples:
    """Draws latent, noise, timestep and label dropout of every record.

    Args:
      batch: mean, std (B, H, W, C) float16 of the view that the reader drew, label (B,) int32.
      keys: (B,) of `example_keys`.
      objective: draws t and mixes x_t.
      latent_scale: multiplies the drawn latents.
      num_classes: the null class's label.
      class_dropout_prob: chance that a label becomes the null class.
    """
    purposes = jax.vmap(lambda key: jax.random.split(key, 4))(keys)
    noise_key, t_key, drop_key, posterior_key = (purposes[:, i] for i in range(4))
    shape = batch["mean"].shape[1:]
    normal = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))

    mean, std = batch["mean"].astype(jnp.float32), batch["std"].astype(jnp.float32)  # float16 only saves space
    x_0 = (mean + std * normal(posterior_key)) * latent_scale

    t = jax.vmap(objective.draw_t)(t_key)
    chance = jnp.float32(class_dropout_prob)
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, chance))(drop_key)
    y = jnp.where(dropped, num_classes, batch["label"])
    noise = normal(noise_key)
    return {"x_0": x_0, "noise": noise, "t": t, "y": y, "x_t": objective.noised(x_0, t, noise)}
