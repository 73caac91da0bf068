"""SIGTERM and Ctrl-C: the first is answered at once and saves, later SIGTERMs change nothing, a second Ctrl-C ends."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from terdit_jax.interrupts import STATUS
from terdit_jax.training import observers
from terdit_jax.training.observers import Interruption
from tests.runs import ROOT

TERM = "SIGTERM: stops after the step under way, once the state is saved"
INT = "Ctrl-C: stops after the step under way, once the state is saved; Ctrl-C again stops at once, without saving"
ENDED = "error: stopped at once by a second Ctrl-C, what was not saved is lost"
# One call in C for hours: no handler of Python's comes to run.
BUSY = """
import hashlib
from terdit_jax.training.observers import Interruption
with Interruption() as interruption:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def ask(number, times=1):
    for _ in range(times):
        os.kill(os.getpid(), number)
        time.sleep(0.02)


def said(capfd, count):
    """The lines on standard error, once there are `count` and a moment to see more."""
    text, deadline = "", time.monotonic() + 10
    while text.count("\n") < count and time.monotonic() < deadline:
        time.sleep(0.01)
        text += capfd.readouterr().err
    time.sleep(0.05)
    return (text + capfd.readouterr().err).splitlines()


@pytest.fixture
def handlers():
    """Checks that each signal does after an interruption what it did before."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before
    outer = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(outer)
    assert outer == -1


def test_nobody_asked(handlers):
    with Interruption() as asked:
        assert not asked.reached(1) and asked.name == ""


def test_a_second_sigterm_changes_nothing(handlers, capfd):
    with Interruption() as asked:
        ask(signal.SIGTERM, times=4)
        assert asked.reached(1) and asked.name == "SIGTERM"
        assert said(capfd, 1) == [TERM]
        ask(signal.SIGTERM)
        assert asked.reached(2) and said(capfd, 0) == []


def test_a_wrappers_second_ctrl_c_of_the_same_press_changes_nothing(handlers, capfd):
    with Interruption() as asked:
        ask(signal.SIGINT, times=3)
        assert asked.reached(1) and asked.name == "SIGINT"
        assert said(capfd, 1) == [INT]


def test_sigterm_after_ctrl_c_and_the_reverse_are_first_ones(handlers, capfd):
    for numbers in ((signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)):
        with Interruption() as asked:
            for number in numbers:
                ask(number)
            assert asked.name == numbers[0].name
            assert set(said(capfd, 2)) == {TERM, INT}


def test_a_second_ctrl_c_ends_the_process_even_after_sigterms(handlers, capfd, monkeypatch):
    ended = []
    monkeypatch.setattr(observers.os, "_exit", ended.append)
    monkeypatch.setattr(observers, "_ONE_PRESS_SECONDS", 0.01)
    with Interruption():
        ask(signal.SIGTERM, times=2)
        ask(signal.SIGINT)
        assert said(capfd, 2) == [TERM, INT] and not ended
        ask(signal.SIGINT)
        assert said(capfd, 1) == [ENDED] and ended == [STATUS]


def test_outside_the_main_thread_it_does_nothing(handlers):
    names = []

    def work():
        with Interruption() as asked:
            names.append(asked.name)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert names == [""]


FORK = """
import os, signal
from terdit_jax.interrupts import SignalWatch
with SignalWatch((signal.SIGINT, signal.SIGTERM), print, print):
    ready, asked = os.pipe()
    child = os.fork()
    if not child:
        os.write(asked, b".")
        signal.pause()
        os._exit(0)
    os.read(ready, 1)
    os.kill(child, signal.SIGTERM)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
"""


def test_a_child_that_was_forked_has_its_own_signals():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK]  # of a fork beside threads, from 3.12 on
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def busy():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", BUSY], env=environment, cwd=ROOT, **streams)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    yield process
    process.kill()
    process.communicate()


def test_both_are_answered_at_once_while_the_main_thread_is_in_c(busy):
    busy.send_signal(signal.SIGTERM)
    assert busy.stderr.readline() == TERM + "\n"
    busy.send_signal(signal.SIGTERM)
    busy.send_signal(signal.SIGINT)
    assert busy.stderr.readline() == INT + "\n"
    assert busy.poll() is None
    time.sleep(observers._ONE_PRESS_SECONDS + 0.2)
    busy.send_signal(signal.SIGINT)
    assert busy.stderr.readline() == ENDED + "\n"
    assert busy.wait(10) == STATUS
