"""The program `terdit` and what all commands share: help and versions without the packages that do the work."""

import functools
from pathlib import Path
import shutil
import subprocess
import sys
import zipfile

import pytest

import terdit_jax
from terdit_jax import __main__ as program
from terdit_jax.config_file import SHIPPED
from tests.runs import ROOT

HEAVY = {"jax", "jaxlib", "flax", "torch", "sklearn", "tensorboardX", "tensorflow", "tensorflow_datasets", "orbax"}
# The program with these words, then the heavy modules that it has imported, on the last line.
RUN = f"""
import atexit, sys
atexit.register(lambda: print(sorted({HEAVY} & set(sys.modules))))
from terdit_jax.__main__ import main
main()
"""


@functools.cache
def said(*words: str, status: int = 0, folder: Path = ROOT) -> str:
    """The text that `terdit` prints on both streams."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *words], cwd=folder, env={"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stdout
    return done.stdout


@pytest.mark.parametrize("command", program.COMMANDS)
def test_help_of_a_command_imports_nothing_heavy(command):
    text, heavy = said(command, "--helpshort").rsplit("\n", 2)[:2]
    assert heavy == "[]" and "flags:" in text
    assert program.overview().count(f"\n  {command:<9} {text.splitlines()[0]}\n") == 1


def test_the_program_lists_commands_and_configurations():
    text, heavy = said().rsplit("\n", 2)[:2]
    assert heavy == "[]" and text == program.overview() == said("--help").rsplit("\n", 2)[0]
    assert set(SHIPPED) == {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert all(f"\n  {name} " in text for name in (*program.COMMANDS, *SHIPPED))


def test_versions():
    assert said("--version") == said("export", "--version") == f"terdit-jax {terdit_jax.__version__}\n[]\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["smaple"], "terdit smaple: there is no such command; there are prepare, main, sample, "),
        (["--workdir=x"], "terdit --workdir=x: there is no such command"),
        (["sample", "--modle=x"], "Unknown command line flag 'modle'. Did you mean: mode, model ?"),
        (["export", "x"], "unexpected argument 'x': every option is written --name=value"),
        (
            ["main", "--config=terdit_5b"],
            "terdit_5b cannot be read: No such file or directory; by name there are ",
        ),
        (["main", "--config=configs/digits.py"], "; by name there are cifar10, digits, "),  # not in a checkout
    ],
)
def test_wrong_words_are_one_line_and_status_2(words, line, tmp_path):
    (found,) = said(*words, status=2, folder=tmp_path).splitlines()
    assert found.startswith("error: ") and line in found


def test_a_configuration_by_name_is_the_shipped_one_and_may_be_built_upon(tmp_path):
    (tmp_path / "digits").mkdir()
    base, mine = "import terdit_jax.configs.digits as base", "def get_config():\n  c = base.get_config(); c.seed = 7"
    (tmp_path / "mine.py").write_text(f"{base}\n{mine}\n  return c\n")
    (tmp_path / "show.py").write_text(
        "from terdit_jax.config import freeze\nfrom terdit_jax.config_file import load_config\n"
        f"named, mine = load_config('digits'), load_config('mine.py')\nassert mine.seed == 7\nmine.seed = named.seed\n"
        f"assert freeze(named) == freeze(mine) == freeze(load_config({str(ROOT / 'configs' / 'digits.py')!r}))\n"
    )
    subprocess.run([sys.executable, "show.py"], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True)


@pytest.mark.slow
def test_a_wheel_holds_the_program_and_the_configurations(tmp_path):
    pytest.importorskip("setuptools")
    parts = ("terdit_jax", "configs", "pyproject.toml", "README.md", "LICENSE")
    for part in parts:
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, tmp_path / part)
    shutil.rmtree(tmp_path / "terdit_jax" / "configs")
    (tmp_path / "terdit_jax" / "configs").symlink_to("../configs")
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(tmp_path / done.stdout.splitlines()[-1]) as wheel:
        assert b"terdit = terdit_jax.__main__:main" in b"".join(
            wheel.read(name) for name in wheel.namelist() if name.endswith("entry_points.txt")
        )
        wheel.extractall(tmp_path / "installed")
    show = [sys.executable, "-m", "terdit_jax"]
    for words in ([], ["main", "--config=digits", "--helpshort"]):
        done = subprocess.run(
            [*show, *words], cwd=tmp_path / "installed", env={}, capture_output=True, text=True, check=True
        )
        assert words or done.stdout.strip() == program.overview()
