"""Answers Ctrl-C and SIGTERM at once, even while the main thread compiles or restores and Python cannot run in it.

A thread of its own learns of a signal through a pipe into which the interpreter writes. What a run answers belongs to
`training.observers`.
"""

from collections.abc import Callable, Iterable
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

STATUS = 130  # of a command that Ctrl-C has ended
_SAID = "error: interrupted by Ctrl-C"
_GRACE_SECONDS = 5.0


class SignalWatch:
    """Answers signals at once: in its body each of `numbers` calls `answer(number)` in a thread, and `handle` in the
    main thread when it comes to it. Outside the main thread, which alone has signals, it does nothing."""

    def __init__(
        self,
        numbers: Iterable[int],
        answer: Callable[[int], None],
        handle: Callable[[int, FrameType | None], object],
    ):
        self._numbers, self._answer, self._handle = tuple(numbers), answer, handle
        self._previous: dict[int, Any] = {}
        self._outer, self._pipe = -1, -1

    def __enter__(self) -> "SignalWatch":
        if threading.current_thread() is threading.main_thread():
            read, self._pipe = os.pipe()
            os.set_blocking(self._pipe, False)
            threading.Thread(target=self._watch, args=(read,), name="signals", daemon=True).start()
            self._outer = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
            self._previous = {number: signal.signal(number, self._handle) for number in self._numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._pipe >= 0:
            signal.set_wakeup_fd(self._outer)
            os.close(self._pipe)  # the thread reads the end of the pipe, and ends
            self._pipe = -1

    def _watch(self, pipe: int) -> None:
        while content := os.read(pipe, 64):
            for number in content:
                if number in self._numbers:
                    self._answer(number)
        os.close(pipe)


class CommandInterrupts(SignalWatch):
    """Ctrl-C for a command that has nothing to save: one line at once, then the main thread's KeyboardInterrupt, which
    removes temporary files. Where that does not come within five seconds the process ends without it."""

    def __init__(self) -> None:
        super().__init__((signal.SIGINT,), self._begin, signal.default_int_handler)
        self._saying, self._said = threading.Lock(), False

    def end(self) -> None:
        """Ends the process, after its line."""
        self._say()
        sys.stdout.flush()
        os._exit(STATUS)  # background threads must not turn it into a hang

    def _begin(self, _: int) -> None:
        self._say()
        timer = threading.Timer(_GRACE_SECONDS, os._exit, (STATUS,))
        timer.daemon = True
        timer.start()

    def _say(self) -> None:
        with self._saying:
            if not self._said:
                self._said = True
                print(_SAID, file=sys.stderr, flush=True)


def end_while_importing() -> None:
    """Makes Ctrl-C one line until `CommandInterrupts` takes over; a command's imports take seconds."""

    def end(*_: object) -> None:
        os.write(2, f"{_SAID}\n".encode())
        os._exit(STATUS)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)


def _leave_to_parent() -> None:
    """A forked child has its parent's handlers and pipe but not its thread: signals are its own again."""
    if signal.set_wakeup_fd(-1) >= 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_leave_to_parent)
