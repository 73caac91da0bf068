"""Makes docs/commands.md from the flags of each command; run as a program, writes it.

python -m tests.commands_page
"""

from pathlib import Path
import re
import subprocess
import sys
from xml.etree import ElementTree

from terdit_jax.__main__ import COMMANDS

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
HEAD = """# Commands

Every command is written `python -m terdit_jax.COMMAND`, or in short `terdit COMMAND`; `terdit` alone lists them, with
the configurations that come with the package. `--help` prints what stands here. A flag with `[no]` is given as `--name`
or `--noname`. Where there is no default, the meaning says what happens without the flag. Input that a command cannot
use ends it with one line and exit status 2.
"""


def make_page() -> str:
    """The page: a section a command, with what it does, commands to start from, and its flags."""
    return HEAD + "".join(_section(command) for command in COMMANDS)


def _section(command: str) -> str:
    shown = subprocess.run(
        [sys.executable, "-m", f"terdit_jax.{command}", "--helpxml"], capture_output=True, text=True, check=True
    )
    root = ElementTree.fromstring(shown.stdout)
    text = re.sub(r"^(python -m .*)$", r"- `\1`", root.findtext("usage", "").strip(), flags=re.MULTILINE)
    flags = sorted((flag for flag in root.iter("flag") if flag.findtext("key")), key=lambda flag: flag.findtext("name"))
    section = f"\n## {command}\n\n{text}\n\n| Flag | Default | Meaning |\n|---|---|---|\n" + "".join(map(_row, flags))
    return re.sub(r"docs/(\w+\.md)", r"[\1](\1)", section)


def _row(flag: ElementTree.Element) -> str:
    name, default, meaning = (flag.findtext(part) or "" for part in ("name", "default", "meaning"))
    name = f"[no]{name}" if flag.findtext("type") == "bool" else name
    if values := [value.text for value in flag.iter("enum_value")]:
        meaning = f"{', '.join(f'`{value}`' for value in values)}: {meaning.partition('>: ')[2]}"
    default = f"`{default}`" if default not in ("", "None") else ""
    return f"| `--{name}` | {default} | {meaning} |\n"


if __name__ == "__main__":
    PAGE.write_text(make_page())
