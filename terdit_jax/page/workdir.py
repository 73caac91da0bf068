"""Reads what a run has left in its workdir, as plain data and without JAX.

What is damaged or missing is left out, and a note says so. What is made of it belongs to `curves` and `html`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import time
from typing import Any

from etils import epath

from terdit_jax.checkpoints import disk
from terdit_jax.checkpoints.layout import BEST, DAMAGED, ITEMS, RUN, list_steps
from terdit_jax.checkpoints.manifest import MANIFEST, find_damage, list_files, open_file
from terdit_jax.config_rules import flatten
from terdit_jax.errors import UserError
from terdit_jax.paths import absolute, as_path
from terdit_jax.training.layout import (
    CONFIG_FILE,
    GOODPUT_FILE,
    GRIDS,
    HEARTBEAT_FILE,
    METRICS_FILE,
    decode_line,
    grid_step,
)
from terdit_jax.untrusted import is_count, is_number, parse_json

SOUND, UNCHECKED, UNDER_WAY = "sound", "not checked", "being saved"
_ALIVE_SECONDS = 60  # a heartbeat is renewed every five
_MADE_BY_RUNS = (CONFIG_FILE, METRICS_FILE, "checkpoints")
_LONG_CHECK_BYTES = 10**9
_LONGEST = 1e12  # seconds


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. Attributes:

    step: the step after which it was saved.
    folder: `checkpoints`, or `best` for the weights that scored best.
    state: `SOUND`, `UNCHECKED`, `UNDER_WAY`, or what is wrong with it.
    size: bytes of its files.
    """

    step: int
    folder: str
    state: str
    size: int


@dataclasses.dataclass
class Run:
    """A run as its workdir shows it; whatever is not there is empty. Attributes:

    name: the end of its path that no other run of the report has.
    place: its workdir.
    notes: what could not be read, a line each.
    config: fields of config.json by dotted name.
    lines: those of metrics.jsonl, each with an integer `step`.
    seconds: where its time went, by kind as in docs/training.md.
    beat: when its heartbeat was renewed, in seconds since 1970; 0 if never.
    pictures: steps and paths of its grids, ascending.
    scores: reports of `terdit_jax.evaluate` by file name.
    checkpoints: those on disk, and the names of those set aside as damaged.
    """

    name: str
    place: epath.Path
    notes: list[str] = dataclasses.field(default_factory=list)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    lines: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    beat: float = 0.0
    pictures: list[tuple[int, epath.Path]] = dataclasses.field(default_factory=list)
    scores: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    checkpoints: list[Checkpoint] = dataclasses.field(default_factory=list)
    set_aside: list[str] = dataclasses.field(default_factory=list)

    def is_at_work(self) -> bool:
        """Whether its heartbeat was renewed within the last minute."""
        return time.time() - self.beat < _ALIVE_SECONDS

    def last_timing(self) -> dict[str, Any]:
        """The newest `timing` of its metrics; empty without any."""
        return next(filter(None, map(timing, reversed(self.lines))), {})


def read_runs(places: Sequence[str], *, check: bool, say: Callable[[str], None]) -> list[Run]:
    """Reads the workdirs of runs; one that is named twice is read once.

    Args:
      places: workdirs, local or on an object store.
      check: whether checkpoints are compared with their SHA-256, which reads them whole.
      say: told which large checkpoint is being read.

    Raises:
      UserError: a place that holds no run.
    """
    for place in places:
        _check_is_run(as_path(place, "RUN"))
    workdirs = list(dict.fromkeys(absolute(as_path(place)) for place in places))
    return [_read_run(name, workdir, check, say) for name, workdir in zip(_names(workdirs), workdirs, strict=True)]


def _names(workdirs: Sequence[epath.Path]) -> list[str]:
    """The shortest end of each path that no other has."""

    def end(path: epath.Path, length: int) -> tuple[str, ...]:
        return path.parts[-length:]

    names = []
    for path in workdirs:
        longest = len(path.parts)
        lengths = (n for n in range(1, longest) if sum(end(other, n) == end(path, n) for other in workdirs) == 1)
        names.append("/".join(end(path, next(lengths, longest))))
    return names


def _check_is_run(workdir: epath.Path) -> None:
    try:
        if any((workdir / name).exists() for name in _MADE_BY_RUNS):
            return
        below = sorted(path.name for path in workdir.iterdir() if (path / _MADE_BY_RUNS[0]).exists())
    except FileNotFoundError:
        raise UserError(f"{workdir}: there is no such folder, give the --workdir of a run") from None
    except NotADirectoryError:
        raise UserError(f"{workdir}: is no folder, give the --workdir of a run") from None
    except OSError as error:
        raise UserError(f"{workdir} cannot be read: {disk.reason(error)}") from error
    meant = f"give the runs below it, as {workdir / below[0]}" if below else "give the --workdir of a run"
    raise UserError(f"{workdir}: holds no run, none of {', '.join(_MADE_BY_RUNS)}; {meant}")


def _read_run(name: str, workdir: epath.Path, check: bool, say: Callable[[str], None]) -> Run:
    run = Run(name, workdir)
    run.config = dict(flatten(_read_json(run, CONFIG_FILE)))
    run.lines = _read_lines(run)
    account = _read_json(run, GOODPUT_FILE).get("seconds")
    run.seconds = _positive(account) if isinstance(account, dict) else spent(run.last_timing())
    beat: Any = _read_json(run, HEARTBEAT_FILE).get("time")
    run.beat = float(beat) if is_number(beat, 0, _LONGEST) else 0.0
    grids = ((grid_step(path.name), path) for path in _entries(run, GRIDS))
    run.pictures = sorted((step, path) for step, path in grids if step is not None)
    for path in _entries(run, ""):
        if path.suffix == ".json" and path.name not in (CONFIG_FILE, GOODPUT_FILE, HEARTBEAT_FILE):
            scores = _read_json(run, path.name)
            if is_count(scores.get("num_samples"), 1, 2**63) and isinstance(scores.get("flags"), dict):
                run.scores[path.name] = scores
    run.checkpoints = [*_checkpoints(run, "checkpoints", check, say), *_checkpoints(run, BEST, check, say)]
    run.set_aside = [path.name for path in _entries(run, DAMAGED)]
    return run


def timing(line: dict[str, Any]) -> dict[str, Any]:
    """The `timing` of a line of metrics.jsonl; empty without one."""
    found = line.get("timing")
    return found if isinstance(found, dict) else {}


def spent(timing: dict[str, Any]) -> dict[str, float]:
    """The seconds by kind in a line's `timing`."""
    kinds = {name.removeprefix("seconds_"): value for name, value in timing.items() if name.startswith("seconds_")}
    return _positive(kinds)


def _positive(seconds: dict[str, Any]) -> dict[str, float]:
    return {kind: float(value) for kind, value in seconds.items() if is_number(value, 0, _LONGEST) and value}


def _read(run: Run, name: str) -> bytes:
    """The content of a file, empty where there is none."""
    try:
        with open_file(run.place / name) as file:
            return file.read()
    except FileNotFoundError:
        return b""
    except OSError as error:
        run.notes.append(f"{name} cannot be read: {disk.reason(error)}")
        return b""


def _read_json(run: Run, name: str) -> dict[str, Any]:
    if not (content := _read(run, name)):
        return {}
    try:
        return parse_json(content, name, dict)
    except UserError as error:
        run.notes.append(str(error))
        return {}


def _read_lines(run: Run) -> list[dict[str, Any]]:
    lines = list(map(decode_line, _read(run, METRICS_FILE).split(b"\n")))
    if damaged := lines[:-1].count(None):  # the last may be cut by a kill
        run.notes.append(f"{METRICS_FILE}: {damaged} of {len(lines) - 1} lines are damaged and left out")
    return [line for line in lines if line is not None]


def _entries(run: Run, folder: str) -> Iterable[epath.Path]:
    try:
        return sorted((run.place / folder).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        run.notes.append(f"{folder or 'the workdir'} cannot be read: {disk.reason(error)}")
        return []


def _checkpoints(run: Run, folder: str, check: bool, say: Callable[[str], None]) -> Iterator[Checkpoint]:
    directory = run.place / BEST / "checkpoints" if folder == BEST else run.place / folder
    items = ["ema_params", RUN] if directory.parent.name == BEST else [*ITEMS, RUN]
    try:
        steps = list_steps(directory)
    except UserError as error:
        run.notes.append(str(error))
        return
    for step in steps:
        path = directory / str(step)
        try:
            size = sum((path / name).stat().length for name in list_files(path))
            if check and size > _LONG_CHECK_BYTES:
                say(f"{run.name}: reading checkpoint {step:,}, {size / 1e9:.1f} GB (--nocheck leaves it out)")
            damage = find_damage(path, items) if check else UNCHECKED
            if run.is_at_work() and not (path / MANIFEST).exists():  # which is written last
                damage = UNDER_WAY
        except OSError as error:
            if not path.exists():  # a run at work has deleted it meanwhile
                continue
            damage, size = f"cannot be read: {disk.reason(error)}", 0
        yield Checkpoint(step, folder, damage or SOUND, size)
