"""One run a workdir: a living holder is named, a dead one is no obstacle."""

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys

import pytest

from terdit_jax.checkpoints.lock import LOCK_FILE, WorkdirLock
from terdit_jax.errors import UserError
from tests.runs import ROOT, execute, prepare_digits, train_arguments

HOLD = "import sys, time; from terdit_jax.checkpoints.lock import WorkdirLock\nwith WorkdirLock(sys.argv[1]):\n"
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
    _, err = execute("main", *train_arguments(data, tmp_path), status=2)
    (line,) = [line for line in err.splitlines() if line.strip()]
    assert line.startswith("error: ") and f"in use by process {holder.pid}" in line
    assert half_written.exists(), "it is the other run's save"


def test_a_deleted_lock_file_grants_no_second_run(tmp_path, holder):
    (tmp_path / LOCK_FILE).unlink()
    with pytest.raises(UserError, match="in use by another process"):
        WorkdirLock(tmp_path).__enter__()
    # Another one in its place, as an overeager script leaves it, neither.
    (tmp_path / LOCK_FILE).write_text("{}")
    with pytest.raises(UserError, match="in use by another process"):
        WorkdirLock(tmp_path).__enter__()


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_the_target_of_a_linked_lock_file_keeps_its_bytes(tmp_path, link):
    target, workdir = tmp_path / "precious", tmp_path / "run"
    target.write_text("weights")
    workdir.mkdir()
    link(target, workdir / LOCK_FILE)
    with WorkdirLock(workdir):
        assert target.read_text() == "weights"
        with pytest.raises(UserError, match="in use by another process"):
            WorkdirLock(workdir).__enter__()
    assert target.read_text() == "weights"


def test_a_dangling_link_makes_no_file(tmp_path):
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "elsewhere")
    with WorkdirLock(tmp_path):
        assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_file_in_place_of_the_lock_file_is_no_obstacle(tmp_path, make):
    make(tmp_path / LOCK_FILE)
    with WorkdirLock(tmp_path), pytest.raises(UserError, match="in use by another process"):
        WorkdirLock(tmp_path).__enter__()


def refuse_flock(monkeypatch, number, refused=lambda descriptor: True):
    flock = fcntl.flock

    def refuse(descriptor, operation):
        if refused(descriptor):
            raise OSError(number, os.strerror(number))
        return flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO], ids=errno.errorcode.get)
def test_a_file_system_without_locks_costs_a_loud_line(tmp_path, caplog, monkeypatch, number):
    refuse_flock(monkeypatch, number)
    with WorkdirLock(tmp_path):
        (record,) = caplog.records
        assert record.levelname == "ERROR"
        said = f"{tmp_path} CANNOT BE LOCKED ({os.strerror(number)}): nothing keeps a second run from it"
        assert record.getMessage() == said


@pytest.mark.parametrize("only", [stat.S_ISREG, stat.S_ISDIR], ids=["files", "folders"])
def test_a_file_system_that_locks_either_is_enough(tmp_path, caplog, monkeypatch, only):
    # NFS locks files that are open for writing, and no folders.
    refuse_flock(monkeypatch, errno.EBADF, lambda descriptor: not only(os.fstat(descriptor).st_mode))
    with WorkdirLock(tmp_path), pytest.raises(UserError, match="in use by"):
        WorkdirLock(tmp_path).__enter__()
    assert not caplog.records


def test_a_lock_file_that_cannot_be_opened_is_no_obstacle(tmp_path, caplog, monkeypatch):
    open_file = os.open

    def refuse(path, flags, *mode, **options):
        if os.fspath(path).endswith(LOCK_FILE) and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return open_file(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", refuse)  # of another user
    with WorkdirLock(tmp_path), pytest.raises(UserError, match="in use by"):
        WorkdirLock(tmp_path).__enter__()
    assert not caplog.records
