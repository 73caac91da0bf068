"""The optimizer of the published recipe: clipped AdamW at a constant rate that drops once, late, and an EMA beside it.

Whether an update is taken at all is `step`'s decision.
"""

import jax
from jax import Array
import jax.numpy as jnp
import optax

from terdit_jax.config import OptimizerConfig


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
