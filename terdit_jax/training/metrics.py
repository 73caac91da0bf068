"""Where a run's figures go: metrics.jsonl, TensorBoard, and the progress line.

Figures come in as plain floats; computing them is `window`'s and `heldout`'s.
"""

from collections.abc import Iterator
import contextlib
import json
import math
import time

from absl import logging
from etils import epath
import numpy as np
from tensorboardX import SummaryWriter

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends a run's figures; opening it at a step drops what an earlier, lost continuation wrote beyond it.

    A disk without room does not end a run: lines are kept and written with the next one that it takes.
    """

    def __init__(self, workdir: epath.PathLike, start_step: int, *, tensorboard: bool):
        self._path = epath.Path(workdir) / METRICS_FILE
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        self._lines = [line for line in lines if _step_of(line) <= start_step]
        self._rewrite()
        # Object stores cannot append: there the whole file, a few megabytes at most, is written again.
        self._is_local = "://" not in str(self._path)
        self._behind = False
        self._events = SummaryWriter(str(workdir), purge_step=start_step + 1) if tensorboard else None

    def write(self, step: int, figures: dict[str, float], timing: dict[str, float] | None = None) -> None:
        """One line, on disk when this returns if there is room; `timing` stands apart because it is all that differs
        between reruns."""
        line = {"step": step, **figures, **({"timing": timing} if timing else {})}
        self._lines.append(json.dumps(_finite(line)))
        try:
            if self._is_local and not self._behind:
                with self._path.open("a") as file:
                    file.write(self._lines[-1] + "\n")
            else:
                self._rewrite()
            self._behind = False
        except OSError as error:
            if not self._behind:
                logging.error("%s cannot be written (%s): its lines wait for room", self._path, error.strerror or error)
            self._behind = True
        if self._events:
            for name, value in {**figures, **(timing or {})}.items():
                self._events.add_scalar(name, value, step)
            self._flush_events()

    def write_picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """(H, W, 3) uint8 to TensorBoard."""
        if self._events:
            self._events.add_image(name, picture, step, dataformats="HWC")
            self._flush_events()

    def _flush_events(self) -> None:
        try:
            self._events.flush()
        except OSError as error:  # the library's writer does not recover, and would block once its queue is full
            logging.error(
                "TensorBoard events cannot be written (%s): none until the next start", error.strerror or error
            )
            self._events = None

    def close(self) -> None:
        if self._events:
            self._events.close()

    def _rewrite(self) -> None:
        temporary = self._path.with_name(self._path.name + ".tmp")
        temporary.write_text("".join(line + "\n" for line in self._lines))
        temporary.replace(self._path)


def _step_of(line: str) -> float:
    """The step of a line; a line cut short by a kill belongs to no step and is dropped."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: float | dict) -> float | dict | None:
    """JSON knows no NaN: a figure without a value is null."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Stopwatch:
    """Steps a second between logs, leaving out what is not training (compilation, evaluation, saving)."""

    def __init__(self, step: int):
        self._step, self._time = step, time.perf_counter()

    def restart(self, step: int) -> None:
        """Starts a new interval at `step`, now."""
        self._step, self._time = step, time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time spent in its body."""
        begin = time.perf_counter()
        yield
        self._time += time.perf_counter() - begin

    def lap(self, step: int) -> float:
        """Steps a second since the last lap or restart, 0 if there was none."""
        steps, seconds = step - self._step, time.perf_counter() - self._time
        self.restart(step)
        return steps / seconds if steps and seconds else 0.0


def format_duration(seconds: float) -> str:
    """45s, 12m30s, 3h05m or 2d07h."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
