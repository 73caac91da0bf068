"""Standard output and error that never end the work: a full disk or a closed pipe costs lines only."""

from collections.abc import Iterable
import contextlib
import errno
import os
import sys
from typing import Any


class SteadyStream:
    """A text stream whose writes do not fail. What a full disk refuses waits in the buffer and is tried again.

    Attribute `bar`, of the class: the stream to which `progress` draws a bar, which makes way for text of the others.
    """

    bar: "SteadyStream | None" = None

    def __init__(self, stream: Any, name: str):
        self._stream, self._name, self._said, self._drawn = stream, name, False, False
        with contextlib.suppress(AttributeError, ValueError, OSError):
            # Under an ASCII locale, a character that it lacks is written as \xNN rather than raised as an error.
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Writes text, or drops it where the stream takes none; returns its length."""
        bar = SteadyStream.bar
        if bar is self:
            self._drawn = True
        elif bar and bar._drawn:
            bar.write("\r\x1b[K")
            bar.flush()
            bar._drawn = False
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: closed
            self._failed(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes each of the lines."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flushes, if the stream can be."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._failed(error)

    def finish(self) -> None:
        """Flushes for the last time; what still cannot be written is given up, so that the interpreter's own flush at
        its end finds nothing to fail on."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _failed(self, error: OSError | ValueError) -> None:
        if self._said or self._name == "standard error":
            return
        self._said = True
        reason = os.strerror(errno.EBADF) if isinstance(error, ValueError) else error.strerror or error
        print(f"warning: {self._name} cannot be written ({reason}): the work goes on without it", file=sys.stderr)


def steady_streams() -> list[SteadyStream]:
    """Puts a `SteadyStream` in the place of standard output and error, where there are any; returns them."""
    streams = []
    for name, words in (("stderr", "standard error"), ("stdout", "standard output")):
        stream = getattr(sys, name)
        if stream is not None:  # as where the descriptor was closed: Python's print knows that
            streams.append(stream if isinstance(stream, SteadyStream) else SteadyStream(stream, words))
            setattr(sys, name, streams[-1])
    return streams
