"""The lock of a workdir: two runs that write one would overwrite each other's checkpoints.

It is held by the kernel for a living process, so a run that died, however it died, never blocks the next one.
"""

import fcntl
import json
import os
import socket
import time

from etils import epath
import jax

from terdit_jax.errors import UserError

LOCK_FILE = "run.lock"


class WorkdirLock:
    """Held by the first process of a run from entering to leaving, or to its death.

    Object stores (gs://) know no locks: there nothing is held, and nothing is refused.
    """

    def __init__(self, workdir: epath.PathLike):
        self._path = epath.Path(workdir) / LOCK_FILE
        self._file = None

    def __enter__(self) -> "WorkdirLock":
        """Raises UserError, naming its holder, if another process holds it."""
        if jax.process_index() == 0 and "://" not in str(self._path):
            try:
                self._take()
            except OSError as error:
                raise UserError(f"cannot lock {self._path}: {error.strerror or error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def _take(self) -> None:
        file = open(self._path, "a+")  # noqa: SIM115  it stays open while the lock is held
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read_holder(file)
            file.close()
            raise UserError(
                f"{self._path.parent} is in use by {holder}: stop that run, or give another --workdir"
            ) from None
        self._file = file
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        try:
            file.seek(0)
            file.truncate()
            file.write(json.dumps(holder) + "\n")
            file.flush()
        except OSError:
            pass  # a full disk: the lock holds without its note


def _read_holder(file) -> str:
    try:
        file.seek(0)
        holder = json.loads(file.read())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
