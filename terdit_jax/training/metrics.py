"""Where a run's figures go: metrics.jsonl, TensorBoard's events, and the lines that it says.

Figures come in as plain floats; `actions` has them computed. tensorboardX is imported where events are written:
it imports PyTorch where that is installed, for seconds.
"""

from collections.abc import Callable, Iterator
import contextlib
import json
import math
import time
from typing import TYPE_CHECKING, Any

from absl import logging
from etils import epath
import jax
import numpy as np

from terdit_jax.checkpoints import disk
from terdit_jax.files import set_aside, write_text
from terdit_jax.paths import is_remote

if TYPE_CHECKING:
    from tensorboardX.proto.summary_pb2 import Summary

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends a run's figures; opening it at a step drops what an earlier, lost continuation wrote after it.

    A disk that takes or gives nothing does not end a run: lines are kept and written with the next one that it takes,
    and a file that is not ours to continue is set aside.
    """

    def __init__(self, workdir: epath.PathLike, start_step: int, *, tensorboard: bool):
        self._path = epath.Path(workdir) / METRICS_FILE
        self._waiting = False
        lines, whole = self._read()
        if not whole:
            self._set_aside()
        self._lines = [line for step, line in lines if step <= start_step]
        self._try(self._rewrite)
        self._events: Events | None = None
        if tensorboard:
            with self._giving_up_events():
                self._events = Events(workdir, start_step)

    def write(self, step: int, figures: dict[str, float], timing: dict[str, float] | None = None) -> None:
        """Writes one line, on disk when this returns if there is room; only `timing` may differ between reruns."""
        line = {"step": step, **figures, **({"timing": timing} if timing else {})}
        self._lines.append(json.dumps(_finite(line)))
        # Object stores cannot append: there the whole file, a few megabytes at most, is written again.
        self._try(self._rewrite if self._waiting or is_remote(self._path) else self._append)
        with self._giving_up_events():
            if self._events:
                self._events.write(step, figures | (timing or {}))

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes an image, (H, W, 3) uint8, to TensorBoard."""
        with self._giving_up_events():
            if self._events:
                self._events.write_image(step, name, image)

    def close(self) -> None:
        """Releases the files."""
        with self._giving_up_events():
            if self._events:
                self._events.close()

    def _read(self) -> tuple[list[tuple[int, str]], bool]:
        """The lines on disk that are whole, and whether all are but one at the end, cut short by a kill."""
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
            self._waiting = False
        except OSError as error:
            if not self._waiting:
                logging.error("%s cannot be written (%s): its lines wait", self._path, disk.reason(error))
            self._waiting = True

    def _append(self) -> None:
        with self._path.open("a") as file:
            file.write(self._lines[-1] + "\n")

    def _rewrite(self) -> None:
        write_text(self._path, "".join(line + "\n" for line in self._lines))

    @contextlib.contextmanager
    def _giving_up_events(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ImportError) as error:  # ImportError: an object store without TensorBoard's package for it
            logging.error("TensorBoard events cannot be written (%s): none until the next start", disk.reason(error))
            self._events = None


def _decode(line: bytes) -> tuple[int, str] | None:
    """A line's step and text, or None if it is not one of ours."""
    try:
        text = line.decode()
        step = json.loads(text)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (step, text) if type(step) is int else None


def _finite(value: Any) -> Any:
    """JSON knows no NaN: a figure without a value is null."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Events:
    """One file of TensorBoard's events; methods raise OSError where it cannot be written, and then it is of no use.

    It is written as events come: the library's own thread would die of a full disk unseen.
    """

    def __init__(self, workdir: epath.PathLike, start_step: int):
        """Opens a new file, which tells TensorBoard to drop what an earlier one holds after `start_step`."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._file = EventsWriter(str(epath.Path(workdir) / "events"))
        self._append(start_step + 1, file_version="brain.Event:2")
        self._append(start_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._file.flush()

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Writes figures by name."""
        from tensorboardX import summary

        self._write(step, [summary.scalar(name, value) for name, value in figures.items()])

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes an image, (H, W, 3) uint8."""
        from tensorboardX import summary

        self._write(step, [summary.image(name, image, dataformats="HWC")])

    def close(self) -> None:
        """Releases the file."""
        self._file.close()

    def _write(self, step: int, summaries: "list[Summary]") -> None:
        for one in summaries:
            self._append(step, summary=one)
        self._file.flush()

    def _append(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.write_event(Event(wall_time=time.time(), step=step, **content))


def say(line: str) -> None:
    """Prints a line of the run, on its first process."""
    if jax.process_index() == 0:
        print(line, flush=True)


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
