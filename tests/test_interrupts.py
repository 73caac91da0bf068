"""Ctrl-C ends a command with one line and status 130, whatever it is at, and temporary files go with it."""

import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest

from terdit_jax import interrupts
from tests.forked import COMMANDS
from tests.runs import ROOT

LINE = "error: interrupted by Ctrl-C\n"
START = """
import hashlib, sys, threading, time
import terdit_jax.errors
from terdit_jax.errors import run_command
from terdit_jax.files import new_file

def main(argv):
    pass

def ready():
    print("ready", flush=True)
"""
# Python runs: what the command had open is closed.
WAITING = """
def main(argv):
    with new_file("result") as file:
        file.write_text("half")
        ready()
        time.sleep(600)
"""
# One call in C for hours, as of a compiler.
IN_C = """
def main(argv):
    ready()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
# A library that takes the exception for its own.
DEAF = """
def main(argv):
    ready()
    while True:
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            pass
"""
READING_FLAGS = """
def parse(argv):
    ready()
    time.sleep(600)

terdit_jax.errors._parse_flags = parse
"""
IN_A_THREAD_TOO = """
def main(argv):
    threading.Thread(target=time.sleep, args=(600,)).start()
    ready()
    time.sleep(600)
"""


def start(*arguments, folder=ROOT):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "body",
    [WAITING, IN_C, DEAF, READING_FLAGS, IN_A_THREAD_TOO],
    ids=["waiting", "in_c", "deaf", "reading_flags", "in_a_thread_too"],
)
def test_one_line_at_once_then_the_end(tmp_path, body):
    process = start("-c", START + body + "run_command(main)", folder=tmp_path)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == LINE
    assert time.monotonic() - asked < interrupts._GRACE_SECONDS / 2
    _, err = process.communicate(timeout=60)
    assert process.returncode == interrupts.STATUS and err == ""
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_one_line_while_a_command_is_imported(command):
    process = start("-m", f"terdit_jax.{command}")
    while "numpy" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (interrupts.STATUS, "", LINE)


def test_who_imports_the_package_keeps_his_handler():
    code = "import signal, terdit_jax\nassert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    done = start("-c", code)
    assert done.communicate(timeout=60) == ("", "") and done.returncode == 0
