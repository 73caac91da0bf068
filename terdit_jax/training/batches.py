"""Global batches on the mesh: each process reads its own records, one batch ahead of the step that uses it."""

from collections.abc import Iterator

import jax
from jax import Array
from jax.sharding import Mesh
import numpy as np

from terdit_jax.data.reader import make_batches
from terdit_jax.parallel.sharding import batch_sharding, local_block
from terdit_jax.training.setup import Setup


def device_batches(setup: Setup, start: int) -> Iterator[dict[str, Array]]:
    """Global batches on the mesh from step `start` on, one always on its way while another is used."""
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
    ready = to_devices(setup.mesh, next(batches), batch_size)
    for batch in batches:
        following = to_devices(setup.mesh, batch, batch_size)
        yield ready
        ready = following


def to_devices(mesh: Mesh, batch: dict[str, np.ndarray], batch_size: int) -> dict[str, Array]:
    """This process's records to their part of the global batch. Positions stay behind: row r of a global batch is
    position r of its step, which is all that keys its draws."""
    sharding = batch_sharding(mesh)
    arrays = {name: array for name, array in batch.items() if name != "position"}
    return {
        name: jax.make_array_from_process_local_data(sharding, array, (batch_size, *array.shape[1:]))
        for name, array in arrays.items()
    }
