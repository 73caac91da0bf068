"""The training state: a nested dict of everything that the next step depends on, and its shardings.

A part of it is what has been seen since the last log, so that a resumed run logs the same lines. `checkpoints` saves
the state; `step` maps one to the next.
"""

import jax
from jax import Array, lax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from terdit_jax.model.config import DiTConfig
from terdit_jax.model.transformer import init_params, packed_operands
from terdit_jax.parallel.sharding import abstract_sharded, place
from terdit_jax.reproducible import make_key
from terdit_jax.ternary.linear import PackedLinear
from terdit_jax.training.optimizer import empty_spikes

State = dict


def init_state(
    model: DiTConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
    params: dict | None = None,
    *,
    taught: bool = False,
) -> State:
    """A fresh state, from fresh parameters or from those given; `taught`: of a run with a teacher.

    Returns:
      step () int32: updates tried so far.
      params, ema_params: float32 trees of `init_params`; the EMA starts as a copy.
      opt_state: the optimizer's.
      skipped: {"total", "consecutive"} () int32 non-finite updates.
      spikes: losses skipped as spikes, and the statistics they are judged by (see `optimizer.empty_spikes`).
      window: what has been seen since the last log (see `empty_sums` and `packed_codes`).
    """
    params = init_params(model, make_key(seed)) if params is None else params
    return {
        "step": jnp.int32(0),
        "params": params,
        "ema_params": jax.tree.map(jnp.copy, params),
        "opt_state": optimizer.init(params),
        "skipped": {"total": jnp.int32(0), "consecutive": jnp.int32(0)},
        "spikes": empty_spikes(),
        "window": {"sums": empty_sums(taught=taught), "codes": packed_codes(model, params)},
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


def abstract_state(
    model: DiTConfig, optimizer: optax.GradientTransformation, mesh: Mesh, *, taught: bool = False
) -> State:
    """The state as shapes with their shardings; nothing is allocated."""
    return abstract_sharded(jax.eval_shape(lambda: init_state(model, optimizer, 0, taught=taught)), mesh)


def make_state(
    model: DiTConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    params: dict | None = None,
    *,
    taught: bool = False,
) -> State:
    """A fresh state, created sharded: no device ever holds more than its part.

    Args:
      model: the architecture.
      optimizer: of `make_optimizer`.
      mesh: the devices.
      seed: of fresh parameters.
      params: float32 host arrays to start from instead, whole in every process.
      taught: whether the run has a teacher.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh, taught=taught))
    make = jax.jit(lambda params: init_state(model, optimizer, seed, params, taught=taught), out_shardings=shardings)
    if params is not None:
        params = jax.tree.map(place, params, shardings["params"])
    with jax.set_mesh(mesh):
        return make(params)


NUM_QUARTILES = 4


def empty_sums(*, taught: bool = False) -> dict[str, Array]:
    """Sums over steps, all float32: scalars, and (4,) by quartile of t. Terms that an objective lacks stay 0; that of a
    teacher is there in runs that have one."""
    names = ("steps", "loss", "mse", "vb", "grad_norm", *(["distillation"] if taught else []))
    scalars = {name: jnp.float32(0) for name in names}
    return scalars | {name: jnp.zeros(NUM_QUARTILES, jnp.float32) for name in ("quartile_loss", "quartile_count")}


def quartile_sums(losses: Array, quartile: Array) -> dict[str, Array]:
    """losses (B,), quartile of each t (B,) int32 -> the summed loss and the count in each, (4,) float32."""
    member = jax.nn.one_hot(quartile, NUM_QUARTILES, dtype=jnp.float32)
    return {"quartile_loss": jnp.sum(losses[:, None] * member, 0), "quartile_count": member.sum(0)}


def means(sums: dict[str, Array], terms: tuple[str, ...]) -> dict[str, Array]:
    """The figures of a window: means of the loss's terms over its steps; NaN where nothing was summed."""
    out = {name: sums[name] / sums["steps"] for name in (*terms, "grad_norm")}
    by_quartile = sums["quartile_loss"] / sums["quartile_count"]
    return out | {f"loss_t{i + 1}of{NUM_QUARTILES}": by_quartile[i] for i in range(NUM_QUARTILES)}


def code_statistics(before: dict, after: dict) -> dict[str, Array]:
    """For each kind of layer, the share of codes that are zero now and the share that changed, from packed codes.

    Args:
      before, after: `state.packed_codes` at the last log and now.
    """
    out: dict[str, Array] = {}
    for kind in after.get("blocks", {}):
        old, new = (jax.tree.leaves(codes["blocks"][kind]) for codes in (before, after))
        total = sum(leaf.size * 4 for leaf in new)
        # Bits 2j+1..2j hold T + 1 in 0..2: only a zero has its low bit set; a change is any differing bit of a pair.
        zeros = sum(_count_low_bits(leaf) for leaf in new)
        changes = sum(_count_low_bits((a ^ b) | (a ^ b) >> 1) for a, b in zip(old, new, strict=True))
        out |= {f"zero_share/{kind}": zeros / total, f"changed_share/{kind}": changes / total}
    return out


def _count_low_bits(pairs: Array) -> Array:
    """How many 2-bit fields of a uint8 array have their low bit set, as float32 (billions overflow int32)."""
    return jnp.sum(lax.population_count(pairs & jnp.uint8(0b01010101)).astype(jnp.float32))
