"""Guided sampling from operands: whole loops in one jit, each image fixed by (seed, its index).

`runtime` loads the weights; `images` writes images to disk.
"""

from collections.abc import Callable
from functools import partial

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from terdit_jax.batches import in_flight
from terdit_jax.choices import MAX_CFG_SCALE, NUM_TIMESTEPS
from terdit_jax.config import FIELDS
from terdit_jax.config_sections import SampleConfig
from terdit_jax.diffusion.guidance import ConditionalDenoise, guided
from terdit_jax.diffusion.objective import Objective
from terdit_jax.errors import UserError
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.depth import RunBlocks, scan_blocks
from terdit_jax.model.transformer import forward
from terdit_jax.parallel.compiler_options import Options
from terdit_jax.parallel.sharding import batch_sharding, batch_shards, constrain, place
from terdit_jax.reproducible import PRNG, key_bits

# Operands, labels (B,), image indices (B,), `reproducible.key_bits` of the seed -> (B, H, W, C).
Draw = jax.stages.Wrapped


# Operands, all timesteps (S,) of a drawing, labels (B,) of its images -> the network for it.
Bind = Callable[[dict, np.ndarray, Array], ConditionalDenoise]


def make_draw(
    model: DiTConfig,
    objective: Objective,
    settings: SampleConfig,
    bind: Bind | None = None,
    compiler_options: Options | None = None,
    run_blocks: RunBlocks = scan_blocks,
) -> Draw:
    """A jitted function that draws images with one set of sampling settings.

    Image i starts from, and is disturbed by, noise that depends on (seed, i) alone: neither the batch it is drawn in
    nor the mesh changes it beyond float rounding. All seeds share one program.

    Args:
      model: the architecture.
      objective: what it was trained on.
      settings: a run's `config.sample`.
      bind: makes the network, as `inference_pass.bind_schedule`; `model.transformer.forward` if left out.
      compiler_options: of `modes.compiler_options`.
      run_blocks: of the model's plan, for `forward`.

    Raises:
      UserError: settings that the objective's samplers do not know.
    """
    check_settings(settings, objective)
    last = None if settings.cfg_t_max == NUM_TIMESTEPS else settings.cfg_t_max

    @partial(jax.jit, compiler_options=compiler_options)
    def draw(operands: dict, labels: Array, indices: Array, bits: Array) -> Array:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.wrap_key_data(bits, impl=PRNG), indices)
        normal = jax.vmap(lambda key: jax.random.normal(key, model.sample_shape, jnp.float32))

        def noise(i: Array | int) -> Array:
            return constrain(normal(jax.vmap(jax.random.fold_in, (0, None))(keys, i)), "batch", None, None, None)

        if bind:
            network = bind(operands, objective.times(settings), labels)
        else:
            network = partial(forward, model, operands, run_blocks=run_blocks)
        scale, channels = settings.cfg_scale, settings.cfg_channels
        interval = settings.cfg_t_min, last, objective.timestep
        denoise = guided(network, labels, model.num_classes, scale, channels, *interval)
        # Step i adds noise i + 1; noise 0 is where the image starts.
        return objective.sample(denoise, noise(0), lambda i: noise(i + 1), settings)

    return draw


def check_settings(settings: SampleConfig, objective: Objective) -> None:
    """Raises UserError naming the first field, as of `config.sample`, that no sampler of the objective can follow."""
    for name, value in vars(settings).items():
        FIELDS[f"sample.{name}"].check_type(value, name)
    for field, value, known in (
        ("method", settings.method, objective.methods),
        ("spacing", settings.spacing, objective.spacings),
    ):
        if value not in known:
            raise UserError(f"sample.{field}={value!r} samples no {objective.name} model: give {', '.join(known)}")
    low, high = settings.cfg_t_min, settings.cfg_t_max
    if not 0 <= low < high <= NUM_TIMESTEPS:
        raise UserError(f"guidance from timestep {low} to {high}: give 0 <= cfg_t_min < cfg_t_max <= {NUM_TIMESTEPS}")
    if not 1 <= settings.num_steps <= NUM_TIMESTEPS:
        raise UserError(f"{settings.num_steps} timesteps: give 1 to {NUM_TIMESTEPS}")
    if not 0 <= settings.cfg_scale <= MAX_CFG_SCALE:
        raise UserError(f"cfg_scale={settings.cfg_scale}: give a number from 0 to {MAX_CFG_SCALE}")


def draw_all(
    draw: Draw,
    operands: dict,
    labels: np.ndarray,
    mesh: Mesh,
    seed: int,
    *,
    batch_size: int,
    report: Callable[[int], None],
    first: int = 0,
    whole_batches: bool = False,
) -> np.ndarray:
    """Draws an image for each label, batch by batch, over all devices of the mesh.

    Args:
      draw: of `make_draw`.
      operands: of the model's parameters, on the mesh.
      labels: (N,) int.
      mesh: the devices.
      seed: of all noise.
      batch_size: images at once, rounded up to the number of devices that share a batch.
      report: called with the number of images done so far.
      first: index of the first image.
      whole_batches: fill up a batch also where there are fewer labels than `batch_size`: one program for any number.

    Returns:
      (N, H, W, C) float32 on the host, of every process that has a part in the mesh.
    """
    at_once = batch_size if whole_batches else min(batch_size, len(labels))
    bits, batch_size = key_bits(seed), _fit_batch(at_once, mesh)

    def draw_batch(start: int) -> Array:
        indices = first + np.arange(start, start + batch_size, dtype=np.int32)
        # The last batch is filled up with further images, which are dropped: one shape, one compilation.
        batch_labels = np.resize(labels[start : start + batch_size], batch_size).astype(np.int32)
        with jax.set_mesh(mesh):
            return draw(operands, *(place(values, batch_sharding(mesh)) for values in (batch_labels, indices)), bits)

    images = []
    for batch in in_flight(map(draw_batch, range(0, len(labels), batch_size))):
        images.append(_gather(batch))
        report(min(len(images) * batch_size, len(labels)))
    return np.concatenate(images)[: len(labels)]


def compile_draw(draw: Draw, operands: dict, count: int, mesh: Mesh, batch_size: int) -> None:
    """Compiles what `draw_all` then runs for `count` labels; the operands are shapes with their shardings."""
    at_once = _fit_batch(min(batch_size, count), mesh)
    numbers = jax.ShapeDtypeStruct((at_once,), jnp.int32, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        draw.lower(operands, numbers, numbers, key_bits(0)).compile()


def _fit_batch(batch_size: int, mesh: Mesh) -> int:
    shards = batch_shards(mesh)
    return -(-batch_size // shards) * shards


def _gather(batch: Array) -> np.ndarray:
    if batch.is_fully_addressable:
        return np.asarray(batch)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(batch, tiled=True))
