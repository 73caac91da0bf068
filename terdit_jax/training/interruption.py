"""How a run is asked to stop: SIGTERM from a scheduler, Ctrl-C from a person."""

import contextlib
import os
import signal
import sys
import time

import jax

from terdit_jax.interrupts import STATUS, SignalWatch

_ONE_PRESS_SECONDS = 1.0  # wrappers such as `uv run` pass on a Ctrl-C that the terminal has sent to all already


class Interruption:
    """SIGTERM or Ctrl-C as a request to save and stop, answered with a line at once.

    Schedulers send SIGTERM several times: those after the first change nothing. A second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        self.name = ""
        self._answered: set[int] = set()
        self._pressed = 0.0
        # Across processes, JAX's preemption service agrees on one step; it listens for SIGTERM itself.
        alone = jax.process_count() == 1
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._watch = SignalWatch(numbers, self._answer, self._ask) if alone else contextlib.nullcontext()

    def __enter__(self) -> "Interruption":
        self._watch.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.__exit__(None, None, None)

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`; the same on every process."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self.name = "SIGTERM"
        return bool(self.name)

    def _ask(self, number: int, _: object) -> None:
        self.name = self.name or signal.Signals(number).name

    def _answer(self, number: int) -> None:
        self._ask(number, None)
        now, what = time.monotonic(), "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        if number not in self._answered:
            self._answered.add(number)
            self._pressed = now if number == signal.SIGINT else self._pressed
            again = "; Ctrl-C again stops at once, without saving" if number == signal.SIGINT else ""
            _say(f"{what}: stops after the step under way, once the state is saved{again}")
        elif number == signal.SIGINT and now - self._pressed > _ONE_PRESS_SECONDS:
            _say("error: stopped at once by a second Ctrl-C, what was not saved is lost")
            os._exit(STATUS)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
