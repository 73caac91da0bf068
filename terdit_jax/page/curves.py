"""Chooses the curves of a report from the figures of its runs: which charts there are, their points, the unit of time.

Figures are those of metrics.jsonl as docs/training.md has them; the script of the page draws them.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import math
import re
from typing import NamedTuple

import numpy as np

from terdit_jax.page.workdir import Run, spent, timing
from terdit_jax.untrusted import is_number

LOSS, QUARTERS, RATES, SCORES, OTHERS = "loss", "quarters", "rates", "scores", "others"
_POINTS = 1800  # of one figure, of all runs together: as many as a chart has pixels, and the page stays small
_UNITS = ((172_800, 86_400, "days"), (7200, 3600, "hours"), (120, 60, "minutes"), (0, 1, "seconds"))
LARGEST = 1e300
_LEFT_OUT = ("step", "eta_seconds", "restarts", "goodput")

Points = dict[int, float | None]  # value by step; None where nothing finite was seen


class Kind(NamedTuple):
    """A kind of chart. Attributes:

    section: of the page.
    title: of the chart.
    log: whether its axis is logarithmic at first.
    solid: the figure that is drawn.
    dashed: another one beside it, and what its curve is called; "" for none.
    """

    section: str
    title: str
    log: bool
    solid: str
    dashed: str = ""
    called: str = ""


_KINDS = (
    Kind(LOSS, "Training loss", True, "loss"),
    Kind(LOSS, "Held-out loss, averaged weights", True, "heldout_loss_ema", "heldout_loss", "raw weights"),
    *(
        Kind(QUARTERS, f"Timesteps of {how} noise", True, f"noise {i}")
        for i, how in enumerate(("least", "less", "more", "most"))
    ),
    Kind(RATES, "Images a second", False, "images_per_second"),
    Kind(RATES, "Learning rate", False, "learning_rate"),
    Kind(RATES, "Gradient norm", True, "grad_norm"),
)


@dataclasses.dataclass
class Series:
    """One curve: points of a run, ascending in steps; `time` is empty for a run whose metrics tell none."""

    run: int
    label: str
    dashed: bool
    step: list[int]
    time: list[float]
    value: list[float | None]


@dataclasses.dataclass
class Chart:
    """The curves of one kind, those of the runs that have the figure."""

    kind: Kind
    series: list[Series]


def make_charts(runs: Sequence[Run], figures: Sequence[dict[str, Points]], second: float) -> list[Chart]:
    """The charts that have a curve at all, in the order of the page.

    Args:
      runs: one or more.
      figures: of each, by `figures_of`.
      second: a second in the unit of time.
    """
    scores = set().union(*map(_score_names, runs))
    known = {name for kind in _KINDS for name in (kind.solid, kind.dashed)}
    rest = sorted(set().union(*figures) - known)
    moving = {name for of in figures for name, points in of.items() if len(set(points.values())) > 1}
    kinds = [*_KINDS, *(Kind(SCORES if name in scores & moving else OTHERS, name, False, name) for name in rest)]
    clocks = [_clock(run, second) for run in runs]
    charts = []
    for kind in kinds:
        series = [
            _series(number, label, name == kind.dashed, figures[number][name], clocks[number], len(runs))
            for number, run in enumerate(runs)
            for name, label in ((kind.solid, run.name), (kind.dashed, f"{run.name}, {kind.called}"))
            if name in figures[number]
        ]
        if series:
            charts.append(Chart(kind, series))
    return charts


def unit_of(seconds: Iterable[float]) -> tuple[float, str]:
    """The seconds of the unit in which the longest of some times is easily read, and its name."""
    longest = max(seconds, default=0.0)
    return next((size, name) for least, size, name in _UNITS if longest >= least)


def figures_of(run: Run) -> dict[str, Points]:
    """Every figure of a run that is a number once at least, by name; quarters of timesteps are named by their noise."""
    found: dict[str, Points] = {}
    for line in sorted(run.lines, key=lambda line: line["step"]):
        for name, value in (line | timing(line)).items():
            if name in _LEFT_OUT or name.startswith("seconds_"):
                continue
            if is_number(value, -LARGEST, LARGEST) or value is None:
                found.setdefault(_by_noise(run, name), {})[line["step"]] = value
    return {name: points for name, points in found.items() if any(value is not None for value in points.values())}


def _by_noise(run: Run, name: str) -> str:
    """Quarter 1 of t has the least noise under ddpm, and the most under flow."""
    if not (match := re.fullmatch("loss_t([1-4])of4", name)):
        return name
    flow = run.config.get("diffusion.objective") == "flow"
    return f"noise {4 - int(match[1]) if flow else int(match[1]) - 1}"


def _score_names(run: Run) -> set[str]:
    """The figures of lines that are neither of training nor of held-out loss: scores of samples."""
    lines = (line for line in run.lines if not {"loss", "heldout_loss"} & line.keys())
    return {name for line in lines for name in line}


def _clock(run: Run, second: float) -> tuple[list[int], list[float]]:
    """Steps, and the time at work up to them; both ascend."""
    kinds = {line["step"]: spent(timing(line)) for line in run.lines if spent(timing(line))}
    steps = sorted(kinds)
    times = [second * sum(value for kind, value in kinds[step].items() if kind != "down") for step in steps]
    return steps, np.maximum.accumulate(times).tolist() if steps else []


def _series(
    run: int, label: str, dashed: bool, points: Points, clock: tuple[list[int], list[float]], runs: int
) -> Series:
    steps = _thinned(points, max(20, _POINTS // runs))
    values = [None if value is None else _short(value) for value in map(points.get, steps)]
    time = [_short(moment) for moment in np.interp(steps, *clock)] if clock[0] else []
    return Series(run, label, dashed, steps, time, values)


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _thinned(points: Points, at_most: int) -> list[int]:
    """The steps of the points to draw: all, or the lowest and the highest of each stretch, so that no peak is lost."""
    steps = list(points)
    if len(steps) <= at_most:
        return steps
    kept = {steps[0], steps[-1]}
    for part in np.array_split(steps, at_most // 2 - 1):
        ordered = sorted(part.tolist(), key=lambda step: _or_lowest(points[step]))
        kept |= {ordered[0], ordered[-1]}
    return sorted(kept)


def _or_lowest(value: float | None) -> float:
    return -math.inf if value is None else value
