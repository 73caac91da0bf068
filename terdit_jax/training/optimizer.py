"""The optimizer of the published recipe, and the guard against loss spikes.

Clipped AdamW at a constant rate that drops once, late, with an EMA of the parameters. Whether an update is taken is
decided in `step`.
"""

import jax
from jax import Array
import jax.numpy as jnp
import optax

from terdit_jax.config_sections import OptimizerConfig


def learning_rate_schedule(optimizer: OptimizerConfig) -> optax.Schedule:
    """Constant `learning_rate`; from `drop_step` on, if that is not 0, constant `drop_learning_rate`.

    Ternary codes settle when the rate falls: the share that flips at each step drops with it (TerDiT section 4.3).
    """
    constant = optax.constant_schedule(optimizer.learning_rate)
    if not optimizer.drop_step:
        return constant
    return optax.join_schedules(
        [constant, optax.constant_schedule(optimizer.drop_learning_rate)], [optimizer.drop_step]
    )


def make_optimizer(optimizer: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Global-norm clip, then AdamW. Source: Large-DiT's training script (betas 0.9 and 0.999, no decay, clip 2).

    `update` takes the norm as `grad_norm`.
    """
    return optax.chain(
        _clip_by_norm(optimizer.clip_norm),
        optax.adamw(
            learning_rate_schedule(optimizer),
            b1=optimizer.b1,
            b2=optimizer.b2,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        ),
    )


def _clip_by_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """optax.clip_by_global_norm of a norm that is known already."""

    def update(updates: dict, state: optax.EmptyState, params: dict | None = None, *, grad_norm: Array) -> tuple:
        del params
        clip = lambda leaf: jnp.where(grad_norm < max_norm, leaf, leaf / grad_norm * max_norm)  # noqa: E731
        return jax.tree.map(clip, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def ema_decay(optimizer: OptimizerConfig, step: Array) -> Array:
    """The EMA's decay after the update of `step` (0 first): constant, or ramped so that short runs forget their start.

    min(ema_decay, (1 + step) / (10 + step)) is the ramp of TensorFlow's ExponentialMovingAverage.
    """
    if not optimizer.ema_ramp:
        return jnp.float32(optimizer.ema_decay)
    return jnp.minimum(optimizer.ema_decay, (1.0 + step) / (10.0 + step)).astype(jnp.float32)


def empty_spikes() -> dict[str, Array]:
    """Statistics before any step: {"total", "seen"} () int32, steps skipped and finite steps judged, and {"mean",
    "variance"} () float32 of their losses."""
    return {
        "total": jnp.int32(0),
        "seen": jnp.int32(0),
        "mean": jnp.float32(0),
        "variance": jnp.float32(0),
    }


def judge_loss(config: OptimizerConfig, spikes: dict[str, Array], loss: Array) -> tuple[Array, dict[str, Array]]:
    """Whether the loss is a spike, and the statistics after it.

    A spike lies more than `spike_sigma` running standard deviations above the running mean; the first `spike_window`
    finite steps are never one. A spike enters the statistics as if it lay at the limit: one of them hardly moves
    them, but a loss that stays at a new level is accepted in the end. A loss that is not finite is no spike and
    leaves them alone.

    Args:
      config: `config.optimizer`; `spike_sigma` 0 finds no spikes.
      spikes: of `empty_spikes` or the step before.
      loss: () float32.

    Returns:
      () bool, and the next statistics.
    """
    finite = jnp.isfinite(loss)
    limit = spikes["mean"] + config.spike_sigma * jnp.sqrt(spikes["variance"])
    watching = (config.spike_sigma > 0) & (spikes["seen"] >= config.spike_window)
    spike = finite & watching & (loss > limit)
    # A plain mean of what has been seen while that is less than the window, an exponential one from then on.
    share = 1 / jnp.minimum(spikes["seen"] + 1, config.spike_window).astype(jnp.float32)
    delta = jnp.where(spike, limit, loss) - spikes["mean"]
    following = {
        "total": spikes["total"] + spike,
        "seen": spikes["seen"] + 1,
        "mean": spikes["mean"] + share * delta,
        "variance": (1 - share) * (spikes["variance"] + share * delta * delta),
    }
    return spike, {name: jnp.where(finite, following[name], spikes[name]) for name in following}
