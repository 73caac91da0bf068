"""A file that says that a run is alive: its step and the time, renewed while steps are made.

Who watches it (launch/supervise.sh, a scheduler) decides what its silence means.
"""

import contextlib
import json
import os
import socket
import time

from etils import epath

from terdit_jax.errors import UserError
from terdit_jax.files import check_output, write_json

HEARTBEAT_FILE = "heartbeat.json"
_SECONDS = 5.0


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


class Heartbeat:
    """Replaces the file at once, so that a reader never sees half of it; at most every five seconds."""

    def __init__(self, path: epath.PathLike):
        self._path = epath.Path(path)
        self._last = float("-inf")
        self._host = socket.gethostname()

    def beat(self, step: int, *, now: bool = False) -> None:
        """Renews the file if that is due, or `now`; a disk that does not take it is no reason to stop."""
        if not now and time.monotonic() - self._last < _SECONDS:
            return
        self._last = time.monotonic()
        content = {"step": step, "time": time.time(), "pid": os.getpid(), "host": self._host}
        with contextlib.suppress(OSError):
            write_json(self._path, content, sync=False)
