"""Where a run's figures go: metrics.jsonl, the trackers that follow it, and the lines that it says.

Figures come in as plain floats; `actions` has them computed. What a tracker is belongs to `trackers`.
"""

from collections.abc import Callable
import json
import math
from typing import Any

from absl import logging
from etils import epath
import jax
import numpy as np

from terdit_jax.checkpoints import disk
from terdit_jax.config import RunConfig
from terdit_jax.files import set_aside, write_text
from terdit_jax.paths import is_remote
from terdit_jax.training.layout import METRICS_FILE, decode_line
from terdit_jax.training.trackers import open_trackers, tagged


class MetricsWriter:
    """Appends a run's figures; opening it at a step drops what an earlier, lost continuation wrote after it.

    A disk that takes or gives nothing does not end a run: lines are kept and written with the next one that it takes,
    and a file that is not ours to continue is set aside. The trackers of `config.log`, if one is given, follow.
    `saved` tells the step that the run would go on from if it were killed now.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        start_step: int,
        config: RunConfig | None = None,
        saved: Callable[[], float] = lambda: math.inf,
    ):
        self._path = epath.Path(workdir) / METRICS_FILE
        self._waiting = False
        lines, whole = self._read()
        if not whole:
            self._set_aside()
        self._lines = [line for step, line in lines if step <= start_step]
        self._try(self._rewrite)
        self._trackers = open_trackers(config, workdir, start_step, self._lines, saved, say) if config else []

    def write(self, step: int, figures: dict[str, float], timing: dict[str, float] | None = None) -> None:
        """Writes one line, on disk when this returns if there is room; only `timing` may differ between reruns."""
        line = _finite({"step": step, **figures, **({"timing": timing} if timing else {})})
        self._lines.append(json.dumps(line))
        # Object stores cannot append: there the whole file, a few megabytes at most, is written again.
        self._try(self._rewrite if self._waiting or is_remote(self._path) else self._append)
        for tracker in self._trackers:
            tracker.put(step, tagged(line))

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Hands an image, (H, W, 3) uint8, to the trackers: the file has figures only."""
        for tracker in self._trackers:
            tracker.put(step, images={name: image})

    def close(self) -> None:
        """Lets the trackers end."""
        for tracker in self._trackers:
            tracker.close()

    def _read(self) -> tuple[list[tuple[int, str]], bool]:
        """The lines on disk that are whole, and whether all are but one at the end, cut short by a kill."""
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return [], True
        except OSError as error:
            logging.error("%s cannot be read (%s): it is begun anew", self._path, disk.reason(error))
            return [], False
        contents = [decode_line(line) for line in lines]
        if damaged := contents[:-1].count(None):
            logging.error("%s: %d of %d lines are damaged and left out", self._path, damaged, len(lines) - 1)
        whole = [(content["step"], line.decode()) for content, line in zip(contents, lines, strict=True) if content]
        return whole, not damaged

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


def _finite(value: Any) -> Any:
    """JSON knows no NaN: a figure without a value is null."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(line: str) -> None:
    """Prints a line of the run, on its first process."""
    if jax.process_index() == 0:
        print(line, flush=True)
