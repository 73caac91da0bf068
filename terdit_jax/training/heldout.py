"""The loss on held-out examples, with noise and timesteps that never change, for raw and averaged weights."""

from collections.abc import Callable

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh

from terdit_jax.config import RunConfig
from terdit_jax.diffusion.schedule import Schedule
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.plan import Plan
from terdit_jax.parallel.sharding import constrain
from terdit_jax.training.examples import example_keys, make_examples
from terdit_jax.training.step import mean_loss, on_mesh

# Keeps the fixed draws apart from training's, which use the seed itself.
_SEED_OFFSET = 0x5EED


def make_heldout_loss(
    config: RunConfig, model: DiTConfig, schedule: Schedule, mesh: Mesh, latent_scale: float, plan: Plan
) -> Callable[[dict, dict, Array], Array]:
    """The jitted mean loss of a held-out batch, (params, global batch, its number) -> (): no label dropout."""

    def heldout_loss(params: dict, batch: dict[str, Array], number: Array) -> Array:
        # Keyed by the place among all held-out examples: how they are cut into batches changes nothing.
        size = len(batch["label"])
        keys = example_keys(config.seed + _SEED_OFFSET, 0, number * size + jnp.arange(size, dtype=jnp.int32))
        examples = make_examples(
            batch,
            constrain(keys, "batch"),
            schedule,
            latent_scale=latent_scale,
            num_classes=model.num_classes,
            class_dropout_prob=0.0,
        )
        return mean_loss(model, schedule, plan.make_operands(model, params), examples, plan)[0]

    return on_mesh(mesh, jax.jit(heldout_loss))
