"""A bar on a terminal makes way for other text; elsewhere there are lines. Durations are told in two units."""

import io
import os
import re
import sys

import pytest

from terdit_jax.progress import Bar, Progress, format_duration
from terdit_jax.streams import SteadyStream


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (45.2, "45s"), (59.6, "1m00s"), (750, "12m30s"), (3600, "1h00m"), (11_100, "3h05m"),
        (86_399.6, "1d00h"), (198_000, "2d07h"), (float("nan"), "?"), (float("inf"), "?"),
    ],
)  # fmt: skip
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return -1


@pytest.fixture(autouse=True)
def size(monkeypatch):
    """The columns and lines of a terminal."""
    size = [100, 30]
    monkeypatch.setattr("os.get_terminal_size", lambda descriptor: os.terminal_size(size))
    return size


def test_a_bar_is_wiped_away_before_other_text_and_at_its_end(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", SteadyStream(terminal, "standard output"))
    other = SteadyStream(terminal, "standard error")
    bar = Bar(40, "steps", timed=False)
    assert terminal.getvalue() == "", "nothing is drawn before the first count"
    bar.tell("3m left")
    bar._bar.mininterval = 0
    bar.reached(10)
    assert re.search(r"25%.*10/40 steps, 3m left", terminal.getvalue())
    other.write("a line")
    other.write("\n")
    assert terminal.getvalue().endswith("\r\x1b[Ka line\n")
    print("another")
    assert terminal.getvalue().endswith("\x1b[Ka line\nanother\n"), "what is not there is not wiped away"
    bar.reached(20)
    bar.close()
    print("done")
    assert "20/40" in terminal.getvalue() and re.search(r"\r *\rdone\n$", terminal.getvalue())
    assert SteadyStream.bar is None


@pytest.mark.parametrize("stdout", [None, io.StringIO(), "closed"])
def test_without_a_terminal_there_is_no_bar(monkeypatch, stdout):
    if stdout == "closed":
        stdout = Terminal()
        stdout.close()
    monkeypatch.setattr(sys, "stdout", stdout)
    bar = Bar(40, "steps")
    bar.tell("text")
    bar.reached(3)
    bar.close()
    assert not bar.shown and SteadyStream.bar is None
    assert stdout is None or stdout.closed or not stdout.getvalue()


@pytest.mark.parametrize("side", [0, 1])
def test_a_terminal_of_no_size_has_lines(monkeypatch, size, side):
    size[side] = 0  # as containers and `script` make them: tqdm draws nothing there
    lines = []
    monkeypatch.setattr(sys, "stdout", SteadyStream(Terminal(), "standard output"))
    Progress(10, lines.append, seconds=0).reached(5)
    assert len(lines) == 1


def test_lines_of_progress_are_due_now_and_then(monkeypatch):
    clock, lines = [100.0], []
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    progress = Progress(5000, lines.append, start=1000, name="x: ", seconds=5)
    for seconds, done in ((1, 1100), (5, 1500), (6, 1600), (10, 2000)):
        clock[0] = 100.0 + seconds
        progress.reached(done)
    progress.reached(5000, now=True)
    assert lines == [
        "x: 1,500/5,000 images  100.0 a second  35s left",
        "x: 2,000/5,000 images  100.0 a second  30s left",
        "x: 5,000/5,000 images  400.0 a second  0s left",
    ]
