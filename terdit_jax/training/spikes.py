"""The guard against loss spikes: whether a step's loss lies too far above a running mean to be learned from.

Its statistics are part of the training state, so that a resumed run skips what the uninterrupted one would have
skipped. What skipping means is `step`'s.
"""

from jax import Array
import jax.numpy as jnp

from terdit_jax.config import OptimizerConfig


def empty_spikes() -> dict[str, Array]:
    """Of no step yet: {"total", "seen"} () int32, steps skipped and finite steps judged, {"mean", "variance"} ()
    float32 of their losses."""
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
