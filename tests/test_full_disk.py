"""A disk without room: training goes on, what is saved stays, and the loss of a save is said once.

A limit on the size of files stands in for it: every write beyond it fails, in whatever thread, as on a full disk.
"""

import json
import resource
import time

import jax.numpy as jnp
import pytest

from terdit_jax.config import RunConfig
from terdit_jax.errors import UserError
from terdit_jax.training.metrics import METRICS_FILE, MetricsWriter
from tests.runs import (
    assert_same_run,
    execute,
    finish,
    metrics_without_timing,
    prepare_digits,
    programs,
    start,
    train_arguments,
)
from tests.test_checkpoint import open_checkpoints, restored_step, state


class full_disk:
    """Keeps every file of this process from growing beyond `room` bytes."""

    def __init__(self, room: int):
        self.room = room

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.room, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("room", [0, 200, 1000])
def test_a_save_without_room_is_given_up_and_the_others_stay(tmp_path, caplog, room):
    checkpoints = open_checkpoints(tmp_path, keep=2)
    large = {"w": jnp.arange(64.0 * 64 * 32).reshape(64, 64, 32)}
    for step in (1, 2):
        checkpoints.save(state(step), {"step": step})
        assert checkpoints.wait()
    with full_disk(room):
        for step in (3, 4):
            checkpoints.save(state(step) | {"params": large}, {"step": step})
            assert not checkpoints.wait()
            assert checkpoints.steps() == [1, 2]
    messages = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [message.split(" (")[0] for message in messages] == [
        "CHECKPOINT 3 COULD NOT BE SAVED",
        "CHECKPOINT 4 COULD NOT BE SAVED",
    ]
    assert all("large" in message for message in messages), "the disk's own words"
    checkpoints.save(state(5), {"step": 5})
    assert checkpoints.wait() and checkpoints.steps() == [2, 5]
    checkpoints.close()
    assert restored_step(tmp_path) == 5
    deadline = time.monotonic() + 10
    while sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) != ["2", "5"]:
        assert time.monotonic() < deadline, "what was half-written takes room"
        time.sleep(0.05)


def test_a_last_save_without_room_is_an_error(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(state(1), {"step": 1})
    checkpoints.wait()
    with full_disk(0):
        checkpoints.save(state(2), {"step": 2})
        message = "checkpoint 2 of .* could not be saved .File too large.: make room, then go on from 1$"
        with pytest.raises(UserError, match=message):
            checkpoints.close()
    assert restored_step(tmp_path) == 1


def test_an_error_that_is_not_the_disks_is_raised(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    with pytest.raises(TypeError, match="JSON"):
        checkpoints.save(state(1), {"step": 1, "what": object()})
        checkpoints.wait()


def test_lines_wait_for_room(tmp_path, caplog, monkeypatch):
    writer = MetricsWriter(tmp_path, 0, RunConfig())
    writer.write(1, {"loss": 0.5})
    with full_disk((tmp_path / METRICS_FILE).stat().st_size + 5):
        writer.write(2, {"loss": 0.25})
        writer.write(3, {"loss": 0.125})
    writer.write(4, {"loss": 0.0})
    writer.close()
    assert [json.loads(line)["step"] for line in (tmp_path / METRICS_FILE).read_text().splitlines()] == [1, 2, 3, 4]
    assert caplog.text.count("its lines wait") == 1
    assert METRICS_FILE in caplog.text


def test_a_run_whose_disk_fills_trains_to_its_end_and_ends_there_once_there_is_room(tmp_path):
    data, whole, run = prepare_digits(tmp_path / "digits"), tmp_path / "whole", tmp_path / "run"
    short = {"train__num_steps": 18, "log__heldout_every": 0}
    execute("main", *train_arguments(data, whole, **short))
    process = start("main", *train_arguments(data, run, **short), cache=programs())
    while not (run / METRICS_FILE).exists():
        assert process.poll() is None
        time.sleep(0.002)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    _, err = finish(process, status=2)
    assert "CHECKPOINT 18 COULD NOT BE SAVED" in err and "its lines wait" in err
    assert "error: checkpoint 18 of" in err.strip().splitlines()[-1]
    execute("main", *train_arguments(data, run, **short))
    assert_same_run(run, whole)
    assert metrics_without_timing(run)[-1]["step"] == 18
