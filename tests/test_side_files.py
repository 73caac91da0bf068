"""Events, traces, grids and best weights that cannot be written stop no run; nor do all side files in ruins."""

import errno
import json
import os
from types import SimpleNamespace

from etils import epath
import jax
import numpy as np
import pytest

from terdit_jax.checkpoints.best import open_best
from terdit_jax.checkpoints.lock import LOCK_FILE
from terdit_jax.config import RunConfig
from terdit_jax.errors import UserError
from terdit_jax.training import trackers
from terdit_jax.training.metrics import METRICS_FILE, MetricsWriter
from terdit_jax.training.observers import GOODPUT_FILE, HEARTBEAT_FILE, Heartbeat, Profiler, Steps
from tests.commands import no_flags
from tests.runs import execute, prepare_digits, train_arguments


def errors(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


def written_steps(workdir):
    return [json.loads(line)["step"] for line in (workdir / METRICS_FILE).read_text().splitlines()]


def refuse(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_events_that_cannot_be_opened_or_written_are_a_line(tmp_path, caplog, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(trackers, "TensorBoard", refuse)
        writer = MetricsWriter(tmp_path, 0, RunConfig())
        writer.write(1, {"loss": 0.5})
        writer.close()
    writer = MetricsWriter(tmp_path, 1, RunConfig())
    monkeypatch.setattr(trackers.TensorBoard, "write_scalars", refuse)
    for step in range(2, 40):
        writer.write(step, {"loss": 0.5})
        writer.write_image(step, "samples", np.zeros((4, 4, 3), np.uint8))
    writer.close()
    said = "log.writers: tensorboard fails (No space left on device): it gets nothing until the next start"
    assert errors(caplog) == [said] * 2 and written_steps(tmp_path) == [*range(1, 40)]


def test_every_flipped_bit_of_metrics_lets_a_run_go_on(tmp_path):
    good = b'{"step": 10, "loss": 0.5}\n{"step": 20, "loss": 0.5}\n'
    for position in range(len(good)):
        content = bytearray(good)
        content[position] ^= 1 << position % 8
        (tmp_path / METRICS_FILE).write_bytes(content)
        MetricsWriter(tmp_path, 20).write(30, {})
        assert written_steps(tmp_path)[-1] == 30


def test_a_heartbeat_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / HEARTBEAT_FILE / "inside").mkdir(parents=True)
    Heartbeat(tmp_path / HEARTBEAT_FILE).beat(1, now=True)
    assert [path.name for path in tmp_path.iterdir()] == [HEARTBEAT_FILE]


def test_a_trace_that_cannot_be_written_is_a_line(tmp_path, caplog, monkeypatch):
    def stop():
        raise RuntimeError("Permission denied")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", stop)
    profiler = Profiler(tmp_path, Steps(1, 1))
    profiler.before(1)
    profiler.after(1, {})
    assert not profiler.close() and len(errors(caplog)) == 1


def test_a_place_for_the_best_weights_is_needed_to_begin_but_not_to_go_on(tmp_path, caplog):
    (tmp_path / "best").write_text("")
    with pytest.raises(UserError, match="cannot use"):
        open_best(tmp_path, 0)
    assert open_best(tmp_path, 10) is None and "THE BEST WEIGHTS ARE NOT KEPT" in errors(caplog)[0]


def test_a_place_for_grids_that_takes_none_is_a_line(tmp_path, caplog):
    with no_flags():
        from terdit_jax.main import _grid_drawer
    (tmp_path / "samples").write_text("")
    config = SimpleNamespace(sample=SimpleNamespace(num_images=4))
    dataset = SimpleNamespace(metadata=SimpleNamespace(class_names=("0", "1")))
    setup = SimpleNamespace(config=config, dataset=dataset, workdir=epath.Path(tmp_path))
    _, grid = _grid_drawer(setup, lambda params, labels: np.zeros((4, 8, 8, 3)))(7, {})
    assert grid.shape[-1] == 3 and len(errors(caplog)) == 1 and "samples" in errors(caplog)[0]


@pytest.mark.parametrize(
    ("classes", "count", "columns", "labels"),
    [
        (10, 20, 10, [*range(10)] * 2),
        (1000, 16, 4, [0, 250, 500, 750] * 4),
        (3, 7, 3, [0, 1, 2, 0, 1, 2, 0]),
        (10, 4, 2, [0, 5, 0, 5]),
        (12, 16, 4, [0, 3, 6, 9] * 4),
        (1, 4, 2, [0] * 4),
        (2, 1, 1, [0]),
        (12, 400, 20, [*range(12), *range(8)] * 20),
    ],
)
def test_a_grid_has_a_column_a_class_with_its_name(tmp_path, monkeypatch, classes, count, columns, labels):
    with no_flags():
        from terdit_jax import main
    drawn = {}

    def make_grid(images, columns, titles):
        drawn.update(columns=columns, titles=titles)
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr(main, "make_grid", make_grid)
    names = tuple(f"class {label}" for label in range(classes))
    setup = SimpleNamespace(
        config=SimpleNamespace(sample=SimpleNamespace(num_images=count)),
        dataset=SimpleNamespace(metadata=SimpleNamespace(class_names=names)),
        workdir=epath.Path(tmp_path),
    )
    main._grid_drawer(setup, lambda params, labels: drawn.update(labels=labels) or np.zeros((count, 8, 8, 3)))(7, {})
    assert drawn["columns"] == columns and drawn["labels"].tolist() == labels
    assert drawn["titles"] == [names[label] for label in labels[:columns]]


@pytest.mark.slow
def test_a_run_goes_on_with_every_side_file_in_ruins(tmp_path):
    data, run = prepare_digits(tmp_path / "digits"), tmp_path / "run"
    fields = {"log__writers": "tensorboard", "log__heldout_every": 0}
    execute("main", *train_arguments(data, run, train__num_steps=6, **fields))
    (run / METRICS_FILE).write_bytes((run / METRICS_FILE).read_bytes()[:-20] + b"\xff\n")
    (run / GOODPUT_FILE).write_text('{"restarts": "x"}')
    for name in ("config.json", HEARTBEAT_FILE, LOCK_FILE):
        (run / name).unlink()
        (run / name / "inside").mkdir(parents=True)
    out, err = execute("main", *train_arguments(data, run, train__num_steps=12, **fields))
    assert "resuming at step 6" in out and "Traceback" not in err
    assert (run / "checkpoints" / "12").is_dir() and written_steps(run)[-1] == 12
    assert all(named in err for named in (METRICS_FILE, GOODPUT_FILE, "config.json"))
