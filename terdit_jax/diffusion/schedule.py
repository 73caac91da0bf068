"""The noise schedule: its float64 tables, the timesteps a shorter sampler visits, and the schedule over those alone.

What is computed from the tables belongs to `loss` and `sampler`; here nothing knows about a model.
"""

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from terdit_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity, so that it can be a static argument of jit
class Schedule:
    """Tables of a diffusion process, one float64 entry a step, in the notation of Ho et al. 2020 (arXiv 2006.11239).

    A step t is an index into the tables; `timestep_map[t]` is the timestep that the network is told.
    """

    betas: np.ndarray
    alphas_cumprod: np.ndarray
    alphas_cumprod_prev: np.ndarray  # 1 before the first step
    sqrt_alphas_cumprod: np.ndarray  # q(x_t | x_0) = N(sqrt_alphas_cumprod x_0, sqrt_one_minus_alphas_cumprod^2)
    sqrt_one_minus_alphas_cumprod: np.ndarray
    sqrt_recip_alphas_cumprod: np.ndarray  # x_0 = sqrt_recip_alphas_cumprod x_t - sqrt_recipm1_alphas_cumprod eps
    sqrt_recipm1_alphas_cumprod: np.ndarray
    posterior_variance: np.ndarray  # of q(x_{t-1} | x_t, x_0); 0 at the first step
    posterior_log_variance_clipped: np.ndarray  # its logarithm, the first entry replaced by the second
    posterior_mean_coef1: np.ndarray  # weight of x_0 in the mean of q(x_{t-1} | x_t, x_0)
    posterior_mean_coef2: np.ndarray  # weight of x_t
    timestep_map: np.ndarray  # int32

    @property
    def num_timesteps(self) -> int:
        """Number of steps."""
        return len(self.betas)


def linear_schedule(num_timesteps: int = 1000) -> Schedule:
    """The schedule with betas rising linearly from 1e-4 to 0.02 over 1000 steps (Ho et al. 2020, section 4).

    Other lengths scale both ends by 1000 / num_timesteps, as guided-diffusion does, to end at the same noise.

    Raises:
      ValueError: num_timesteps is 20 or less, which would take the last beta to 1 or beyond.
    """
    if num_timesteps <= 20:
        raise ValueError(f"a linear schedule of {num_timesteps} steps would reach a beta of 1: use more than 20")
    scale = 1000 / num_timesteps
    betas = np.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=np.float64)
    return _from_betas(betas, np.arange(num_timesteps))


def space_timesteps(num_timesteps: int, section_counts: int | str | Sequence[int]) -> tuple[int, ...]:
    """The timesteps that a sampler with fewer steps visits, ascending, as guided-diffusion's function of this name.

    Args:
      num_timesteps: length of the schedule trained on.
      section_counts: a count; counts as a sequence or as "10,15,20", one for each of the equal sections of the
        schedule; or "ddimN", N steps at an integer stride from 0 (Song et al. 2021, arXiv 2010.02502).

    Raises:
      UserError: a count that is no positive integer, exceeds its section, or has no integer stride.
    """
    if isinstance(section_counts, str) and section_counts.startswith("ddim"):
        return _strided_timesteps(num_timesteps, section_counts)
    counts = _parse_counts(section_counts)
    section_size, remainder = divmod(num_timesteps, len(counts))
    timesteps = []
    start = 0
    for section, count in enumerate(counts):
        size = section_size + (section < remainder)
        if not 1 <= count <= size:
            raise UserError(f"{count} timesteps (of {section_counts!r}) in a section of {size}: give 1 to {size}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            timesteps.append(start + round(position))
            position += stride  # summed, not multiplied: where a half is rounded the two can differ by a timestep
        start += size
    return tuple(timesteps)


def respace(schedule: Schedule, timesteps: Sequence[int]) -> Schedule:
    """The process seen only at `timesteps`: betas such that alphas_cumprod is unchanged there (arXiv 2102.09672, 4).

    Args:
      schedule: the process to thin out.
      timesteps: steps of it, strictly ascending.

    Raises:
      ValueError: timesteps that are not ascending or lie outside the schedule.
    """
    steps = np.asarray(timesteps, np.int64)
    if steps.size == 0 or steps[0] < 0 or steps[-1] >= schedule.num_timesteps or np.any(np.diff(steps) <= 0):
        raise ValueError(f"timesteps must ascend within 0..{schedule.num_timesteps - 1}, got {list(timesteps)}")
    alphas_cumprod = schedule.alphas_cumprod[steps]
    betas = 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
    return _from_betas(betas, schedule.timestep_map[steps])


def gather(table: np.ndarray, t: jax.Array, ndim: int = 4) -> jax.Array:
    """Entries t (B,) of a table as float32, shaped (B, 1, ..., 1) to broadcast against an array of `ndim` axes."""
    return jnp.asarray(table, jnp.float32)[t].reshape(t.shape + (1,) * (ndim - 1))


def _from_betas(betas: np.ndarray, timestep_map: np.ndarray) -> Schedule:
    alphas_cumprod = np.cumprod(1.0 - betas)
    alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
    posterior_variance = betas * (1.0 - alphas_cumprod_prev) / (1.0 - alphas_cumprod)
    # A schedule of one step has no second entry; its only step adds no noise, and beta keeps the logarithm finite.
    first_variance = posterior_variance[1] if len(betas) > 1 else betas[0]
    return Schedule(
        betas=betas,
        alphas_cumprod=alphas_cumprod,
        alphas_cumprod_prev=alphas_cumprod_prev,
        sqrt_alphas_cumprod=np.sqrt(alphas_cumprod),
        sqrt_one_minus_alphas_cumprod=np.sqrt(1.0 - alphas_cumprod),
        sqrt_recip_alphas_cumprod=np.sqrt(1.0 / alphas_cumprod),
        sqrt_recipm1_alphas_cumprod=np.sqrt(1.0 / alphas_cumprod - 1.0),
        posterior_variance=posterior_variance,
        posterior_log_variance_clipped=np.log(np.append(first_variance, posterior_variance[1:])),
        posterior_mean_coef1=betas * np.sqrt(alphas_cumprod_prev) / (1.0 - alphas_cumprod),
        posterior_mean_coef2=(1.0 - alphas_cumprod_prev) * np.sqrt(1.0 - betas) / (1.0 - alphas_cumprod),
        timestep_map=timestep_map.astype(np.int32),
    )


def _strided_timesteps(num_timesteps: int, section_counts: str) -> tuple[int, ...]:
    for stride in range(1, num_timesteps):
        timesteps = range(0, num_timesteps, stride)
        if section_counts == f"ddim{len(timesteps)}":
            return tuple(timesteps)
    raise UserError(f"{section_counts!r}: no integer stride takes this many of {num_timesteps} timesteps; drop 'ddim'")


def _parse_counts(section_counts: int | str | Sequence[int]) -> tuple[int, ...]:
    parts = section_counts.split(",") if isinstance(section_counts, str) else np.atleast_1d(section_counts)
    try:
        counts = tuple(int(str(part)) for part in parts)  # through text, so that 2.5 is refused, not cut
    except ValueError:
        counts = ()
    if not counts:
        raise UserError(f"{section_counts!r} is no number of timesteps: give a count, 'a,b,c' or 'ddimN'")
    return counts
