"""One run a workdir: a living holder is named, a dead one is no obstacle."""

import os
import signal
import subprocess
import sys

import pytest
from runs import ROOT, finish, prepare_digits, start, train_arguments

from terdit_jax.errors import UserError
from terdit_jax.training.lock import LOCK_FILE, WorkdirLock

HOLD = "import sys, time; from terdit_jax.training.lock import WorkdirLock\nwith WorkdirLock(sys.argv[1]):\n"
HOLD += "    print('held', flush=True)\n    time.sleep(600)"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the workdir's lock."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_living_holder_is_named_and_a_killed_one_leaves_no_lock(tmp_path, holder):
    with pytest.raises(UserError, match=rf"in use by process {holder.pid} on \S+ since 20") as caught:
        WorkdirLock(tmp_path).__enter__()
    assert "\n" not in str(caught.value)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with WorkdirLock(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK_FILE).read_text()
    with WorkdirLock(tmp_path):
        pass


def test_a_holder_without_a_note_is_refused_as_well(tmp_path, holder):
    (tmp_path / LOCK_FILE).write_text("")
    with pytest.raises(UserError, match="in use by another process"):
        WorkdirLock(tmp_path).__enter__()


def test_a_second_run_of_a_workdir_is_refused_before_it_touches_anything(tmp_path, holder):
    data = prepare_digits(tmp_path / "digits")
    half_written = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    half_written.mkdir(parents=True)
    _, err = finish(start("main", *train_arguments(data, tmp_path), cache=tmp_path / "cache"), status=2)
    (line,) = [line for line in err.splitlines() if line.strip()]
    assert line.startswith("error: ") and f"in use by process {holder.pid}" in line
    assert half_written.exists(), "it is the other run's save"
