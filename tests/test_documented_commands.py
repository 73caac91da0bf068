"""The commands of README.md and docs/*.md, run verbatim as a user runs them, and those that they print as `next:`.

Commands stand in blocks marked `sh`, snippets in `python`; output, diagrams and listings in `text`. Each page begins in
a fresh folder that is like a checkout, without data and runs; documented_commands.py says what is added and left out.
"""

from collections.abc import Iterator
import dataclasses
import functools
import hashlib
import importlib.util
import os
from pathlib import Path
import re
import shutil
import subprocess
import textwrap
import time

import pytest

from terdit_jax.choices import FORMATS
from tests import documented_commands as tables
from tests.documented_inputs import make, make_class_folders
from tests.forked import COMMANDS
from tests.runs import ROOT, command_environment, programs, quick_python

PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
FROM_CHECKOUT = ("configs", "launch", "models", "benchmarks", "requirements.txt", "pyproject.toml")
NEXT = "next: "
COMMAND_WORDS = r"(python3? -m |launch/\w|\.venv/|pip install|gcloud |git |curl |bash |--[a-z])"


@dataclasses.dataclass(frozen=True)
class Block:
    page: str
    line: int
    kind: str
    text: str


@functools.cache
def blocks() -> tuple[Block, ...]:
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text()
        for match in re.finditer(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", text, re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(page, line, match[2], textwrap.dedent(match[3])))
    return tuple(found)


def commands(text: str) -> list[str]:
    """The commands of an `sh` block, each on one line: without comments, continued lines joined as a shell does."""
    without_comments = re.sub(r"\s+#\s.*$", "", text, flags=re.MULTILINE)
    lines = re.sub(r"\\\n *", "", without_comments).splitlines()
    return [re.sub(r"\s+", " ", line).strip() for line in lines if line.strip()]


def entry(command: str) -> tuple[str, str, str] | None:
    """The table, the pattern and the value for a command; None if no pattern is its own."""
    for name in ("NOT_RUN", "RUN", "ONLY_READ"):
        for pattern, value in getattr(tables, name).items():
            if re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), command):
                return name, pattern, value
    return None


def all_commands() -> Iterator[tuple[Block, str]]:
    for block in blocks():
        if block.kind == "sh":
            for command in commands(block.text):
                yield block, command


def test_every_block_says_what_it_holds():
    for block in blocks():
        where = f"{block.page}:{block.line}"
        assert block.kind in ("sh", "python", "text", "math", "bibtex"), f"{where}: mark it ```sh, ```python or ```text"
        if block.kind == "text":
            hidden = re.search(rf"^\s*(\$ )?{COMMAND_WORDS}", block.text, re.MULTILINE)
            assert not hidden, f"{where}: a command in a block of text: {hidden[0]}"


def test_every_command_is_covered():
    missing = [f"{block.page}:{block.line}: {command}" for block, command in all_commands() if not entry(command)]
    assert not missing, "add these to tests/documented_commands.py:\n" + "\n".join(missing)


def test_every_entry_is_still_needed():
    used = {entry(command)[:2] for _, command in all_commands() if entry(command)}
    unused = [
        pattern for name in ("NOT_RUN", "RUN", "ONLY_READ") for pattern in getattr(tables, name)
        if (name, pattern) not in used
    ]  # fmt: skip
    snippets = [block.text for block in blocks() if block.kind == "python"]
    unused += [part for part in tables.SNIPPETS_NOT_RUN if not any(part in text for text in snippets)]
    with_commands = {block.page for block in blocks() if block.kind in ("sh", "python")}
    unused += sorted(set(tables.INPUTS) - with_commands)
    assert not unused, "no page holds these any more: take them out of tests/documented_commands.py"


class User:
    """Someone at a shell in a folder that is like a checkout."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self._environment = folder, {**environment, "HOME": str(folder / "home")}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "home").mkdir(exist_ok=True)
        for name in FROM_CHECKOUT:
            if not (folder / name).exists():
                (folder / name).symlink_to(ROOT / name)

    def types(self, line: str, status: int = 0) -> str:
        """Runs a line, checks its exit status, and returns what it printed."""
        begin = time.perf_counter()
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.folder, env=self._environment, capture_output=True, text=True, timeout=900
        )
        print(f"{time.perf_counter() - begin:6.1f} s  {line}")
        printed = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        assert done.returncode == status, f"status {done.returncode}: {line}\n{printed}"
        return done.stdout

    def follows(self, command: str) -> None:
        """Runs a command as the tables say, then, in a copy of the folder, what it prints as `next:`, once a kind."""
        assert (found := entry(command)), f"no entry of tests/documented_commands.py covers: {command}"
        table, pattern, value = found
        if table == "NOT_RUN" or _lacks_package(command):
            return
        if table == "ONLY_READ":
            self.types(f"{command} --only_check_args")
            return
        out = self.types(f"{command} {value}")
        for line in out.splitlines():
            if line.startswith(NEXT) and self._is_first(pattern, line):
                copy = shutil.copytree(self.folder, self.folder.with_name(self.folder.name + "-next"), symlinks=True)
                User(copy, self._environment).follows(line.removeprefix(NEXT))
                shutil.rmtree(copy)

    def _is_first(self, pattern: str, line: str) -> bool:
        """Whether no command of this pattern has been followed to such a line yet, in any process of pytest-xdist."""
        following = entry(line.removeprefix(NEXT))
        name = hashlib.sha256(f"{pattern}\n{following and following[1] or line}".encode()).hexdigest()
        try:
            (Path(self._environment["JAX_COMPILATION_CACHE_DIR"]) / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def runs(self, snippet: str) -> None:
        if _lacks_package(snippet) or any(part in snippet for part in tables.SNIPPETS_NOT_RUN):
            return
        (self.folder / "snippet.py").write_text(snippet)
        self.types("python snippet.py")


def _lacks_package(text: str) -> bool:
    return any(
        any(part in text for part in parts) and importlib.util.find_spec(package) is None
        for package, parts in tables.NEEDS.items()
    )


@pytest.fixture(scope="module")
def environment():
    """The environment of commands: one CPU device, a cache of programs, and a `python` that need not import JAX."""
    return {**command_environment(programs()), "PATH": f"{quick_python()}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def digits(environment, tmp_path_factory):
    """A folder with data/digits and runs/digits, as the quickstart leaves them."""
    user = User(tmp_path_factory.mktemp("digits"), environment)
    make("data/digits", user.folder / "data" / "digits")
    user.types(f"python -m terdit_jax.main --config=configs/digits.py --workdir=runs/digits {tables.EVERYTHING}")
    return user.folder


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] * (page in tables.SLOW_PAGES))
        for page in PAGES
        if any(page == block.page for block, _ in all_commands())
    ],
)
def test_page(page, environment, request, tmp_path):
    user = User(tmp_path / "terdit-jax", environment)
    for name in tables.INPUTS.get(page, ()):
        if name == "runs/digits":
            take(request.getfixturevalue("digits"), user)
        else:
            make(name, user.folder / name)
    for block in blocks():
        if block.page == page and block.kind == "sh":
            for command in commands(block.text):
                user.follows(command)
        elif block.page == page and block.kind == "python":
            user.runs(block.text)


def take(folder: Path, user: User) -> None:
    """Copies the data and the runs of a folder to a user's."""
    for part in ("data", "runs"):
        shutil.copytree(folder / part, user.folder / part)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_no_failure(command, environment, tmp_path):
    user = User(tmp_path, environment)
    for flag in ("--help", "--helpshort", "--helpfull", "-?"):
        assert "flags" in user.types(f"python -m terdit_jax.{command} {flag}")
    user.types(f"python -m terdit_jax.{command} --helpful", status=2)


def test_relative_paths_and_home_beyond_the_pages(environment, digits, tmp_path):
    """Resuming, starting from weights, every format and both libraries, with `~` and with spaces."""
    user = User(tmp_path / "work", environment)
    take(digits, user)
    (user.folder / "home" / "mine.py").write_text((ROOT / "configs" / "digits.py").read_text())
    train = "python -m terdit_jax.main"
    out = user.types(f"{train} --config=~/mine.py --workdir=runs/digits {tables.TRAINING} --config.train.num_steps=3")
    assert "resuming at step 2" in out
    user.types(
        f"{train} --config=configs/digits.py --workdir=~/'my runs'/second --config.train.init_from=runs/digits"
        f" {tables.TRAINING} --heartbeat=~/beat.json"
    )
    assert {"my runs", "beat.json"} <= {path.name for path in (user.folder / "home").iterdir()}
    for kind in FORMATS if importlib.util.find_spec("torch") else {*FORMATS} - {"torch"}:
        user.types(f"python -m terdit_jax.export --workdir=~/'my runs'/second --format={kind} --output=~/{kind}")
        user.types(f"python -m terdit_jax.export --model=~/{kind} --format={kind} --output=out/{kind}")
    user.types("python -m terdit_jax.sample --model=~/packed --num_samples=2 --output=~/'my images'/two.npz")
    shutil.copytree(ROOT / "docs" / "pods", user.folder / "home" / "reports")
    user.types("python -m terdit_jax.compile --table=~/reports")
    user.runs(
        "import terdit_jax\nfor path in ('runs/digits', '~/my runs/second', '~/packed'): terdit_jax.load_model(path)"
    )
    user.runs("from terdit_jax.interop.pytorch import load\nload('~/packed'), load('out/packed')")
    assert not (user.folder / "~").exists()


def test_a_data_set_with_spaces_in_its_name_is_trained_as_prepare_says(environment, tmp_path):
    user = User(tmp_path, environment)
    make_class_folders(user.folder / "my images", ["cat", "dog"], 10)
    out = user.types(
        "python -m terdit_jax.prepare --source=folder --input='my images' --output=~/'my data'/'of two classes'"
    )
    training = out.splitlines()[-1].removeprefix(NEXT)
    out = user.types(f"{training} {tables.TRAINING}")
    sampling = out.splitlines()[-1].removeprefix(NEXT)
    assert "--labels=0,1 " in sampling
    user.types(sampling)
