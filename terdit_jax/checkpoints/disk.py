"""Reads the errors of file systems: whether the disk refused, its reason, and what helps.

Orbax raises an OSError or, for TensorStore, a ValueError that carries the number of the operating system's error.
"""

from collections.abc import Callable
import errno
import logging
import os
import re
import sys
from typing import Any
import warnings

from absl import logging as absl_logging

from terdit_jax.errors import in_a_line

_NUMBERED = re.compile(r"os_error_code='(\d+)'")
# Object stores give no number; TensorStore's message begins with a status.
_STATUSES = re.compile(r"^(RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED|UNAUTHENTICATED)\b")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_refusal(error: BaseException) -> bool:
    """Returns whether a file system or an object store raised this, rather than a mistake of ours."""
    return isinstance(error, OSError) or _number(error) is not None or bool(_STATUSES.match(str(error)))


def reason(error: BaseException) -> str:
    """Returns what the disk said, without the name of one file among thousands."""
    number = _number(error)
    if number is not None:
        return os.strerror(number)
    if status := _STATUSES.match(str(error)):
        return status.group().replace("_", " ").lower()
    return in_a_line(error)


def remedy(error: BaseException) -> str:
    """Returns what to do about it, as the beginning of a sentence."""
    number = _number(error)
    if number in _FULL or (number is None and str(error).startswith("RESOURCE_EXHAUSTED")):
        return "make room"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make it writable"
    return "see to the disk"


def silence_tracebacks() -> None:
    """Hides what Orbax and asyncio print of a refusal, hundreds of tracebacks a save.

    It is also raised, once, and becomes our one line.
    """
    absl_logging.get_absl_logger().addFilter(_is_not_orbax_traceback)
    logging.getLogger("asyncio").addFilter(_is_not_refusal)
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)  # those after the refused one
    if not isinstance(sys.unraisablehook, _LateAnswers):
        sys.unraisablehook = _LateAnswers(sys.unraisablehook)


class _LateAnswers:
    """Passes unraisable errors on, but those of TensorStore's writes whose event loop has been closed."""

    def __init__(self, following: Callable[[Any], object]):
        self._following = following

    def __call__(self, unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
            self._following(unraisable)


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _NUMBERED.findall(str(error))
    return int(found[-1]) if found else None


def _is_not_refusal(record: logging.LogRecord) -> bool:
    """False for what asyncio logs of writes that failed as well as the one whose error was raised."""
    return not (record.exc_info and record.exc_info[1] and is_refusal(record.exc_info[1]))


def _is_not_orbax_traceback(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "/orbax/" in record.pathname)
