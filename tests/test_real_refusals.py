"""Refusals of real file systems and users: another user's checkpoints, immutable ones, ones on another file system."""

import contextlib
import os
from pathlib import Path
import shutil
import subprocess
import tempfile
import threading

import pytest

from terdit_jax.checkpoints.reader import Checkpoints
from terdit_jax.errors import UserError
from tests.test_checkpoint import open_checkpoints, restored_step, saved, state, target  # noqa: F401  a fixture

NOBODY = 65534


def errors(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


@pytest.fixture
def workdir(saved):  # noqa: F811
    """A copy of `saved`, root's, in which another user may make files."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        for path in (Path(folder), Path(folder) / "checkpoints"):
            path.chmod(0o777)
        yield Path(folder)


@contextlib.contextmanager
def another_user():
    """This process has another user's rights; all that it needs is imported."""
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.contextmanager
def immutable(path):
    if subprocess.run(["chattr", "+i", path], capture_output=True, check=False).returncode:
        pytest.skip("needs root and a file system with immutable files")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", path], check=True)


def test_a_first_run_as_root_costs_the_second_as_another_user_no_save(workdir, caplog):
    with another_user():
        checkpoints = open_checkpoints(workdir, keep=2)
        for step in (4, 5, 6):
            checkpoints.save(state(step), {"step": step})
            assert checkpoints.wait()
        checkpoints.close()
        assert checkpoints.steps() == [1, 2, 3, 5, 6]
    assert restored_step(workdir) == 6
    said = "CHECKPOINT {0} COULD NOT BE DELETED (Permission denied): delete {1}/{0} yourself"
    assert sorted(errors(caplog)) == [said.format(step, workdir / "checkpoints") for step in (1, 2, 3)]


def test_a_checkpoint_that_another_user_may_not_read_is_not_damaged(workdir, caplog):
    (workdir / "checkpoints" / "3" / "params").chmod(0o700)
    with another_user():
        with pytest.raises(UserError, match=r"checkpoint 3 of .* cannot be read \(Permission denied\)"):
            open_checkpoints(workdir).restore(target(state(0)))
        assert Checkpoints(workdir).read_leaves("params")[0]["step"] == 2
        assert Checkpoints(workdir).read_leaves("ema_params")[0]["step"] == 3
    assert errors(caplog) == ["CHECKPOINT 3 CANNOT BE READ (Permission denied): falling back to the step before it"]
    assert restored_step(workdir) == 3


def test_a_folder_of_checkpoints_that_another_user_may_not_list_is_one_line(workdir):
    (workdir / "checkpoints").chmod(0o700)
    with another_user(), pytest.raises(UserError, match="cannot read .*checkpoints: Permission denied$"):
        Checkpoints(workdir).newest_run()


def test_a_folder_of_checkpoints_that_another_user_may_not_write_is_said_by_each_save(workdir, caplog):
    (workdir / "checkpoints").chmod(0o755)
    with another_user():
        checkpoints = open_checkpoints(workdir)
        assert checkpoints.restore(target(state(0)))[1]["step"] == 3
        for step in (4, 5):
            checkpoints.save(state(step), {"step": step})
            assert not checkpoints.wait()
            # Threads that went on waiting, with the arrays that they were to write, would keep the command from ending.
            assert not {"array_type_handler", "write_metadata_after_commits"} & {t.name for t in threading.enumerate()}
        with pytest.raises(UserError, match=r"5 of .* \(Permission denied\): make it writable, then go on from 3$"):
            checkpoints.close()
    assert [line.split(":")[0] for line in errors(caplog)] == [
        f"CHECKPOINT {step} COULD NOT BE SAVED (Permission denied)" for step in (4, 5)
    ]


def test_an_immutable_checkpoint_costs_one_line(saved, caplog):  # noqa: F811
    with immutable(saved / "checkpoints" / "1" / "params" / "_METADATA"):
        checkpoints = open_checkpoints(saved, keep=2)
        for step in (4, 5):
            checkpoints.save(state(step), {"step": step})
            assert checkpoints.wait()
        checkpoints.close()
        assert checkpoints.steps() == [1, 4, 5]
    assert len(errors(caplog)) == 1 and "1 COULD NOT BE DELETED (Operation not permitted)" in errors(caplog)[0]


@pytest.mark.parametrize("obstacle", ["another file system", "an immutable place"])
def test_a_damaged_checkpoint_is_set_aside_where_it_can_be(saved, tmp_path_factory, obstacle):  # noqa: F811
    checkpoints = saved / "checkpoints"
    (checkpoints / "3" / "params" / "_METADATA").write_text("{")
    with contextlib.ExitStack() as cleanup:
        if obstacle == "another file system":
            elsewhere = Path(cleanup.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))) / "checkpoints"
            if elsewhere.parent.stat().st_dev == saved.stat().st_dev:
                pytest.skip("there is no second file system")
            shutil.move(checkpoints, elsewhere)
            checkpoints.symlink_to(elsewhere)
        else:
            (saved / "damaged_checkpoints").mkdir()
            cleanup.enter_context(immutable(saved / "damaged_checkpoints"))
        assert restored_step(saved) == 2
        assert (checkpoints / "3.damaged" / "params").is_dir()
        writer = open_checkpoints(saved)  # the number is free again
        writer.save(state(3), {"step": 3})
        writer.close()
        assert restored_step(saved) == 3
