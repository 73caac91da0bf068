"""Where a sampler with few steps takes them: the timesteps of the trained process that it visits.

The process thinned out to those steps is `schedule.respace`'s.
"""

import numpy as np

from terdit_jax.choices import SOLVERS, SPACINGS
from terdit_jax.diffusion.schedule import Schedule, space_timesteps
from terdit_jax.errors import UserError

EXPONENTS = {"quadratic": 2.0, "power": 2.5}


def choose_timesteps(
    schedule: Schedule, num_steps: int, spacing: str = "auto", method: str = "ddpm"
) -> tuple[int, ...]:
    """The timesteps to visit, ascending, the first and the last of the schedule among them.

    Args:
      schedule: the process trained on.
      num_steps: how many.
      spacing: between neighbours, before rounding to whole timesteps, of which none is taken twice:
        "uniform": equal in t, as `space_timesteps` has it and published results were made;
        "quadratic": t grows as the square of the place (Song et al. 2021, arXiv 2010.02502, appendix D.2);
        "power": as its 2.5th power. Between uniform steps, which leave the last of the noise to one great leap, and
          equal steps of the log-SNR, which spend half of their number where the image is decided already; the best
          for the solvers on Gaussian mixtures and on digits (benchmarks/samplers.py);
        "logsnr": equal in log(signal / noise) (Lu et al. 2022, arXiv 2206.00927, section 3.4);
        "auto": "power" for the solvers of `multistep`, "uniform" for the others.
      method: of `choices.METHODS`, for "auto".

    Raises:
      UserError: a spacing of another name, or a number of steps that is not between 1 and the schedule's.
    """
    spacing = resolve_spacing(spacing, method)
    if spacing not in SPACINGS:
        raise UserError(f"{spacing!r} is no spacing of timesteps: give one of auto, {', '.join(SPACINGS)}")
    if spacing == "uniform":
        return space_timesteps(schedule.num_timesteps, num_steps)
    last = schedule.num_timesteps - 1
    if not 1 <= num_steps <= last + 1:
        raise UserError(f"{num_steps} timesteps: give 1 to {last + 1}")
    if num_steps == 1:
        return (last,)
    place = np.linspace(0, 1, num_steps)
    if spacing == "logsnr":
        rising = np.log(schedule.sqrt_one_minus_alphas_cumprod / schedule.sqrt_alphas_cumprod)
        wanted = np.interp(rising[0] + place * (rising[-1] - rising[0]), rising, np.arange(last + 1.0))
    else:
        wanted = last * place ** EXPONENTS[spacing]
    order = np.arange(num_steps)
    # Where steps lie closer than timesteps do, each takes the next that is free.
    distinct = np.maximum.accumulate(np.rint(wanted).astype(int) - order) + order
    return tuple(int(t) for t in np.minimum(distinct, last - num_steps + 1 + order))


def resolve_spacing(spacing: str, method: str) -> str:
    """The spacing that "auto" means for a method of `choices.METHODS`; any other as it is."""
    if spacing != "auto":
        return spacing
    return "power" if method in SOLVERS else "uniform"
