"""Housekeeping that fails costs one loud line and no save; what cannot be read is neither damaged nor moved."""

import errno
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from terdit_jax.checkpoints import disk
from terdit_jax.checkpoints.manifest import find_damage
from terdit_jax.checkpoints.reader import Checkpoints
from terdit_jax.config import RunConfig
from terdit_jax.errors import UserError
from terdit_jax.training import run
from tests.faults.damages import flip
from tests.runs import ROOT
from tests.test_checkpoint import open_checkpoints, restored_step, saved, state, target  # noqa: F401

ITEMS = ["params", "ema_params", "rest", "run"]
HOUSEKEEPING = (errno.EPERM, errno.EACCES, errno.EBUSY, errno.EROFS)


def refusing(monkeypatch, module, name, number, where):
    """Lets a function fail with this error where one of its paths contains `where`."""
    function = getattr(module, name)

    def refuse(*arguments, **options):
        paths = [os.fspath(argument) for argument in arguments if isinstance(argument, str | os.PathLike)]
        if any(where in path for path in paths):
            raise OSError(number, os.strerror(number), paths[0])
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, refuse)


def loud_lines(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("number", HOUSEKEEPING, ids=errno.errorcode.get)
def test_an_old_checkpoint_that_cannot_be_deleted_costs_a_line_and_no_save(tmp_path, caplog, monkeypatch, number):
    refusing(monkeypatch, shutil, "rmtree", number, f"checkpoints{os.sep}1")
    checkpoints = open_checkpoints(tmp_path, keep=2)
    for step in range(1, 7):
        checkpoints.save(state(step), {"step": step})
        assert checkpoints.wait()
        assert find_damage(checkpoints.path(step), ITEMS) is None
    checkpoints.close()
    assert checkpoints.steps() == [1, 5, 6]
    (line,) = loud_lines(caplog)
    path = tmp_path / "checkpoints" / "1"
    assert line == f"CHECKPOINT 1 COULD NOT BE DELETED ({os.strerror(number)}): delete {path} yourself"
    assert restored_step(tmp_path) == 6


def test_a_checkpoint_of_which_one_file_cannot_be_deleted_costs_no_save(tmp_path, caplog, monkeypatch):
    checkpoints = open_checkpoints(tmp_path, keep=1)
    checkpoints.save(state(1), {"step": 1})
    checkpoints.wait()
    refusing(monkeypatch, os, "unlink", errno.EBUSY, "sha256.json")
    for step in (2, 3):
        checkpoints.save(state(step), {"step": step})
    checkpoints.close()
    assert checkpoints.steps()[-1] == 3 and find_damage(checkpoints.path(3), ITEMS) is None
    assert all("COULD NOT BE DELETED (Device or resource busy)" in line for line in loud_lines(caplog))
    monkeypatch.undo()
    assert restored_step(tmp_path) == 3


@pytest.mark.parametrize("number", HOUSEKEEPING, ids=errno.errorcode.get)
def test_half_written_saves_that_cannot_be_cleared_are_moved_away(tmp_path, monkeypatch, number):
    half_written = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    half_written.mkdir(parents=True)
    refusing(monkeypatch, shutil, "rmtree", number, "checkpoint-tmp")
    checkpoints = open_checkpoints(tmp_path)
    assert not half_written.exists() and (tmp_path / "damaged_checkpoints" / half_written.name).exists()
    checkpoints.save(state(4), {"step": 4})
    checkpoints.close()
    assert restored_step(tmp_path) == 4


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "make room"),
        (errno.EFBIG, "make room"),
        (errno.EPERM, "make it writable"),
        (errno.EACCES, "make it writable"),
        (errno.EROFS, "make it writable"),
        (errno.EBUSY, "see to the disk"),
        (errno.EIO, "see to the disk"),
        (errno.ESTALE, "see to the disk"),
    ],
)
def test_each_refusal_is_named_and_answered_by_its_cause(number, remedy):
    said = f"UNKNOWN: writing failed [os_error_code='{number}' path='x']"
    for error in (OSError(number, os.strerror(number), "x"), ValueError(said)):
        assert disk.is_refusal(error)
        assert disk.reason(error) == os.strerror(number)
        assert disk.remedy(error) == remedy
        assert "room" not in disk.reason(error)


@pytest.mark.parametrize(("number", "remedy"), [(errno.EACCES, "make it writable"), (errno.EIO, "see to the disk")])
def test_a_last_save_that_is_refused_says_why(tmp_path, caplog, monkeypatch, number, remedy):
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(state(1), {"step": 1})
    checkpoints.wait()
    refusing(monkeypatch, os, "replace", number, "sha256.json")
    checkpoints.save(state(2), {"step": 2})
    with pytest.raises(UserError, match=rf"checkpoint 2 of .* \({os.strerror(number)}\): {remedy}, then go on from 1$"):
        checkpoints.close()
    (line,) = loud_lines(caplog)
    assert line == f"CHECKPOINT 2 COULD NOT BE SAVED ({os.strerror(number)}): training goes on without it"
    assert Checkpoints(tmp_path).steps() == [1]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EPERM, errno.ESTALE], ids=errno.errorcode.get)
@pytest.mark.parametrize("file", ["sha256.json", "params", "run"])
def test_a_checkpoint_that_cannot_be_read_is_named_and_not_moved(saved, caplog, monkeypatch, number, file):  # noqa: F811
    refusing(monkeypatch, os, "stat", number, os.path.join("checkpoints", "3", file) + ("" if "." in file else os.sep))
    reason = os.strerror(number)
    refused = rf"checkpoint 3 of \S+ cannot be read \({reason}\): make it readable"
    # Who reads passes it over; a run that did would do its work again.
    wanted = target({name: state(0)[name] for name in ("params", "ema_params")})
    _, run = Checkpoints(saved).restore(wanted)
    assert run == {"step": 2}
    assert loud_lines(caplog) == [f"CHECKPOINT 3 CANNOT BE READ ({reason}): falling back to the step before it"]
    with pytest.raises(UserError, match=f"checkpoints/3 cannot be read: {reason}$"):
        Checkpoints(saved).read_leaves("params", 3)
    checkpoints = open_checkpoints(saved)
    with pytest.raises(UserError, match=refused) as caught:
        checkpoints.restore(target(state(0)))
    assert "damaged" not in str(caught.value)
    monkeypatch.undo()
    assert not (saved / "damaged_checkpoints").exists() and restored_step(saved) == 3


def across_file_systems(monkeypatch, tmp_path):
    refusing(monkeypatch, os, "rename", errno.EXDEV, "damaged_checkpoints")


def without_permission(monkeypatch, tmp_path):
    refusing(monkeypatch, os, "mkdir", errno.EACCES, "damaged_checkpoints")


def with_a_file_in_its_place(monkeypatch, tmp_path):
    (tmp_path / "damaged_checkpoints").write_text("mine")


@pytest.mark.parametrize("obstacle", [across_file_systems, without_permission, with_a_file_in_its_place])
def test_a_damaged_checkpoint_is_renamed_where_its_folder_cannot_be(saved, caplog, monkeypatch, obstacle):  # noqa: F811
    flip(saved / "checkpoints" / "3")
    obstacle(monkeypatch, saved)
    assert restored_step(saved) == 2
    assert len(loud_lines(caplog)) == 1 and "CHECKPOINT 3 IS DAMAGED" in caplog.text
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["1", "2", "3.damaged"]
    assert not (saved / "damaged_checkpoints").is_dir()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_damaged_checkpoint_that_cannot_be_moved_costs_no_other(saved, caplog, monkeypatch, keep):  # noqa: F811
    (saved / "checkpoints" / "3").rename(saved / "checkpoints" / "9")
    flip(saved / "checkpoints" / "9")
    refusing(monkeypatch, os, "rename", errno.EROFS, os.path.join("checkpoints", "9"))
    checkpoints = open_checkpoints(saved, keep=keep)
    _, run = checkpoints.restore(target(state(0)))
    assert run == {"step": 2}
    assert [line.split(" (")[0].split(os.sep)[-1] for line in loud_lines(caplog)] == [
        "CHECKPOINT 9 IS DAMAGED",
        "9 COULD NOT BE SET ASIDE",
    ]
    for step in (4, 5, 6):
        checkpoints.save(state(step), {"step": step})
        assert checkpoints.wait()
    assert checkpoints.steps() == [4, 5, 6][-keep:] + [9]
    caplog.clear()
    checkpoints.save(state(9), {"step": 9})
    (line,) = loud_lines(caplog)
    assert line == "CHECKPOINT 9 COULD NOT BE SAVED: another stands in its place, move it away"
    with pytest.raises(UserError, match="checkpoint 9 of "):
        checkpoints.close()
    assert restored_step(saved) == 6


def put_a_folder(path):
    path.mkdir()


def put_garbage(path):
    path.write_bytes(b"\xff")


@pytest.mark.parametrize(("spoil", "lines"), [(put_a_folder, 1), (put_garbage, 0)])
def test_a_config_file_that_cannot_be_written_costs_a_line(tmp_path, caplog, spoil, lines):
    spoil(tmp_path / "config.json")
    run._write_config(SimpleNamespace(workdir=tmp_path, config=RunConfig()))
    assert len(loud_lines(caplog)) == lines == caplog.text.count("config.json cannot be written: Is a directory")


FAIL = """
import resource, sys
from absl import app, logging
from tests.test_checkpoint import open_checkpoints, state
import jax.numpy as jnp

def main(_):
    checkpoints = open_checkpoints(sys.argv[1])
    checkpoints.save(state(1), {"step": 1})
    checkpoints.wait()
    large = {f"w{i}": jnp.arange(64.0 * 64 * 8).reshape(8, 64, 64) for i in range(20)}
    for step, room in enumerate((0, 0, 200, 1000, 30_000, 60_000), 2):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        checkpoints.save(state(step) | {"params": large}, {"step": step})
        assert not checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    checkpoints.save(state(8), {"step": 8})
    checkpoints.close()

logging.set_verbosity(logging.WARNING)
app.run(main, argv=sys.argv[:1])
"""


def test_six_failed_saves_print_six_lines(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FAIL, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 6, done.stderr
    for step, line in enumerate(lines, 2):
        assert f"CHECKPOINT {step} COULD NOT BE SAVED (File too large): training goes on without it" in line
    assert done.stdout == ""
    assert Checkpoints(tmp_path).steps() == [1, 8]
