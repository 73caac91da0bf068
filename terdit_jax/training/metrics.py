"""Where a run's figures go: metrics.jsonl, TensorBoard, and the progress line.

Figures come in as plain floats; computing them is `window`'s and `heldout`'s.
"""

from collections.abc import Callable, Iterator
import contextlib
import json
import math
import time

from absl import logging
from etils import epath
import numpy as np

from terdit_jax.checkpoints import disk
from terdit_jax.files import set_aside, write_text
from terdit_jax.paths import is_remote
from terdit_jax.training.events import Events

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends a run's figures; opening it at a step drops what an earlier, lost continuation wrote beyond it.

    A disk that takes or gives nothing does not end a run: lines are kept and written with the next one that it takes,
    and a file that is not ours to continue is set aside.
    """

    def __init__(self, workdir: epath.PathLike, start_step: int, *, tensorboard: bool):
        self._path = epath.Path(workdir) / METRICS_FILE
        self._is_local = not is_remote(self._path)
        self._behind = False
        lines, whole = self._read()
        if not whole:
            self._set_aside()
        self._lines = [line for line in lines if _step_of(line) <= start_step]
        self._try(self._rewrite)
        self._events: Events | None = None
        if tensorboard:
            self._with_events(lambda: Events(workdir, start_step))

    def write(self, step: int, figures: dict[str, float], timing: dict[str, float] | None = None) -> None:
        """One line, on disk when this returns if there is room; `timing` stands apart because it is all that differs
        between reruns."""
        line = {"step": step, **figures, **({"timing": timing} if timing else {})}
        self._lines.append(json.dumps(_finite(line)))
        # Object stores cannot append: there the whole file, a few megabytes at most, is written again.
        self._try(self._append if self._is_local and not self._behind else self._rewrite)
        if self._events:
            self._with_events(lambda: self._events.write(step, {**figures, **(timing or {})}))

    def write_picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """(H, W, 3) uint8 to TensorBoard."""
        if self._events:
            self._with_events(lambda: self._events.write_image(step, name, picture))

    def close(self) -> None:
        """Releases the files."""
        if self._events:
            self._with_events(self._events.close)

    def _read(self) -> tuple[list[str], bool]:
        """The lines on disk that are whole, and whether that is all of them but one at the end, cut short by a kill."""
        try:
            found = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return [], True
        except OSError as error:
            logging.error("%s cannot be read (%s): it is begun anew", self._path, disk.reason(error))
            return [], False
        *found, last = found
        lines = [_decode(line) for line in found]
        if damaged := sum(line is None for line in lines):
            logging.error("%s: %d of %d lines are damaged and left out", self._path, damaged, len(lines))
        return [line for line in [*lines, _decode(last)] if line is not None], not damaged

    def _set_aside(self) -> None:
        try:
            logging.error("%s is kept as %s", self._path, set_aside(self._path))
        except OSError as error:
            logging.error("%s cannot be set aside: %s", self._path, disk.reason(error))

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
            self._behind = False
        except OSError as error:
            if not self._behind:
                logging.error("%s cannot be written (%s): its lines wait", self._path, disk.reason(error))
            self._behind = True

    def _append(self) -> None:
        with self._path.open("a") as file:
            file.write(self._lines[-1] + "\n")

    def _rewrite(self) -> None:
        write_text(self._path, "".join(line + "\n" for line in self._lines))

    def _with_events(self, write: Callable[[], Events | None]) -> None:
        try:
            self._events = write() or self._events
        except (OSError, ImportError) as error:  # ImportError: an object store without TensorBoard's package for it
            logging.error("TensorBoard events cannot be written (%s): none until the next start", disk.reason(error))
            self._events = None


def _decode(line: bytes) -> str | None:
    """A line that says its step, or None."""
    try:
        text = line.decode()
        return text if math.isfinite(_step_of(text)) else None
    except ValueError:
        return None


def _step_of(line: str) -> float:
    """The step of a line, infinite if it is none of ours."""
    try:
        step = json.loads(line)["step"]
        return step if type(step) is int else math.inf
    except (ValueError, KeyError, TypeError, RecursionError):
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
