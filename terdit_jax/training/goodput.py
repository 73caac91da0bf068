"""Where a run's wall time goes, over all its restarts: every second since its first start is of exactly one kind.

What is productive is decided afterwards: seconds of steps that a kill undid are moved to `lost` when the run goes on.
"""

from collections.abc import Iterator
import contextlib
import json
import math
import time

from absl import logging
from etils import epath

from terdit_jax.checkpoints import disk
from terdit_jax.files import set_aside, write_json
from terdit_jax.training.metrics import format_duration

GOODPUT_FILE = "goodput.json"
# start: from a command's start to its first step, less restore and compile; input: waiting for a batch; evaluate:
# held-out losses, grids, scores and logs; down: between the last record of one command and the start of the next.
KINDS = ("train", "compile", "restore", "save", "input", "evaluate", "start", "lost", "down")
_SAVES_KEPT = 1000


class Goodput:
    """The account of one workdir, in goodput.json."""

    def __init__(self, workdir: epath.PathLike, clock=time.time):
        """Goes on with the account that is there; the time since its last entry was `down`, unless it was complete."""
        self._path, self._clock = epath.Path(workdir) / GOODPUT_FILE, clock
        self._since, self._kind = clock(), "start"
        self._account = self._read() or {"restarts": -1, "seconds": {}, "saved": {}}
        self._account["restarts"] += 1
        if "updated" in self._account and not self._account["complete"]:
            self._add("down", max(0.0, self._since - self._account["updated"]))

    def resumed(self, step: int) -> None:
        """The run goes on from `step`: productive seconds beyond it were for nothing."""
        saved = {at: seconds for at, seconds in self._account["saved"].items() if at <= step}
        productive = saved[max(saved)] if saved else 0.0
        seconds = self._account["seconds"]
        self._add("lost", seconds.get("train", 0.0) - productive)
        seconds["train"] = productive
        self._account["saved"] = saved

    def now(self, kind: str) -> str:
        """From here on seconds are of this kind; returns the kind they were of."""
        assert kind in KINDS, kind
        moment = self._clock()
        self._add(self._kind, max(0.0, moment - self._since))
        self._since, before, self._kind = moment, self._kind, kind
        return before

    @contextlib.contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Seconds of the body are of this kind, those behind it of the kind before."""
        before = self.now(kind)
        try:
            yield
        finally:
            self.now(before)

    def saved(self, step: int) -> None:
        """A checkpoint of `step` holds what the seconds up to here were for."""
        self.now(self._kind)
        self._account["saved"][step] = self._account["seconds"].get("train", 0.0)
        for old in sorted(self._account["saved"])[:-_SAVES_KEPT]:
            del self._account["saved"][old]

    def figures(self) -> dict[str, float]:
        """`goodput`, the productive share; `restarts`; `seconds_KIND` of every kind."""
        self.now(self._kind)
        seconds = {kind: self._account["seconds"].get(kind, 0.0) for kind in KINDS}
        whole = sum(seconds.values())
        return {
            "goodput": seconds["train"] / whole if whole else 0.0,
            "restarts": self._account["restarts"],
            **{f"seconds_{kind}": value for kind, value in seconds.items()},
        }

    def write(self, *, complete: bool = False) -> None:
        """Puts the account on disk; a disk that does not take it costs no more than this entry."""
        self.now(self._kind)
        self._account |= {"updated": self._since, "complete": complete}
        with contextlib.suppress(OSError):
            write_json(self._path, self._account)

    def summary(self) -> str:
        """One line, largest kinds first."""
        figures = self.figures()
        seconds = {kind: figures[f"seconds_{kind}"] for kind in KINDS}
        parts = [
            f"{kind} {format_duration(seconds[kind])}"
            for kind in sorted(KINDS, key=lambda kind: -seconds[kind])
            if seconds[kind] >= 0.5
        ]
        whole = format_duration(sum(seconds.values()))
        return f"goodput {figures['goodput']:.1%} of {whole}, {figures['restarts']} restart(s): {', '.join(parts)}"

    def _add(self, kind: str, seconds: float) -> None:
        self._account["seconds"][kind] = self._account["seconds"].get(kind, 0.0) + seconds

    def _read(self) -> dict | None:
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


def _checked(account: dict) -> dict:
    """The entries that are ours; raises ValueError, KeyError or TypeError if one is missing or of another type."""
    seconds = {kind: value for kind, value in account["seconds"].items() if kind in KINDS}
    saved = {int(step): value for step, value in account["saved"].items()}
    numbers = [*seconds.values(), *saved.values(), account["updated"]]
    if not all(type(value) in (int, float) and math.isfinite(value) for value in numbers):
        raise ValueError("seconds that are no numbers")
    if type(account["restarts"]) is not int or type(account["complete"]) is not bool:
        raise ValueError("not an account")
    kept = {name: account[name] for name in ("restarts", "updated", "complete")}
    return {**kept, "seconds": seconds, "saved": saved}
