"""Traces of chosen steps for xprof or TensorBoard's profile plug-in, in WORKDIR/profile."""

import re
from typing import NamedTuple

from absl import logging
from etils import epath
import jax

from terdit_jax.errors import UserError, in_a_line

FOLDER = "profile"


class Steps(NamedTuple):
    """The first and the last step of a trace; steps are counted from 1."""

    first: int
    last: int


def parse_steps(text: str | None) -> Steps | None:
    """FIRST:LAST as written on the command line; None if left out. Raises UserError if it is anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", text)
    steps = Steps(*map(int, match.groups())) if match else Steps(0, 0)
    if not 0 < steps.first <= steps.last:
        raise UserError(f"--profile={text}: give the first and the last step, as --profile=100:105")
    return steps


class Profiler:
    """Starts a trace in front of the first step of its range that this run makes, and ends it behind the last."""

    def __init__(self, workdir: epath.PathLike, steps: Steps | None):
        self._folder, self._steps = epath.Path(workdir) / FOLDER, steps
        self._running = False

    def before(self, step: int) -> None:
        """Called in front of step `step`."""
        if self._steps and not self._running and self._steps.first <= step <= self._steps.last:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, state: dict) -> bool:
        """Called behind step `step`, which gave `state`; whether a trace was completed."""
        if not self._running or step < self._steps.last:
            return False
        jax.block_until_ready(state)
        return self.close()

    def close(self) -> bool:
        """Ends a trace that is running; whether it is on disk now."""
        if not self._running:
            return False
        self._running, self._steps = False, None
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:  # the profiler's own errors are RuntimeErrors
            logging.error("no trace in %s: %s", self._folder, in_a_line(error))
            return False
        return True
