"""Trackers hold what metrics.jsonl holds, once, over kills and resumes; one that fails or waits costs a line."""

import collections
import errno
import importlib.util
import json
import math
import os
import re
import signal
import struct
import threading
import time

import numpy as np
from PIL import Image
import pytest

from terdit_jax.config import RunConfig, freeze
from terdit_jax.config_rules import flatten
from terdit_jax.errors import UserError
from terdit_jax.training import trackers
from terdit_jax.training.metrics import METRICS_FILE, MetricsWriter
from terdit_jax.training.trackers import TRACKERS_FILE, Tracker, check_writers, chosen, tagged
from tests.runs import execute, logged_steps, prepare_digits, programs, signed_steps, start, train_arguments

GRID = np.zeros((4, 4, 3), np.uint8)


def log(**fields):
    return RunConfig().with_fields({f"log.{name}": value for name, value in fields.items()}).log


def expected(workdir):
    """By (tag, step), what trackers shall hold of a run; no step has a figure twice."""
    lines = [json.loads(line) for line in (workdir / METRICS_FILE).read_text().splitlines()]
    rows = [((tag, line["step"]), value) for line in lines for tag, value in tagged(line).items()]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def test_writers_are_named_in_any_order_and_older_files_leave_events_out():
    assert chosen(RunConfig().log) == ["tensorboard"]
    assert chosen(log(writers="mlflow,tensorboard,mlflow")) == ["mlflow", "tensorboard"]
    assert chosen(log(writers="")) == chosen(log(tensorboard=False)) == []
    assert chosen(log(tensorboard=False, writers="tensorboard,wandb")) == ["wandb"]
    for names in ("wanbd", "wandb mlflow", "tensorboard, wandb", "WANDB"):
        with pytest.raises(UserError, match=f"config.log.writers='{names}': must be any of tensorboard, wandb, mlflow"):
            log(writers=names)


def test_configurations_from_before_there_were_writers_are_whole():
    given = dict(flatten(RunConfig().to_dict())) | {"log.tensorboard": False}
    assert not chosen(freeze(given).log)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch, name):
    found = importlib.util.find_spec("json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if package == name else found)
    with pytest.raises(UserError) as refused:
        check_writers(log(writers=f"tensorboard,{name}"))
    said = f'config.log.writers=tensorboard,{name}: {name} is not installed: pip install "terdit-jax[{name}]"'
    assert str(refused.value) == said
    check_writers(log(writers="tensorboard"))
    # A folder of that name, in which W&B keeps runs, is no package.
    monkeypatch.undo()
    (tmp_path / "no_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trackers, "chosen", lambda log: ["no_package"])
    with pytest.raises(UserError, match="no_package is not installed"):
        check_writers(log())


def test_tags_are_in_groups_and_a_figure_without_a_value_is_no_number():
    line = {"step": 4, "loss": 0.5, "rms/block": 1.0, "grad_norm": None, "timing": {"mfu": 0.25}}
    figures = tagged(line)
    assert math.isnan(figures.pop("train/grad_norm"))
    assert figures == {"train/loss": 0.5, "rms/block": 1.0, "time/mfu": 0.25}
    heldout = tagged({"step": 4, "heldout_loss": 1.0, "heldout_loss_ema": 2.0})
    assert heldout == {"heldout/loss": 1.0, "heldout/loss_ema": 2.0}
    assert tagged({"step": 4, "classifier_agreement": 0.5}) == {"score/classifier_agreement": 0.5}


class Kept:
    """Keeps what it is given; holds steps up to `held`, and `fails` in one of its methods."""

    def __init__(self, held=-1, fails="", waits=False):
        self.held, self.fails, self.waits, self.seen, self.pictures, self.closed = held, fails, waits, [], [], False

    def _may_fail(self, method):
        if method == self.fails:
            raise ConnectionError(f"{method}: refused")

    def holds(self, tag, step):
        return step <= self.held

    def write_hparams(self, hparams):
        self._may_fail("write_hparams")

    def write_scalars(self, step, scalars):
        self._may_fail("write_scalars")
        self.seen += [(tag, step) for tag in scalars]

    def write_images(self, step, images):
        self._may_fail("write_images")
        self.pictures.append(step)

    def flush(self):
        self._may_fail("flush")

    def close(self):
        self._may_fail("close")
        self.closed = True


def test_a_tracker_is_given_what_it_lacks_of_the_past_and_nothing_twice():
    writer = Kept(held=20)
    past = [(step, {"train/loss": 1.0}, {}) for step in (10, 20, 30)] + [(30, {}, {"samples": GRID})]
    tracker = Tracker("kept", lambda: writer, {}, lambda: past)
    tracker.put(20, {"train/loss": 1.0})
    tracker.put(40, {"train/loss": 1.0, "time/mfu": 1.0})
    tracker.put(40, images={"samples": GRID})
    tracker.close()
    assert writer.seen == [("train/loss", 30), ("train/loss", 40), ("time/mfu", 40)] and writer.pictures == [30, 40]
    assert writer.closed


def test_a_tracker_that_takes_nothing_back_gets_a_step_once_the_run_would_go_on_after_it(caplog):
    saved, steps = [0], (10, 20, 30, 40, 50)

    def follow(waits):
        saved[0], writer = 20, Kept(waits=waits)
        tracker = Tracker("kept", lambda: writer, {}, lambda: [(10, {"train/loss": 1.0}, {})], lambda: saved[0])
        for step in steps[1:]:
            tracker.put(step, {"train/loss": 1.0}, {"samples": GRID} if step == 30 else None)
        tracker.put(50, {"heldout/loss": 1.0})
        while not tracker._queue.empty():
            time.sleep(0.001)
        before = list(writer.seen)
        saved[0] = 40
        tracker.close()
        assert writer.closed and writer.pictures == [30]
        return [step for _, step in before], [step for _, step in writer.seen]

    assert follow(waits=False)[1] == [*steps, 50] and not caplog.records
    assert follow(waits=True) == ([10, 20], [10, 20, 30, 40])
    assert "kept takes nothing back: it is given what follows the last checkpoint" in caplog.text


@pytest.mark.parametrize("method", ["make", "write_hparams", "write_scalars", "write_images", "flush", "close"])
def test_a_tracker_that_fails_is_said_once(caplog, method):
    def make():
        if method == "make":
            raise SystemExit("no account")
        return Kept(fails=method)

    tracker = Tracker("kept", make, {})
    for step in range(50):
        tracker.put(step, {"train/loss": 1.0}, {"samples": GRID})
    tracker.close()
    (record,) = caplog.records
    assert re.fullmatch(
        r"log.writers: kept fails \(.*(refused|no account)\): it gets nothing until .*", record.getMessage()
    )


def test_a_tracker_that_hangs_holds_nothing_up(caplog, monkeypatch):
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 0.01)
    monkeypatch.setattr(trackers, "OPENING_SECONDS", 0.01)
    forever = threading.Event()
    tracker = Tracker("kept", forever.wait, {})
    assert "kept does not answer" in caplog.text
    tracker.put(1, {"train/loss": 1.0})
    tracker.close()
    assert "kept has not taken all of it" in caplog.text
    forever.set()


def write_run(workdir, steps, begin=0, writers="tensorboard"):
    """Lines of some steps, and a grid at every twentieth, as a run that begins after step `begin` writes them."""
    writer = MetricsWriter(workdir, begin, RunConfig().with_fields({"log.writers": writers}))
    (workdir / "samples").mkdir(exist_ok=True)
    for step in steps:
        writer.write(step, {"loss": 1 / step, "grad_norm": math.nan}, {"images_per_second": time.time()})
        if step % 20 == 0:
            writer.write(step, {"heldout_loss": 0.5, "heldout_loss_ema": 0.25})
            Image.fromarray(GRID).save(workdir / "samples" / f"step_{step:08d}.png")
            writer.write_image(step, "samples", GRID)
    return writer


def events(workdir):
    """By tag, the steps that TensorBoard shows of a workdir's events: a session drops what comes from its step on."""
    return events_of(*sorted(workdir.glob("events.out.tfevents.*")))


def events_of(*paths):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown = collections.defaultdict(list)
    for path in paths:
        content, at = path.read_bytes(), 0
        while at + 12 < len(content):
            (size,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + size])
            at += size + 16
            if event.session_log.status == SessionLog.START:
                shown = collections.defaultdict(
                    list, {tag: [step for step in steps if step < event.step] for tag, steps in shown.items()}
                )
            for value in event.summary.value:
                shown[value.tag].append(event.step)
    return shown


def test_tensorboard_holds_each_figure_once_over_a_kill(tmp_path):
    write_run(tmp_path, range(10, 90, 10)).close()
    time.sleep(1.1)  # events files are named by the second
    write_run(tmp_path, range(50, 110, 10), begin=40).close()
    shown = events(tmp_path)
    assert len(shown.pop("config/text_summary")) == 2 and shown.pop("samples") == [20, 40, 60, 80, 100]
    assert sorted((tag, step) for tag, steps in shown.items() for step in steps) == sorted(expected(tmp_path))


def test_a_tracker_that_comes_later_gets_the_whole_run(tmp_path):
    write_run(tmp_path, range(10, 90, 10), writers="").close()
    assert not (tmp_path / TRACKERS_FILE).exists() and not list(tmp_path.glob("events*"))
    (tmp_path / "samples" / "step_00000020.png").write_bytes(b"damaged")
    write_run(tmp_path, [90], begin=80).close()
    shown = events(tmp_path)
    assert shown["train/loss"] == [*range(10, 100, 10)] and shown["samples"] == [40, 60, 80]


def test_a_tracker_that_was_left_out_or_had_failed_gets_what_it_lacks(tmp_path, monkeypatch):
    times = iter(range(10**9, 2 * 10**9))
    monkeypatch.setattr("tensorboardX.event_file_writer.time.time", lambda: next(times))
    with monkeypatch.context() as context:

        def refuse(self, step, summaries, write=trackers.TensorBoard._write):
            if step > 60:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(self, step, summaries)

        context.setattr(trackers.TensorBoard, "_write", refuse)
        write_run(tmp_path, range(10, 90, 10)).close()
    write_run(tmp_path, range(50, 110, 10), begin=40, writers="").close()
    (first,) = tmp_path.glob("events*")
    first.write_bytes(first.read_bytes()[:-3])  # as a kill leaves it
    write_run(tmp_path, [110], begin=100).close()
    write_run(tmp_path, [120], begin=110).close()
    shown = events(tmp_path)
    assert shown["train/loss"] == [*range(10, 130, 10)] and shown["samples"] == [20, 40, 60, 80, 100, 120]
    for path in tmp_path.glob("events*"):
        path.write_bytes(os.urandom(3) + path.read_bytes())
    write_run(tmp_path, [130], begin=120).close()
    assert events_of(max(tmp_path.glob("events*")))["train/loss"] == [*range(10, 140, 10)]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"id": 7}', '{"id": "../../x", "writers": []}', "[" * 100_000])
def test_a_damaged_name_of_the_run_is_another_run(tmp_path, content):
    (tmp_path / TRACKERS_FILE).write_text(content)
    for _ in range(2):
        write_run(tmp_path, [10]).close()
        kept = json.loads((tmp_path / TRACKERS_FILE).read_text())
        assert re.fullmatch("[0-9a-f]{12}", kept["id"])
    write_run(tmp_path, [10]).close()
    assert json.loads((tmp_path / TRACKERS_FILE).read_text())["id"] == kept["id"]


def wandb_rows(workdir):
    """The history of a workdir's only offline run, by step; a file of it is a log of LevelDB's after seven bytes."""
    from wandb.proto import wandb_internal_pb2

    (path,) = (workdir / "wandb").glob("offline-run-*/*.wandb")
    content, at, part, rows = path.read_bytes(), 7, b"", {}
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        part += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last of several
            items = wandb_internal_pb2.Record.FromString(part).history.item
            row = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in items}
            if row:
                assert row["_step"] not in rows
                rows[row["_step"]] = {name: value for name, value in row.items() if not name.startswith("_")}
            part = b""
    return rows


def mlflow_run():
    """The only run of the store: itself, its figures by (tag, step), and the steps of its images."""
    import mlflow

    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("terdit_jax").experiment_id])
    history = [
        ((tag, metric.step), metric.value)
        for tag in run.data.metrics
        for metric in client.get_metric_history(run.info.run_id, tag)
    ]
    assert len(dict(history)) == len(history), "nothing is there twice"
    paths = [file.path for file in client.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    images = [int(re.search(r"[+%]step[+%](\d+)[+%]", path)[1]) for path in paths]
    return run, dict(history), images


@pytest.mark.slow
def test_wandb_and_mlflow_hold_a_run_once_over_a_kill_and_a_resume(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    environment = {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": (tmp_path / "store").as_uri()}
    environment |= {"MLFLOW_ALLOW_FILE_STORE": "true"}  # the default store keeps images where the command runs
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    data, run = prepare_digits(tmp_path / "digits"), tmp_path / "run"
    fields = {"log__writers": "tensorboard,wandb,mlflow", "log__samples_every": 20, "train__num_steps": 200}
    fields |= {"checkpoint__every": 40}
    arguments = train_arguments(data, run, **fields)
    process = start("main", *arguments, cache=programs(), environment=environment)
    while not signed_steps(run) or logged_steps(run)[-1:] < [signed_steps(run)[-1] + 12]:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    lost = logged_steps(run)[-1]
    out, err = execute("main", *arguments, environment=environment)
    begin = int(re.search(r"resuming at step (\d+)", out)[1])
    assert 0 < begin < lost and "log.writers" not in err
    want, grids = expected(run), {int(path.stem[5:]) for path in (run / "samples").iterdir()}
    rows = wandb_rows(run)
    assert {step for step, row in rows.items() if "samples" in row} == grids
    assert {(tag, step): value for step, row in rows.items() for tag, value in row.items() if tag != "samples"} == want
    kept, figures, images = mlflow_run()
    assert figures == want and sorted(images) == sorted(grids) and kept.info.status == "FINISHED"
    assert kept.data.params["train.num_steps"] == "200"
    shown = events(run)
    assert {(tag, step) for tag, steps in shown.items() for step in steps} >= want.keys()
    assert all(len(set(steps)) == len(steps) for tag, steps in shown.items() if tag != "config/text_summary")


@pytest.mark.slow
def test_wandb_online_goes_on_after_the_last_step_that_it_has(tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")
    logged, given = {}, {}

    class Run:
        step, dir, url = 61, str(tmp_path / "wandb" / "run-x" / "files"), "https://host/run"

        def log(self, row, step):
            assert step not in logged
            logged[step] = row

        def finish(self):
            given["finished"] = True

    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.teardown()
    monkeypatch.setattr(wandb, "login", lambda prompt: True)
    monkeypatch.setattr(wandb, "init", lambda **options: given.update(options) or Run())
    write_run(tmp_path, range(10, 90, 10), writers="").close()
    write_run(tmp_path, range(50, 110, 10), begin=40, writers="wandb").close()
    assert given["resume"] == "allow" and given["finished"] and [*logged] == [70, 80, 90, 100]
    assert set(logged[80]) == {"train/loss", "train/grad_norm", "heldout/loss", "heldout/loss_ema", "samples",
                               "time/images_per_second"}  # fmt: skip
    said = capsys.readouterr().out
    assert "has steps up to 60 and takes none back: those after 40 stay" in said and "https://host/run" in said
