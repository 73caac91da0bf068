"""The target a network learns to predict, and all that follows: the t and x_t of an example, its loss, and sampling.

Training and sampling are handed one of the two objectives and ask nothing else which it is.
"""

import dataclasses
from typing import ClassVar

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from terdit_jax.choices import FLOW_METHODS, METHODS, NUM_TIMESTEPS, SPACINGS
from terdit_jax.config_sections import DiffusionConfig, SampleConfig
from terdit_jax.diffusion.flow import flow_losses, interpolate, shifted
from terdit_jax.diffusion.flow_sampler import flow_sample, flow_times
from terdit_jax.diffusion.guidance import Denoise, DrawNoise
from terdit_jax.diffusion.loss import q_sample, training_losses
from terdit_jax.diffusion.sampler import sample
from terdit_jax.diffusion.schedule import Schedule, linear_schedule, respace
from terdit_jax.diffusion.spacing import choose_timesteps
from terdit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Ddpm:
    """The noise and a learned variance, at integer timesteps; 0 is nearly clean. Also documents `Flow`'s methods."""

    schedule: Schedule = dataclasses.field(default_factory=lambda: linear_schedule(NUM_TIMESTEPS))
    name: ClassVar[str] = "ddpm"
    terms: ClassVar[tuple[str, ...]] = ("loss", "mse", "vb")  # of `losses`
    methods: ClassVar[tuple[str, ...]] = METHODS
    spacings: ClassVar[tuple[str, ...]] = ("auto", *SPACINGS)

    def draw_t(self, key: Array) -> Array:
        """The () t of an example, int32 or (flow) float32."""
        return jax.random.randint(key, (), 0, self.schedule.num_timesteps, jnp.int32)

    def noised(self, x_0: Array, t: Array, noise: Array) -> Array:
        """x_0, noise (B, H, W, C), t (B,) -> x_t."""
        return q_sample(self.schedule, x_0, t, noise)

    def losses(self, out: Array, x_0: Array, x_t: Array, t: Array, noise: Array) -> dict[str, Array]:
        """Each of `terms` by example, (B,) float32, from the network's output at (x_t, t)."""
        return training_losses(self.schedule, out, x_0, x_t, t, noise)

    def part(self, t: Array, parts: int) -> Array:
        """The index of the part that t (B,) lies in, of `parts` equal parts of its range, int32."""
        return t * parts // self.schedule.num_timesteps

    def timestep(self, t: Array) -> Array:
        """t on the scale of `NUM_TIMESTEPS`, on which an interval of guidance is given."""
        return t

    def times(self, settings: SampleConfig) -> np.ndarray:
        """All t that sampling asks the network for, as it gets them."""
        return np.asarray(choose_timesteps(self.schedule, settings.num_steps, settings.spacing, settings.method))

    def sample(self, denoise: Denoise, noise: Array, draw_noise: DrawNoise, settings: SampleConfig) -> Array:
        """Images (B, H, W, C) from noise, as `sampler.sample` and `flow_sampler.flow_sample` draw them."""
        schedule = respace(self.schedule, self.times(settings).tolist())
        return sample(denoise, noise, draw_noise, schedule, settings.method)


@dataclasses.dataclass(frozen=True)
class Flow:
    """The velocity of `flow`, at t from 0 (noise) to 1 (data); the methods are described in `Ddpm`."""

    config: DiffusionConfig
    name: ClassVar[str] = "flow"
    terms: ClassVar[tuple[str, ...]] = ("loss",)
    methods: ClassVar[tuple[str, ...]] = FLOW_METHODS
    spacings: ClassVar[tuple[str, ...]] = ("auto", "uniform")

    def draw_t(self, key: Array) -> Array:
        if self.config.timesteps == "uniform":
            return shifted(jax.random.uniform(key, (), jnp.float32), self.config.shift)
        logit = self.config.logit_mean + self.config.logit_std * jax.random.normal(key, (), jnp.float32)
        return shifted(jax.nn.sigmoid(logit), self.config.shift)

    def noised(self, x_0: Array, t: Array, noise: Array) -> Array:
        return interpolate(self.config.path, x_0, t, noise)

    def losses(self, out: Array, x_0: Array, x_t: Array, t: Array, noise: Array) -> dict[str, Array]:
        return flow_losses(self.config.path, out, x_0, t, noise)

    def part(self, t: Array, parts: int) -> Array:
        return jnp.minimum(t * parts, parts - 1).astype(jnp.int32)

    def timestep(self, t: Array) -> Array:
        # To 1 / 1024: whether a whole timestep lies in an interval is not for the rounding of t to say.
        return jnp.round(1000 * 1024 * (1 - t)) / 1024

    def times(self, settings: SampleConfig) -> np.ndarray:
        times = flow_times(settings.method, settings.num_steps, self.config.shift).astype(np.float32)
        return times if settings.method == "heun" else times[:-1]

    def sample(self, denoise: Denoise, noise: Array, draw_noise: DrawNoise, settings: SampleConfig) -> Array:
        times = flow_times(settings.method, settings.num_steps, self.config.shift)
        return flow_sample(denoise, noise, draw_noise, self.config.path, times, settings.method)


Objective = Ddpm | Flow


def make_objective(config: DiffusionConfig, learn_sigma: bool) -> Objective:
    """The objective that a configuration names.

    Args:
      config: names it.
      learn_sigma: whether the network has output channels for the variance.

    Raises:
      UserError: a field that only flow matching reads, changed for "ddpm", or "ddpm" without a variance.
    """
    if config.objective == "flow":
        return Flow(config)
    if not learn_sigma:
        raise UserError("model.learn_sigma=False: diffusion.objective='ddpm' learns the variance; give True, or 'flow'")
    for field in dataclasses.fields(config):
        if field.name != "objective" and (value := getattr(config, field.name)) != field.default:
            raise UserError(f"diffusion.{field.name}={value!r}: read with diffusion.objective='flow' alone, give both")
    return Ddpm()
