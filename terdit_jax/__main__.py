"""The program `terdit`, also `python -m terdit_jax`: lists commands and configurations, or runs a command.

`terdit sample --model=runs/digits` is `python -m terdit_jax.sample --model=runs/digits`, to which the flags belong.
"""

import ast
import os
from pathlib import Path
import runpy
import sys

from terdit_jax import __version__
from terdit_jax.config_file import SHIPPED
from terdit_jax.errors import exit_with
from terdit_jax.interrupts import end_while_importing
from terdit_jax.streams import steady_streams

COMMANDS = ("prepare", "main", "sample", "export", "evaluate", "report", "compile")


def main() -> None:
    """Runs the program with the words of the command line."""
    command, *_ = *sys.argv[1:], "--help"
    if command in ("--version", "--help", "--helpshort", "-h", "-?", "help"):
        streams = steady_streams()
        print(f"terdit-jax {__version__}" if command == "--version" else overview())
        for stream in streams:
            stream.finish()
    elif command in COMMANDS:
        end_while_importing()
        if not sys.flags.safe_path:
            sys.path[0] = os.getcwd()  # as `python -m` has it: configurations may import what lies there
        del sys.argv[1]
        runpy.run_module(f"terdit_jax.{command}", run_name="__main__", alter_sys=True)
    else:
        exit_with(f"terdit {command}: there is no such command; there are {', '.join(COMMANDS)}")


def overview() -> str:
    """The commands and shipped configurations, one a line."""
    commands = [f"  {name:<9} {_title(Path(__file__).with_name(f'{name}.py'))}" for name in COMMANDS]
    configs = [f"  {name:<18} {_title(path)}" for name, path in SHIPPED.items()]
    return "\n".join(
        (
            "usage: terdit COMMAND [--FLAG=VALUE ...], also written python -m terdit_jax.COMMAND\n",
            *("commands, each with its flags by --help:", *commands, ""),
            *("configurations, for --config=NAME (or --config=FILE.py):", *configs),
        )
    )


def _title(path: Path) -> str:
    """The first line of a file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_bytes())) or "").partition("\n")[0]


if __name__ == "__main__":
    main()
