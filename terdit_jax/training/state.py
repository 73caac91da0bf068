"""The training state: a nested dict of everything that the next step depends on, and its shardings.

`checkpoints` saves it; `step` maps one state to the next.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from terdit_jax.errors import UserError
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.transformer import init_params, packed_operands
from terdit_jax.parallel.sharding import abstract_sharded, path_name, place
from terdit_jax.reproducible import make_key
from terdit_jax.ternary.linear import PackedLinear
from terdit_jax.training.spikes import empty_spikes
from terdit_jax.training.window import empty_sums

State = dict


def init_state(
    model: DiTConfig, optimizer: optax.GradientTransformation, seed: int, params: dict | None = None
) -> State:
    """A fresh state, from fresh parameters or from those given.

    Returns:
      step () int32: updates tried so far.
      params, ema_params: float32 trees of `init_params`; the EMA starts as a copy.
      opt_state: the optimizer's.
      skipped: {"total", "consecutive"} () int32 non-finite updates.
      spikes: losses skipped as spikes, and the statistics they are judged by (see `spikes`).
      window: what has been seen since the last log (see `window`), so that a resumed run logs the same lines.
    """
    params = init_params(model, make_key(seed)) if params is None else params
    return {
        "step": jnp.int32(0),
        "params": params,
        "ema_params": jax.tree.map(jnp.copy, params),
        "opt_state": optimizer.init(params),
        "skipped": {"total": jnp.int32(0), "consecutive": jnp.int32(0)},
        "spikes": empty_spikes(),
        "window": {"sums": empty_sums(), "codes": packed_codes(model, params)},
    }


def packed_codes(model: DiTConfig, params: dict) -> dict[str, dict]:
    """The 2-bit codes of every ternary matrix by operand path; empty for a full-precision model."""
    if not model.ternary:
        return {}
    blocks = packed_operands(model, params)["blocks"]
    return {
        "blocks": {
            kind: {
                name: {"packed": map_.packed} for name, map_ in blocks[kind].items() if isinstance(map_, PackedLinear)
            }
            for kind in ("attention", "feed_forward", "adaLN_modulation")
        }
    }


def check_finite(state: State, what: str, advice: str) -> None:
    """Raises UserError if parameters, averages or moments hold a number that is not finite; one pass over them."""
    finite = jax.device_get(_are_finite({name: state[name] for name in ("params", "ema_params", "opt_state")}))
    bad = [path_name(path) for path, leaf in jax.tree_util.tree_leaves_with_path(finite) if not leaf]
    if bad:
        raise UserError(f"{what} holds values that are not finite, in {bad[0]} and {len(bad) - 1} others: {advice}")


@jax.jit
def _are_finite(tree: dict) -> dict:
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree)


def abstract_state(model: DiTConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """The state as shapes with their shardings; nothing is allocated."""
    return abstract_sharded(jax.eval_shape(lambda: init_state(model, optimizer, 0)), mesh)


def make_state(
    model: DiTConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, params: dict | None = None
) -> State:
    """A fresh state, created sharded: no device ever holds more than its part.

    Args:
      model: the architecture.
      optimizer: of `make_optimizer`.
      mesh: the devices.
      seed: of fresh parameters.
      params: float32 host arrays to start from instead, whole in every process.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh))
    make = jax.jit(lambda params: init_state(model, optimizer, seed, params), out_shardings=shardings)
    if params is not None:
        params = jax.tree.map(place, params, shardings["params"])
    with jax.set_mesh(mesh):
        return make(params)
