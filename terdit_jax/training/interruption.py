"""How a run is asked to stop: SIGTERM from a scheduler, Ctrl-C from a person."""

import signal
import sys
import threading

import jax


class Interruption:
    """SIGTERM or Ctrl-C as a request to save and stop; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.name = "SIGTERM"
        self._asked = threading.Event()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        # Across processes, JAX's preemption service agrees on one step; it listens for SIGTERM itself.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def reached(self, step: int) -> bool:
        """Whether to stop behind `step`; the same on every process."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked.is_set()

    def _ask(self, number: int, _: object) -> None:
        if self._asked.is_set():
            sys.exit(128 + number)
        self.name = signal.Signals(number).name
        self._asked.set()
