"""The one exception that a user's mistake raises, how a command reports it, and how it reads its flags.

Commands catch it, print its single line and exit with status 2; every other exception is a bug of ours
and keeps its traceback.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
from logging import root as root_logger
import os
import sys
import traceback
from typing import Any, NoReturn

from absl import app, flags, logging

from terdit_jax import __version__
from terdit_jax.interrupts import CommandInterrupts
from terdit_jax.streams import steady_streams

_HELP = {"help", "?", "helpshort", "helpfull", "helpxml", "version"}  # absl's end with status 1
_LONGEST_LINE, _HEAD = 800, 500  # characters of a message, and of its beginning if it is longer
_words: list[str] = []  # the name of the program and what is no flag, once `parse_flags` has parsed


class UserError(Exception):
    """Input that cannot be used. The message is one line: the offending value, then what to do.

    It may hold names and values from files: what a terminal would not show, or would obey, is escaped, and what is too
    long to be read is left out.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(message: str) -> str:
    """The message on one line that a terminal can show, without its middle if it exceeds a few lines of a screen."""
    line = printable(" ".join(message.split()))
    return line if len(line) <= _LONGEST_LINE else f"{line[:_HEAD]} ... {line[-(_LONGEST_LINE - _HEAD - 5) :]}"


def printable(text: str) -> str:
    """The text with every character escaped that a terminal would not show or would obey."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def parse_flags(module: str, *, arguments: bool = False) -> None:
    """Parses the command line if this module, given as its `__name__`, is the one that Python runs.

    A command calls it between its flags and the imports of its work, which take seconds: `--help`, `--version` and
    flags that do not parse are answered without them. What is no flag is refused too, unless the command takes
    `arguments`, which `run_command` hands on; they may stand between flags.
    """
    if module == "__main__":
        streams = steady_streams()
        app.define_help_flags()
        try:
            _words[:] = _parse_flags(sys.argv, arguments)
        except SystemExit:
            for stream in streams:
                stream.finish()
            raise


def run_command(main: Callable[[Sequence[str]], None]) -> None:
    """Runs `main(argv)` under absl and turns a UserError, or flags that do not parse, into one line and status 2.

    Ctrl-C ends it with one line and status 130 (`interrupts`). A failing standard output does not end it (`streams`).
    """
    streams = steady_streams()
    root_logger.handlers.clear()  # Orbax's import leaves one, by which every warning would be printed a second time
    interrupts = CommandInterrupts()

    def guarded(argv: Sequence[str]) -> None:
        from terdit_jax.reproducible import pin_settings  # here, for it imports JAX

        try:
            pin_settings()
            main(argv)
        except UserError as error:
            exit_with(str(error))
        except Exception:
            end_if_one_of_several()
            raise

    try:
        with interrupts:
            app.run(guarded, flags_parser=_parse_flags)
    except KeyboardInterrupt:
        interrupts.end()
    finally:
        for stream in streams:
            stream.finish()


def exit_with(message: str, status: int = 2) -> NoReturn:
    """Prints `error: message` on one line of standard error and ends the process at once with this status."""
    print("error: " + one_line(message), file=sys.stderr, flush=True)
    if sys.stdout:  # None where its descriptor was closed
        sys.stdout.flush()
    # Background threads (asynchronous saves, prefetch) must not turn a clear answer into a hang.
    os._exit(status)


def in_a_line(error: BaseException) -> str:
    """Kind and beginning of an exception, for a UserError that tells the reason."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


@contextlib.contextmanager
def going_on(lost: str) -> Iterator[None]:
    """Logs a UserError in its body as one loud line, after `lost`: for what is no reason to stop training."""
    try:
        yield
    except UserError as error:
        logging.error("%s (%s)", lost, error)


def end_if_one_of_several() -> None:
    """Prints the exception being handled and ends this process with status 1, if it is one of several.

    The barriers that follow otherwise, of saves under way and of leaving, wait for processes that may be dead: each for
    up to a minute, and the sum is more than the others should take to notice.
    """
    jax = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized():
        traceback.print_exc()
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(1)


class _VersionFlag(flags.BooleanFlag):
    """Prints the version and ends the command."""

    def __init__(self) -> None:
        super().__init__("version", False, "print the version", allow_hide_cpp=True)

    def parse(self, argument: Any) -> None:
        super().parse(argument)
        if self.value:
            print(f"terdit-jax {__version__}")
            raise SystemExit


flags.DEFINE_flag(_VersionFlag(), module_name="absl.app")  # where --help is defined


def _parse_flags(argv: Sequence[str], arguments: bool = False) -> list[str]:
    """Parses the flags, unless `parse_flags` has done so; returns the name of the program and what is no flag."""
    if flags.FLAGS.is_parsed():
        return _words or [argv[0]]
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1 and not arguments:
            raise UserError(f"unexpected argument {rest[1]!r}: every option is written --name=value")
        if flags.FLAGS["verbosity"].using_default_value:
            logging.set_verbosity(logging.WARNING)  # the libraries' notes at INFO would bury our lines
        return rest
    except SystemExit:
        asked = any(argument.lstrip("-").partition("=")[0] in _HELP for argument in argv[1:])
        raise SystemExit(0 if asked else 2) from None
    except (flags.Error, UserError) as error:
        exit_with(str(error))
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # ml_collections reports a config field of another type with these, absl a --flagfile that cannot be read.
        exit_with(str(error) if error.args else type(error).__name__)
