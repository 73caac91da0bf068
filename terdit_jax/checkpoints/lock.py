"""The lock of a workdir: two runs that write one would overwrite each other's checkpoints.

It is held by the kernel for a living process, so a run that died, however it died, never blocks the next one.
"""

import contextlib
import fcntl
import json
import os
import socket
import stat
import time
from typing import Self

from absl import logging
from etils import epath
import jax

from terdit_jax.errors import UserError
from terdit_jax.paths import is_remote

LOCK_FILE = "run.lock"


class WorkdirLock:
    """Held by the first process of a run from entering to leaving, or to its death.

    The workdir itself is locked, which nobody deletes by mistake, and run.lock, for file systems such as NFS that lock
    files only; its content says who holds it. Object stores (gs://) know no locks: there nothing is held.
    """

    def __init__(self, workdir: epath.PathLike):
        self._workdir = epath.Path(workdir)
        self._held: list[int] = []
        self._refusal: OSError | None = None

    def __enter__(self) -> Self:
        """Takes the lock; raises UserError, naming its holder, if another process holds it."""
        if jax.process_index() == 0 and not is_remote(self._workdir):
            try:
                self._take()
            except BlockingIOError:
                holder = _read_holder(self._workdir / LOCK_FILE)
                self.__exit__()
                raise UserError(
                    f"{self._workdir} is in use by {holder}: stop that run, or give another --workdir"
                ) from None
        return self

    def __exit__(self, *_: object) -> None:
        while self._held:
            os.close(self._held.pop())

    def _take(self) -> None:
        """Takes each lock that the file system grants; raises BlockingIOError if another process has one."""
        folder = self._lock(self._workdir, os.O_RDONLY | os.O_DIRECTORY)
        # No link is followed and no pipe waited for: only a file of the workdir is ours to write.
        file = self._lock(self._workdir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK)
        if file is not None:
            _write_holder(file)
        elif folder is None and self._refusal:
            said = self._refusal.strerror
            logging.error("%s CANNOT BE LOCKED (%s): nothing keeps a second run from it", self._workdir, said)

    def _lock(self, path: epath.Path, flags: int) -> int | None:
        try:
            descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
            self._held.append(descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            self._refusal = error
            return None
        return descriptor


def _write_holder(descriptor: int) -> None:
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        return  # what it is a second name of is not ours to write
    with contextlib.suppress(OSError):  # a full disk: the lock holds without its note
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{json.dumps(holder)}\n".encode(), 0)


def _read_holder(path: epath.Path) -> str:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            holder = json.loads(os.read(descriptor, 1000))
        finally:
            os.close(descriptor)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
