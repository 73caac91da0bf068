"""Trackers that follow a run's metrics.jsonl: TensorBoard, Weights & Biases, MLflow, any of them at once.

A run stays one run of each however often it is resumed: what a tracker lacks of the lines so far it is given first, and
what it has it is not given again. Figures are computed elsewhere. The packages are imported where they are used.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import heapq
import importlib.util
import json
from logging import ERROR, WARNING, getLogger
import math
import os
from pathlib import Path
import queue
import re
import shutil
import threading
import time
from typing import Any, Protocol
import uuid

from absl import logging
from etils import epath
from google.protobuf.message import DecodeError
import numpy as np
from PIL import Image

from terdit_jax.checkpoints import disk
from terdit_jax.choices import TRACKERS
from terdit_jax.config import RunConfig
from terdit_jax.config_rules import flatten
from terdit_jax.config_sections import LogConfig
from terdit_jax.errors import UserError, in_a_line
from terdit_jax.files import write_json
from terdit_jax.paths import is_remote
from terdit_jax.training.layout import GRIDS, grid_step

TRACKERS_FILE = "trackers.json"
# That the beginning of a run waits for a tracker, and its end. While one is opened nothing else runs, if it can be: its
# imports parse Python, and two threads that do end in a SystemError under Python 3.11.
OPENING_SECONDS, CLOSING_SECONDS = 60.0, 60.0
_PROJECT = "terdit_jax"
_METRICS_AT_ONCE = 1000  # that MLflow takes; a request each would not be done when a run ends

Row = tuple[int, Mapping[str, float], Mapping[str, np.ndarray]]  # a step, figures by tag, images (H, W, 3) uint8 by tag


class Writer(Protocol):
    """One tracker, in the shape of clu's MetricWriter, which imports TensorFlow. Methods may raise whatever they do.

    waits: whether it is given a step only once the run would go on after it, for it could not take it back.
    """

    waits: bool

    def holds(self, tag: str, step: int) -> bool:
        """Whether it has this already, from before this start."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Takes the configuration, by section."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes figures by tag."""

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Takes images, (H, W, 3) uint8, by tag."""

    def flush(self) -> None:
        """Passes on what it has kept of what it was given."""

    def close(self) -> None:
        """Ends it: nothing more is to come."""


def chosen(log: LogConfig) -> list[str]:
    """The names in `log.writers`, each once."""
    names = dict.fromkeys(log.writers.split(",") if log.writers else [])
    return [name for name in names if name != "tensorboard" or log.tensorboard]


def check_writers(log: LogConfig) -> None:
    """Raises UserError for a tracker whose package is not installed."""
    for name in chosen(log):
        package = {"tensorboard": "tensorboardX"}.get(name, name)
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # without an origin: a folder of that name, as wandb itself makes one
            extra = "tensorboardX" if name == "tensorboard" else f'"terdit-jax[{name}]"'
            raise UserError(f"config.log.writers={log.writers}: {package} is not installed: pip install {extra}")


def tagged(line: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a line of metrics.jsonl by tag: train/, heldout/, score/, rms/ and time/."""
    own = "train" if "loss" in line else "score"
    figures = {f"time/{name}": value for name, value in line.get("timing", {}).items()}
    for name, value in line.items():
        if name not in ("step", "timing"):
            tag = name.replace("heldout_", "heldout/", 1) if name.startswith("heldout_") else name
            figures[tag if "/" in tag else f"{own}/{tag}"] = value
    return {tag: math.nan if value is None else value for tag, value in figures.items()}


def open_trackers(
    config: RunConfig,
    workdir: epath.PathLike,
    start: int,
    lines: Sequence[str],
    saved: Callable[[], float],
    say: Callable[[str], None],
) -> list["Tracker"]:
    """The trackers of a run that goes on from step `start` with these lines of metrics.jsonl; `saved` tells the step
    that it would go on from if it were killed now, and `say` prints a line."""
    names, workdir = chosen(config.log), epath.Path(workdir)
    if not names:
        return []
    run_id = _identify(workdir)
    opening: tuple[Callable[[], Writer], ...] = (
        lambda: TensorBoard(workdir, start),
        lambda: WandB(workdir, start, run_id, config.to_dict(), say),
        lambda: MLflow(workdir, start, run_id, say),
    )
    makers, past = dict(zip(TRACKERS, opening, strict=True)), tuple(lines)
    return [Tracker(name, makers[name], config.to_dict(), lambda: _past(workdir, start, past), saved) for name in names]


def _identify(workdir: epath.Path) -> str:
    """The name of the run in its trackers, kept in the workdir."""
    path, run_id = workdir / TRACKERS_FILE, uuid.uuid4().hex[:12]
    try:
        if re.fullmatch("[0-9a-f]{12}", kept := json.loads(path.read_bytes())["id"]):
            return kept
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        logging.error("%s cannot be read: trackers begin a run anew", path)
    try:
        write_json(path, {"id": run_id})
    except OSError as error:
        logging.error("%s cannot be written (%s): a resumed run is another one to trackers", path, disk.reason(error))
    return run_id


def _past(workdir: epath.Path, start: int, lines: Iterable[str]) -> Iterator[Row]:
    """Rows that a run has written up to step `start`, in order: its lines, and the grids that are still on disk."""
    grids = {grid_step(path.name): path for path in (workdir / GRIDS).glob("step_*.png")}
    drawn = sorted(step for step in grids if step is not None and step <= start)
    pictures: Iterator[Row] = ((step, {}, _read(grids[step])) for step in drawn)
    figures: Iterator[Row] = ((line["step"], tagged(line), {}) for line in map(json.loads, lines))
    return heapq.merge(figures, pictures, key=lambda row: row[0])


def _read(path: epath.Path) -> dict[str, np.ndarray]:
    with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
        return {"samples": np.asarray(Image.open(file).convert("RGB"))}
    return {}


class Tracker:
    """A writer in a thread of its own: one that waits costs the run a minute at most, and one that fails a line."""

    def __init__(
        self,
        name: str,
        make: Callable[[], Writer],
        hparams: Mapping[str, Any],
        past: Callable[[], Iterable[Row]] = tuple,
        saved: Callable[[], float] = lambda: math.inf,
    ):
        """Begins with what `make` makes, the configuration, and those rows of the `past` that it does not hold; a
        writer that waits is given rows up to the step that `saved` tells."""
        self._queue: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._name, self._make, self._hparams, self._past, self._saved = name, make, hparams, past, saved
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()
        if not self._opened.wait(OPENING_SECONDS):
            logging.error("log.writers: %s does not answer: the run goes on, and it is given all once it does", name)

    def put(
        self, step: int, scalars: Mapping[str, float] | None = None, images: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Hands over figures and images, (H, W, 3) uint8, by tag."""
        if self._thread.is_alive():
            self._queue.put((step, scalars or {}, images or {}))

    def close(self) -> None:
        """Waits until all is written, or for CLOSING_SECONDS."""
        self._queue.put(None)
        self._thread.join(CLOSING_SECONDS)
        if self._thread.is_alive():
            logging.error("log.writers: %s has not taken all of it and is abandoned", self._name)

    def _work(self) -> None:
        try:
            writer = self._make()
            writer.write_hparams(self._hparams)
            self._opened.set()
            waiting = collections.deque[Row]()
            for row in self._past():
                waiting.append(row)
                self._write(writer, waiting)
            writer.flush()
            for row in iter(self._queue.get, None):
                waiting.append(row)
                self._write(writer, waiting)
                writer.flush()
            self._write(writer, waiting)
            writer.close()
            if waiting:
                said = "%s takes nothing back: it is given what follows the last checkpoint once the run goes on"
                logging.warning("log.writers: " + said, self._name)
        except (Exception, SystemExit) as error:  # of packages that are not ours, and no reason to stop training
            said = disk.reason(error) if isinstance(error, OSError) else in_a_line(error)
            logging.error("log.writers: %s fails (%s): it gets nothing until the next start", self._name, said)
        finally:
            self._opened.set()

    def _write(self, writer: Writer, rows: collections.deque[Row]) -> None:
        """Hands over the rows at the front that need not wait, and drops them."""
        while rows and not (writer.waits and rows[0][0] > self._saved()):
            step, scalars, images = rows.popleft()
            if lacking := {tag: value for tag, value in scalars.items() if not writer.holds(tag, step)}:
                writer.write_scalars(step, lacking)
            if unseen := {tag: image for tag, image in images.items() if not writer.holds(tag, step)}:
                writer.write_images(step, unseen)


class TensorBoard:
    """A file of TensorBoard's events, written as they come: the library's thread would die of a full disk unseen."""

    waits = False

    def __init__(self, workdir: epath.PathLike, start: int):
        """Opens a new file, which tells TensorBoard to drop what an earlier one holds after step `start`."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        import tensorboardX.summary

        self._start, self._held = start, dict[str, int]()
        self._event, self._summary = Event, tensorboardX.summary
        for event in self._earlier(epath.Path(workdir)):
            if event.session_log.status == SessionLog.START:
                self._held = {tag: min(step, event.step - 1) for tag, step in self._held.items()}
            for value in event.summary.value:
                self._held[value.tag] = event.step
        self._file = EventsWriter(str(epath.Path(workdir) / "events"))
        self._append(start + 1, file_version="brain.Event:2")
        self._append(start + 1, session_log=SessionLog(status=SessionLog.START))
        self._file.flush()

    def holds(self, tag: str, step: int) -> bool:
        return step <= min(self._start, self._held.get(tag, -1))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        table = "".join(f"| {name} | `{value!r}` |\n" for name, value in flatten(hparams))
        self._write(self._start, [self._summary.text("config", f"| field | value |\n|---|---|\n{table}")])

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._write(step, [self._summary.scalar(tag, value) for tag, value in scalars.items()])

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        self._write(step, [self._summary.image(tag, image, dataformats="HWC") for tag, image in images.items()])

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _earlier(self, workdir: epath.Path) -> Iterator[Any]:
        """The events of earlier files; a record is its length, a checksum, its content and another checksum."""
        for path in sorted(workdir.glob("events.out.tfevents.*")):
            content, at = path.read_bytes(), 0
            with contextlib.suppress(DecodeError):  # of a damaged file the rest is not counted
                while at + 12 <= len(content):
                    end = at + 12 + int.from_bytes(content[at : at + 8], "little")
                    if end > len(content):  # cut off by a kill
                        break
                    yield self._event.FromString(content[at + 12 : end])
                    at = end + 4

    def _write(self, step: int, summaries: Iterable[Any]) -> None:
        for one in summaries:
            self._append(step, summary=one)

    def _append(self, step: int, **content: Any) -> None:
        self._file.write_event(self._event(wall_time=time.time(), step=step, **content))


class WandB:
    """A run of Weights & Biases, online or, as WANDB_MODE or `wandb offline` say, in WORKDIR/wandb for `wandb sync`.

    W&B takes steps in order and none back. Online a resumed run tells the last one it has. An offline one knows nothing
    of what was written before, and a kill loses what its service had not written: so the folder of each start holds the
    whole run and replaces those before it, as syncing it replaces what was synced.
    """

    waits = False  # a run is watched online: after a kill, repeated steps stay as they were first logged

    def __init__(
        self, workdir: epath.Path, start: int, run_id: str, config: Mapping[str, Any], say: Callable[[str], None]
    ):
        import wandb

        online = wandb.setup().settings.mode in ("online", "shared")
        if online and not wandb.login(prompt=False):
            raise UserError("not logged in: run `wandb login`, or set WANDB_MODE=offline and `wandb sync` later")
        folder = os.environ.get("WANDB_DIR", "." if is_remote(workdir) else os.fspath(workdir))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=run_id,
            resume="allow" if online else None,
            name=workdir.name,
            dir=folder,
            config=dict(config),
            allow_val_change=True,
            settings=wandb.Settings(console="off", silent=True),
        )
        self._row: dict[str, Any] = {}
        self._image, self._at = wandb.Image, -1
        self._held = self._run.step - 1
        place = Path(self._run.dir).parent
        if not online:
            for older in place.parent.glob(f"offline-run-*-{run_id}"):
                if older != place:
                    shutil.rmtree(older, ignore_errors=True)
        say(f"wandb: {self._run.url if online else f'offline, for `wandb sync {os.path.relpath(place)}`'}")
        _say_held("wandb", self._held, start, say)

    def holds(self, tag: str, step: int) -> bool:
        return step <= self._held

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        pass  # it has them from the start

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._add(step, scalars)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        self._add(step, {tag: self._image(image) for tag, image in images.items()})

    def flush(self) -> None:
        pass  # a step is whole once the next one comes

    def close(self) -> None:
        self._add(-1, {})
        self._run.finish()

    def _add(self, step: int, entries: Mapping[str, Any]) -> None:
        """A step is logged once all of it is there: half of one could not be completed after a kill."""
        if step != self._at:
            if self._row:
                self._run.log(self._row, step=self._at)
            self._at, self._row = step, {}
        self._row |= entries


class MLflow:
    """A run of MLflow, in the store that MLFLOW_TRACKING_URI names or that MLflow takes itself, found again by a tag.

    MLflow takes figures in any order and none back: steps that a resumed run might repeat wait for their checkpoint.
    """

    waits = True

    def __init__(self, workdir: epath.Path, start: int, run_id: str, say: Callable[[str], None]):
        import mlflow

        for name, level in {"mlflow": WARNING, "alembic": WARNING, "urllib3": ERROR}.items():
            getLogger(name).setLevel(level)  # each attempt to reach a server would be a line
        tag = f"{_PROJECT}.run"
        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)).experiment_id
        self._client, self._entities = mlflow.MlflowClient(), mlflow.entities
        found = self._client.search_runs([experiment], f"tags.`{tag}` = '{run_id}'")
        run = found[0] if found else self._client.create_run(experiment, tags={tag: run_id}, run_name=workdir.name)
        self._id, self._params = run.info.run_id, run.data.params
        self._metrics: list[Any] = []
        self._held = {
            key: max(metric.step for metric in self._client.get_metric_history(self._id, key))
            for key in run.data.metrics
        }
        for file in self._client.list_artifacts(self._id, "images") if found else ():
            if named := re.match(r"images/(.+?)[+%]step[+%](\d+)[+%]", file.path):
                self._held[named[1]] = max(int(named[2]), self._held.get(named[1], -1))
        if found:
            self._client.update_run(self._id, status="RUNNING")
        say(f"mlflow: run {self._id} in {mlflow.get_tracking_uri()}")
        _say_held("mlflow", max(self._held.values(), default=-1), start, say)

    def holds(self, tag: str, step: int) -> bool:
        return step <= self._held.get(tag, -1)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        new = [(name, str(value)[:6000]) for name, value in flatten(hparams) if name not in self._params]
        for first in range(0, len(new), 100):
            params = [self._entities.Param(name, value) for name, value in new[first : first + 100]]
            self._client.log_batch(self._id, params=params)
        self._client.log_dict(self._id, dict(hparams), "config.json")  # a parameter cannot change, a file can

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._metrics += [self._entities.Metric(tag, value, now, step) for tag, value in scalars.items()]
        if len(self._metrics) >= _METRICS_AT_ONCE:
            self.flush()

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for tag, image in images.items():
            self._client.log_image(self._id, image, key=tag, step=step, synchronous=True)

    def flush(self) -> None:
        for first in range(0, len(self._metrics), _METRICS_AT_ONCE):
            self._client.log_batch(self._id, metrics=self._metrics[first : first + _METRICS_AT_ONCE])
        self._metrics.clear()

    def close(self) -> None:
        self.flush()
        self._client.set_terminated(self._id)


def _say_held(name: str, held: int, start: int, say: Callable[[str], None]) -> None:
    if held > start:
        say(
            f"{name} has steps up to {held:,} and takes none back: those after {start:,} stay as they were first logged"
        )
