"""Processes joined by jax.distributed on loopback prepare, train, save, resume and sample what one process does.

With them the sums of floats are taken in another order, so training is equal within rounding; the data's order is not
a matter of rounding: one record in another place would move every logged loss by more.
"""

from pathlib import Path
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.runs import (
    ROOT,
    finish,
    finish_together,
    free_port,
    metrics_without_timing,
    prepare_digits,
    saved_run,
    signed_steps,
    start_together,
)
from tests.runs import train_arguments as all_train_arguments

ENDS_WITHIN = 120  # seconds for the others when one process is killed
GRACE = 30  # seconds from SIGTERM to the end, which Kubernetes and Cloud TPU grant
STEPS = 16


def train_arguments(data: Path, workdir: Path, num_steps: int = STEPS, **overrides) -> list[str]:
    fields = {"model__depth": 1, "mesh__fsdp": 2, "train__num_steps": num_steps}  # compiled by every process: small
    fields |= {"checkpoint__every": 4, "log__heldout_every": 0}
    return all_train_arguments(data, workdir, **fields | overrides)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A data set, a cache of compiled programs, and a run of one process with four devices."""
    root = tmp_path_factory.mktemp("processes")
    data, cache, whole = prepare_digits(root / "digits"), root / "cache", root / "whole"
    finish_together(start_together("main", train_arguments(data, whole), processes=1, devices=4, cache=cache))
    return data, cache, whole


def train(places, workdir: Path, processes: int, devices: int = 2, num_steps: int = STEPS) -> str:
    """Runs to `num_steps`; what the first process said."""
    data, cache, _ = places
    arguments = train_arguments(data, workdir, num_steps)
    started = start_together("main", arguments, processes=processes, devices=devices, cache=cache)
    outputs = finish_together(started)
    assert not any("step" in out for out, _ in outputs[1:]), "only the first process speaks"
    return outputs[0][0]


def assert_same_within_rounding(workdir: Path, expected: Path) -> None:
    (state, run), (wanted, wanted_run) = saved_run(workdir), saved_run(expected)
    assert run["step"] == wanted_run["step"] == STEPS
    for name in ("params", "ema_params"):
        for ours, theirs in zip(jax.tree.leaves(state[name]), jax.tree.leaves(wanted[name]), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    lines, wanted_lines = metrics_without_timing(workdir), metrics_without_timing(expected)
    assert [line["step"] for line in lines] == [line["step"] for line in wanted_lines] == [4, 8, 12, 16]
    for line, wanted_line in zip(lines, wanted_lines, strict=True):
        np.testing.assert_allclose(line["loss"], wanted_line["loss"], rtol=1e-4)
        assert line["spiked_steps"] == wanted_line["spiked_steps"]


def killed_or_asked(places, workdir: Path, number: signal.Signals, to: int, processes: int = 2, num_steps=100_000):
    """A run that is sent a signal, to one of its processes, once it has saved; the processes and when it was sent."""
    data, cache, _ = places
    arguments = train_arguments(data, workdir, num_steps)
    started = start_together("main", arguments, processes=processes, cache=cache)
    while not signed_steps(workdir):
        assert all(process.poll() is None for process in started), started[0].communicate()
        time.sleep(0.001)
    started[to].send_signal(number)
    return started, time.monotonic()


def test_two_processes_equal_one(places, tmp_path):
    assert "4 x cpu, 2 process(es)" in train(places, tmp_path, processes=2)
    assert_same_within_rounding(tmp_path, places[2])


def test_an_error_in_one_of_several_ends_it_without_taking_leave():
    """Taking leave is a barrier, which would wait for the dead."""
    code = (
        "import atexit, jax, sys; from terdit_jax.errors import run_command\n"
        f"jax.distributed.initialize('localhost:{free_port()}', 1, 0)\n"
        "atexit.register(print, 'took leave')\n"
        "def main(argv): raise ValueError('a peer is gone')\n"
        "run_command(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "ValueError: a peer is gone" in done.stderr and "took leave" not in done.stdout


@pytest.mark.slow
def test_four_processes_then_two_then_one_then_four(places, tmp_path):
    for processes, num_steps in ((4, 4), (2, 8), (1, 12), (4, 16)):
        out = train(places, tmp_path, processes=processes, num_steps=num_steps)
        assert f"{2 * processes} x cpu, {processes} process(es)" in out
    assert "resuming at step 12" in out
    assert_same_within_rounding(tmp_path, places[2])


@pytest.mark.slow
@pytest.mark.parametrize("to", [0, 1])
def test_sigterm_to_one_saves_on_both_within_the_grace_time(places, tmp_path, to):
    started, asked = killed_or_asked(places, tmp_path, signal.SIGTERM, to)
    (out, _), _ = finish_together(started)
    assert time.monotonic() - asked < GRACE
    stopped = int(re.search(r"stopped by SIGTERM at step (\d+)", out).group(1))
    state, run = saved_run(tmp_path)
    assert run["step"] == int(state["step"]) == stopped


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "processes", "then"), [(0, 2, 4), (1, 2, 1), (2, 4, 2)])
def test_a_killed_process_ends_the_others_and_any_number_goes_on(places, tmp_path, victim, processes, then):
    started, killed = killed_or_asked(places, tmp_path, signal.SIGKILL, victim, processes, num_steps=STEPS)
    for number, process in enumerate(started):
        process.communicate(timeout=ENDS_WITHIN)
        assert process.returncode != 0 or number != victim
    assert time.monotonic() - killed < ENDS_WITHIN
    train(places, tmp_path, processes=then)
    assert_same_within_rounding(tmp_path, places[2])


@pytest.mark.slow
def test_survivors_of_a_kill_end_with_another_status_than_0(places, tmp_path):
    started, killed = killed_or_asked(places, tmp_path, signal.SIGKILL, to=1)
    for process in started:
        process.communicate(timeout=ENDS_WITHIN)
        assert process.returncode != 0
    assert time.monotonic() - killed < ENDS_WITHIN


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_prepare_and_sample_together(places, tmp_path, processes):
    _, cache, whole = places
    for count, name in ((1, "one"), (processes, "all")):
        arguments = ["--source=digits", f"--output={tmp_path / name}"]
        finish_together(start_together("prepare", arguments, processes=count, cache=cache))
        arguments = [f"--model={whole}", "--num_samples=40", "--num_steps=4", f"--output={tmp_path / name}.npz"]
        finish_together(start_together("sample", arguments, processes=count, cache=cache))
    files = {path.name for path in (tmp_path / "one").rglob("*.array_record*")}
    assert files == {path.name for path in (tmp_path / "all").rglob("*.array_record*")} and files
    for path in (tmp_path / "one").rglob("*"):
        other = tmp_path / "all" / path.relative_to(tmp_path / "one")
        assert path.is_dir() or path.read_bytes() == other.read_bytes(), path.name
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "all.npz") as together:
        assert one["arr_0"].shape == (40, 8, 8, 3) and one["arr_0"].std() > 0
        np.testing.assert_array_equal(one["labels"], together["labels"])
        assert np.abs(one["arr_0"].astype(int) - together["arr_0"]).max() <= 1


@pytest.mark.slow
def test_a_refusal_reaches_every_process(places, tmp_path):
    """The first process finds the workdir in use and ends with status 2; the others do not wait for it for ever."""
    from terdit_jax.checkpoints.lock import WorkdirLock

    data, cache, _ = places
    with WorkdirLock(tmp_path):
        started = start_together("main", train_arguments(data, tmp_path), processes=2, cache=cache)
        _, err = finish(started[0], status=2)
        assert "is in use by process" in err
        started[1].communicate(timeout=ENDS_WITHIN)
        assert started[1].returncode != 0
