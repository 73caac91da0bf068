"""Guided sampling from operands: whole loops in one jit, each image fixed by (seed, its index).

Where the weights come from is `runtime`'s, what pictures look like on disk `pictures`'s.
"""

from collections.abc import Callable
from functools import partial

import jax
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from terdit_jax.diffusion.guidance import guided
from terdit_jax.diffusion.sampler import sample
from terdit_jax.diffusion.schedule import linear_schedule, respace, space_timesteps
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.transformer import forward
from terdit_jax.parallel.sharding import batch_sharding, batch_shards, constrain, place

Draw = Callable[[dict, Array, Array], Array]  # operands, labels (B,), image indices (B,) -> (B, H, W, C)


def make_draw(model: DiTConfig, settings: ConfigDict, seed: int) -> Draw:
    """A jitted function that draws pictures with one set of sampling settings.

    Image i starts from, and is disturbed by, noise that depends on (seed, i) alone: neither the batch it is drawn in
    nor the mesh changes it beyond float rounding.

    Args:
      model: the architecture.
      settings: as `config.sample`: method, num_steps, cfg_scale, cfg_channels.
      seed: of all noise.

    Raises:
      UserError: settings that the sampler does not know.
    """
    full = linear_schedule()
    schedule = respace(full, space_timesteps(full.num_timesteps, settings.num_steps))

    @jax.jit
    def draw(operands: dict, labels: Array, indices: Array) -> Array:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)
        normal = jax.vmap(lambda key: jax.random.normal(key, model.sample_shape))

        def noise(i: Array | int) -> Array:
            return constrain(normal(jax.vmap(jax.random.fold_in, (0, None))(keys, i)), "batch", None, None, None)

        denoise = guided(
            partial(forward, model, operands), labels, model.num_classes, settings.cfg_scale, settings.cfg_channels
        )
        # Step i adds noise i + 1; noise 0 is where the image starts.
        return sample(denoise, noise(0), lambda i: noise(i + 1), schedule, settings.method)

    return draw


def draw_all(
    draw: Draw, operands: dict, labels: np.ndarray, mesh: Mesh, *, batch_size: int, report: Callable[[int], None]
) -> np.ndarray:
    """Draws an image for each label, batch by batch, over all devices of the mesh.

    Args:
      draw: of `make_draw`.
      operands: of the model's parameters, on the mesh.
      labels: (N,) int.
      mesh: the devices.
      batch_size: images at once, rounded up to the number of devices that share a batch.
      report: called with the number of images done so far.

    Returns:
      (N, H, W, C) float32 on the host, of every process.
    """
    shards = batch_shards(mesh)
    batch_size = -(-min(batch_size, len(labels)) // shards) * shards
    images = []
    for start in range(0, len(labels), batch_size):
        indices = np.arange(start, start + batch_size, dtype=np.int32)
        # The last batch is filled up with further images, which are dropped: one shape, one compilation.
        batch_labels = np.resize(labels[start : start + batch_size], batch_size).astype(np.int32)
        with jax.set_mesh(mesh):
            batch = draw(operands, *(place(values, batch_sharding(mesh)) for values in (batch_labels, indices)))
        images.append(_gather(batch))
        report(min(start + batch_size, len(labels)))
    return np.concatenate(images)[: len(labels)]


def _gather(batch: Array) -> np.ndarray:
    if jax.process_count() == 1:
        return np.asarray(batch)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(batch, tiled=True))
