"""From stored records to what one training step learns from, with every draw keyed by (seed, step, global index).

Because a draw depends on nothing else, mesh, process count and gradient accumulation change no example.
"""

import jax
from jax import Array
import jax.numpy as jnp

from terdit_jax.diffusion.loss import q_sample
from terdit_jax.diffusion.schedule import Schedule
from terdit_jax.reproducible import make_key

Examples = dict[str, Array]  # x_0, noise, x_t (B, H, W, C) float32; t, y (B,) int32


def example_keys(seed: int, step: Array | int, indices: Array) -> Array:
    """(B,) keys, one for each global example index (B,) of a step."""
    step_key = jax.random.fold_in(make_key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(step_key, indices)


def make_examples(
    batch: dict[str, Array],
    keys: Array,
    schedule: Schedule,
    *,
    latent_scale: float,
    num_classes: int,
    class_dropout_prob: float,
) -> Examples:
    """Draws latent, noise, timestep and label dropout of every record.

    Args:
      batch: mean, std (B, H, W, C) float16 of the view that the reader drew, label (B,) int32.
      keys: (B,) of `example_keys`.
      schedule: the 1000-step process.
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

    t = jax.vmap(lambda key: jax.random.randint(key, (), 0, schedule.num_timesteps, jnp.int32))(t_key)
    chance = jnp.float32(class_dropout_prob)
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, chance))(drop_key)
    y = jnp.where(dropped, num_classes, batch["label"])
    noise = normal(noise_key)
    return {"x_0": x_0, "noise": noise, "t": t, "y": y, "x_t": q_sample(schedule, x_0, t, noise)}
