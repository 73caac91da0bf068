"""What a run accumulates on the device between two logs, and the figures it becomes.

It lives in the training state, so a run that is killed and resumed writes the very lines it would have written; where
the lines go is `metrics`'s.
"""

import jax
from jax import Array, lax
import jax.numpy as jnp

NUM_QUARTILES = 4


def empty_sums() -> dict[str, Array]:
    """Sums over steps, all float32: scalars, and (4,) by quartile of the timestep."""
    scalars = {name: jnp.float32(0) for name in ("steps", "loss", "mse", "vb", "grad_norm")}
    return scalars | {name: jnp.zeros(NUM_QUARTILES, jnp.float32) for name in ("quartile_loss", "quartile_count")}


def quartile_sums(losses: Array, t: Array, num_timesteps: int) -> dict[str, Array]:
    """losses (B,), t (B,) -> the summed loss and the count in each quartile of t, (4,) float32 each."""
    member = jax.nn.one_hot(t * NUM_QUARTILES // num_timesteps, NUM_QUARTILES, dtype=jnp.float32)
    return {"quartile_loss": jnp.sum(losses[:, None] * member, 0), "quartile_count": member.sum(0)}


def means(sums: dict[str, Array]) -> dict[str, Array]:
    """The figures of a window: means over its steps; NaN where nothing was summed."""
    out = {name: sums[name] / sums["steps"] for name in ("loss", "mse", "vb", "grad_norm")}
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
