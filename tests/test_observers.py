"""Heartbeat, traces and the account of time as a run leaves them."""

import json
import time

import pytest

from terdit_jax.errors import UserError
from terdit_jax.training.observers import Heartbeat, Steps, check_heartbeat, parse_steps
from tests.runs import finish, prepare_digits, start, train_arguments


def test_heartbeat_is_renewed_when_due_and_never_half_written(tmp_path, monkeypatch):
    path = tmp_path / "beat.json"
    heartbeat = Heartbeat(path)
    for moment, step, expected in ((100.0, 1, 1), (104.0, 2, 1), (105.0, 3, 3), (106.0, 4, 3)):
        monkeypatch.setattr(time, "monotonic", lambda moment=moment: moment)
        heartbeat.beat(step)
        assert json.loads(path.read_text())["step"] == expected
    heartbeat.beat(5, now=True)
    beat = json.loads(path.read_text())
    assert beat["step"] == 5 and abs(beat["time"] - time.time()) < 60
    assert [entry.name for entry in tmp_path.iterdir()] == ["beat.json"]


@pytest.mark.parametrize("there", ["notes", "", "folder", "dangling", "heartbeat", None])
def test_only_a_heartbeat_is_replaced_by_one(tmp_path, there):
    path = tmp_path / "beat.json"
    if there == "folder":
        path.mkdir()
    elif there == "dangling":
        path.symlink_to("nowhere")
    elif there == "heartbeat":
        Heartbeat(path).beat(3)
    elif there is not None:
        path.write_text(there)
    if there in ("notes", "folder", "dangling"):
        with pytest.raises(UserError, match=f"--heartbeat={path}: is "):
            check_heartbeat(path)
    else:
        check_heartbeat(path)


def test_steps_of_a_trace():
    assert parse_steps(None) is None and parse_steps("3:7") == Steps(3, 7) and parse_steps("3:3") == Steps(3, 3)


@pytest.mark.parametrize("text", ["", "3", "3:", ":3", "a:b", "0:3", "5:4", "1:2:3", "-1:2"])
def test_other_steps_are_refused(text):
    with pytest.raises(UserError, match=f"--profile={text}: give the first and the last step"):
        parse_steps(text)


def test_a_run_leaves_trace_heartbeat_cache_and_account(tmp_path):
    data, run, cache = prepare_digits(tmp_path / "digits"), tmp_path / "run", tmp_path / "programs"
    fields = {"train__num_steps": 8, "log__heldout_every": 0, "train__compilation_cache": cache}
    arguments = train_arguments(data, run, **fields)
    out, _ = finish(start("main", *arguments, "--profile=5:6", f"--heartbeat={tmp_path / 'b'}", cache=tmp_path / "no"))
    assert list(run.glob("profile/**/*.xplane.pb")) and "step 6  trace in" in out
    assert json.loads((tmp_path / "b").read_text())["step"] in range(9) and not (run / "heartbeat.json").exists()
    assert any(cache.iterdir()) and not (tmp_path / "no").exists()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timing = lines[-1]["timing"]
    assert 0 < timing["goodput"] < 1 and timing["restarts"] == 0 and timing["seconds_compile"] > 0
    account = json.loads((run / "goodput.json").read_text())
    assert account["complete"] and set(account["saved"]) == {"6", "8"}
    assert "goodput " in out and "0 restart(s)" in out
    longer = train_arguments(data, run, **fields | {"train__num_steps": 12})
    out, _ = finish(start("main", *longer, cache=tmp_path / "no"))
    again = json.loads((run / "goodput.json").read_text())
    assert again["restarts"] == 1 and "1 restart(s)" in out and (run / "heartbeat.json").exists()
    assert again["seconds"]["restore"] > 0 and again["seconds"].get("down", 0) == 0
    assert again["seconds"]["train"] > account["saved"]["8"]
