"""Watches a run from outside its mathematics: where its time goes, whether it lives, its traces, requests to stop.

None of them changes a state. Only a request to stop changes what the loop does next.
"""

from collections.abc import Callable, Iterator
import contextlib
import json
import math
import os
import re
import signal
import socket
import sys
import time
from typing import Any, NamedTuple, Self

from absl import logging
from etils import epath
import jax

from terdit_jax.checkpoints import disk
from terdit_jax.errors import UserError, in_a_line
from terdit_jax.files import check_output, set_aside, write_json
from terdit_jax.interrupts import STATUS, SignalWatch
from terdit_jax.progress import format_duration
from terdit_jax.training.layout import GOODPUT_FILE, HEARTBEAT_FILE
from terdit_jax.training.metrics import say

PROFILE_FOLDER = "profile"
# start: from a command's start to its first step, less restore and compile; input: waiting for a batch; evaluate:
# held-out losses, grids, scores and logs; down: between the last record of one command and the start of the next.
KINDS = ("train", "compile", "restore", "save", "input", "evaluate", "start", "lost", "down")
_SAVES_KEPT = 1000
_BEAT_SECONDS = 5.0
_ONE_PRESS_SECONDS = 1.0  # wrappers such as `uv run` pass on a Ctrl-C that the terminal has sent to all already


class Goodput:
    """The account of a workdir's wall time over all its restarts, in goodput.json: each second is of exactly one kind.

    Which seconds were productive is decided afterwards: those of steps that a kill undid move from `train` to `lost`
    when the run goes on.
    """

    def __init__(self, workdir: epath.PathLike, clock: Callable[[], float] = time.time):
        """Goes on with the account that is there; the time since its last entry was `down`, unless it was complete."""
        self._path, self._clock = epath.Path(workdir) / GOODPUT_FILE, clock
        self._since, self._kind = clock(), "start"
        self._lap = (0, 0.0)
        account = self._read() or {"restarts": -1, "seconds": {}, "saved": {}}
        self._restarts: int = account["restarts"] + 1
        self._seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0) | account["seconds"]
        self._saved: dict[int, float] = account["saved"]
        if not account.get("complete", True):
            self._seconds["down"] += max(0.0, self._since - account["updated"])

    def resumed(self, step: int) -> None:
        """The run goes on from `step`: productive seconds beyond it were for nothing."""
        self._saved = {at: seconds for at, seconds in self._saved.items() if at <= step}
        productive = self._saved[max(self._saved)] if self._saved else 0.0
        self._seconds["lost"] += self._seconds["train"] - productive
        self._seconds["train"] = productive

    def now(self, kind: str) -> str:
        """From here on seconds are of this kind; returns the kind they were of."""
        if kind not in KINDS:
            raise ValueError(f"no kind of seconds: {kind}")
        moment = self._clock()
        self._seconds[self._kind] += max(0.0, moment - self._since)
        self._since, before, self._kind = moment, self._kind, kind
        return before

    @contextlib.contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Seconds of the body are of this kind, those after it of the kind before."""
        before = self.now(kind)
        try:
            yield
        finally:
            self.now(before)

    def saved(self, step: int) -> None:
        """A checkpoint of `step` holds what the seconds up to here were for."""
        self.now(self._kind)
        self._saved[step] = self._seconds["train"]
        self._saved = dict(sorted(self._saved.items())[-_SAVES_KEPT:])

    def lap(self, step: int) -> float:
        """Steps a second since the last lap, counting seconds of steps and of waiting for batches; 0 without either."""
        self.now(self._kind)
        (step_before, seconds_before), self._lap = self._lap, (step, self._seconds["train"] + self._seconds["input"])
        steps, seconds = step - step_before, self._lap[1] - seconds_before
        return steps / seconds if steps and seconds else 0.0

    def figures(self) -> dict[str, float]:
        """`goodput`, the productive share; `restarts`; `seconds_KIND` of every kind."""
        self.now(self._kind)
        whole = sum(self._seconds.values())
        return {
            "goodput": self._seconds["train"] / whole if whole else 0.0,
            "restarts": self._restarts,
            **{f"seconds_{kind}": self._seconds[kind] for kind in KINDS},
        }

    def write(self, *, complete: bool = False) -> None:
        """The first process puts the account on disk; a disk that does not take it costs no more than this entry."""
        self.now(self._kind)
        account = {"restarts": self._restarts, "seconds": self._seconds, "saved": self._saved}
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                write_json(self._path, account | {"updated": self._since, "complete": complete})

    def summary(self) -> str:
        """One line, largest kinds first."""
        figures = self.figures()
        largest = sorted(KINDS, key=lambda kind: -self._seconds[kind])
        parts = [f"{kind} {format_duration(self._seconds[kind])}" for kind in largest if self._seconds[kind] >= 0.5]
        whole = format_duration(sum(self._seconds.values()))
        return f"goodput {figures['goodput']:.1%} of {whole}, {self._restarts} restart(s): {', '.join(parts)}"

    def _read(self) -> dict[str, Any] | None:
        """The account on disk; one that is damaged is set aside."""
        try:
            return _checked(json.loads(self._path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            said = disk.reason(error) if isinstance(error, OSError) else "damaged"
            logging.error("%s cannot be read (%s): the account begins anew", self._path, said)
            with contextlib.suppress(OSError):
                set_aside(self._path)
            return None


def _checked(account: dict[str, Any]) -> dict[str, Any]:
    """The entries that are ours; raises ValueError, KeyError or TypeError if one is missing or of another type."""
    seconds = {kind: value for kind, value in account["seconds"].items() if kind in KINDS}
    saved = {int(step): value for step, value in account["saved"].items()}
    numbers = [*seconds.values(), *saved.values(), account["updated"]]
    if not all(type(value) in (int, float) and math.isfinite(value) for value in numbers):
        raise ValueError("seconds that are no numbers")
    if type(account["restarts"]) is not int or type(account["complete"]) is not bool:
        raise ValueError("not an account")
    return account | {"seconds": seconds, "saved": saved}


class Heartbeat:
    """A file that says that a run is alive: its step and the time, renewed at most every five seconds.

    It is replaced at once, so that a reader never sees half of it. Who watches it (launch/supervise.sh, a scheduler)
    decides what its silence means.
    """

    def __init__(self, path: epath.PathLike | None):
        """Takes the file's path; None renews nothing."""
        self._path = epath.Path(path) if path else None
        self._last = -math.inf
        self._host = socket.gethostname()

    def beat(self, step: int, *, now: bool = False) -> None:
        """Renews the file if that is due, or `now`; a disk that does not take it is no reason to stop."""
        if not self._path or not now and time.monotonic() - self._last < _BEAT_SECONDS:
            return
        self._last = time.monotonic()
        content = {"step": step, "time": time.time(), "pid": os.getpid(), "host": self._host}
        with contextlib.suppress(OSError):
            write_json(self._path, content, sync=False)


def check_heartbeat(path: epath.PathLike, flag: str = "--heartbeat") -> None:
    """Raises UserError if no file can be written at a path, or if one is there that is no heartbeat and not empty."""
    check_output(path, flag, replace=True)
    if not (path := epath.Path(path)).exists() or not path.stat().length:
        return
    try:
        is_heartbeat = {"step", "time", "pid", "host"} == set(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        is_heartbeat = False
    if not is_heartbeat:
        raise UserError(f"{flag}={os.fspath(path)}: is there and is no heartbeat of a run, name another place")


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
    """A trace for xprof or TensorBoard's profile plug-in, in WORKDIR/profile.

    It starts before the first step of its range that this run makes, and ends after the last.
    """

    def __init__(self, workdir: epath.PathLike, steps: Steps | None):
        self._folder, self._steps = epath.Path(workdir) / PROFILE_FOLDER, steps
        self._running = False

    def before(self, step: int) -> None:
        """Called before step `step`."""
        if self._steps and not self._running and self._steps.first <= step <= self._steps.last:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, state: dict) -> None:
        """Called after step `step`, which gave `state`; says where a trace is that ends here."""
        if self._running and self._steps and step >= self._steps.last:
            jax.block_until_ready(state)
            if self.close():
                say(f"step {step:,}  trace in {self._folder}")

    def close(self) -> bool:
        """Ends a trace that is running; returns whether it is on disk now."""
        if not self._running:
            return False
        self._running, self._steps = False, None
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:  # the profiler's own errors are RuntimeErrors
            logging.error("no trace in %s: %s", self._folder, in_a_line(error))
            return False
        return True


class Interruption:
    """SIGTERM from a scheduler or Ctrl-C as a request to save and stop, answered with a line at once.

    Schedulers send SIGTERM several times: those after the first change nothing. A second Ctrl-C stops at once.

    Attributes:
      name: the first signal; "" if there was none.
      agreed: whether `reached` has said so.
    """

    def __init__(self) -> None:
        self.name, self.agreed = "", False
        self._answered: set[int] = set()
        self._pressed = 0.0
        # Across processes, JAX's preemption service agrees on one step; it listens for SIGTERM itself.
        alone = jax.process_count() == 1
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._watch = SignalWatch(numbers, self._answer, self._ask) if alone else contextlib.nullcontext()

    def __enter__(self) -> Self:
        self._watch.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.__exit__(None, None, None)

    def reached(self, step: int) -> bool:
        """Returns whether to stop after `step`; the same on every process."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self.name = "SIGTERM"
        self.agreed = bool(self.name)
        return self.agreed

    def _ask(self, number: int, _: object) -> None:
        self.name = self.name or signal.Signals(number).name

    def _answer(self, number: int) -> None:
        self._ask(number, None)
        now, what = time.monotonic(), "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        if number not in self._answered:
            self._answered.add(number)
            self._pressed = now if number == signal.SIGINT else self._pressed
            again = "; Ctrl-C again stops at once, without saving" if number == signal.SIGINT else ""
            _answer_with(f"{what}: stops after the step under way, once the state is saved{again}")
        elif number == signal.SIGINT and now - self._pressed > _ONE_PRESS_SECONDS:
            _answer_with("error: stopped at once by a second Ctrl-C, what was not saved is lost")
            os._exit(STATUS)


def _answer_with(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Observers:
    """The observers of one process of a run. Attributes:

    goodput, heartbeat, profiler, interruption: one of each.
    complete: set once the last step is saved, so that time from then on is not `down`.
    """

    def __init__(self, workdir: epath.Path, heartbeat: epath.PathLike | None = None, profile: Steps | None = None):
        """Begins the account and beats once; `heartbeat` and `profile` as for `run.train`."""
        self.goodput, self.profiler, self.interruption = Goodput(workdir), Profiler(workdir, profile), Interruption()
        first = workdir / HEARTBEAT_FILE if jax.process_index() == 0 else None
        self.heartbeat = Heartbeat(heartbeat or first)
        self.heartbeat.beat(0, now=True)
        self.complete = False

    @contextlib.contextmanager
    def watching(self, start: int) -> Iterator[None]:
        """Watches the steps of its body, which go on from `start`, and writes the account after them."""
        self.goodput.resumed(start)
        self.heartbeat.beat(start, now=True)
        with self.interruption:
            complete = False
            try:
                yield
                complete = self.complete
            finally:
                self.profiler.close()
                self.goodput.write(complete=complete)
