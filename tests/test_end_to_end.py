"""A shipped configuration, shrunken, as a user runs it: train, be killed, resume, be damaged, finish, sample."""

import os
from pathlib import Path
import random
import re
import shutil
import signal
import time

import numpy as np
from PIL import Image
import pytest

from terdit_jax.inference.images import GAP, LINE
from terdit_jax.interop.weights import open_weights
from tests.faults.damages import flip
from tests.golden_models import BY_CHANNEL, DIT
from tests.runs import (
    assert_same_run,
    execute,
    finish,
    logged_steps,
    metrics_without_timing,
    prepare_digits,
    programs,
    saved_run,
    signed_steps,
    start,
    train_arguments,
)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A prepared data set and an uninterrupted run on it."""
    root = tmp_path_factory.mktemp("runs")
    data, whole = prepare_digits(root / "digits"), root / "whole"
    out, _ = execute("main", *train_arguments(data, whole))
    assert f"next: python -m terdit_jax.sample --model={whole} " in out
    return data, whole


def killed_run(places, workdir: Path, at_step: int, saves: int = 1, **overrides) -> None:
    """Starts the run and kills it with -9 once it has logged `at_step` and `saves` of its saves are on disk."""
    data, _ = places
    process = start("main", *train_arguments(data, workdir, **overrides), cache=programs())
    deadline = time.monotonic() + 240
    while len(signed_steps(workdir)) < saves or max(logged_steps(workdir), default=0) < at_step:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.communicate()


def resume(places, workdir: Path, status: int = 0, **overrides) -> tuple[str, str]:
    data, _ = places
    return execute("main", *train_arguments(data, workdir, **overrides), status=status)


def test_the_guard_skips_some_steps_and_not_all(places):
    (last,) = [line for line in metrics_without_timing(places[1]) if line["step"] == 40 and "loss" in line]
    assert 0 < last["spiked_steps"] < 20 and last["skipped_steps"] == 0
    assert int(saved_run(places[1])[0]["spikes"]["total"]) == last["spiked_steps"]


def test_killed_at_a_random_step_and_resumed_equals_uninterrupted(places, tmp_path):
    step = random.Random(os.urandom(8)).randrange(8, 33)
    killed_run(places, tmp_path, at_step=step)
    kept = (tmp_path / "metrics.jsonl").read_text()
    out, _ = resume(places, tmp_path)
    resumed_at = int(re.search(r"resuming at step (\d+)", out).group(1))
    assert 0 < resumed_at and kept, f"killed at {step}"
    assert_same_run(tmp_path, places[1])


def test_without_fast_paths_a_run_learns_the_same_and_resumes_as_exactly(places, tmp_path):
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    out, _ = resume(places, plain, compute__plan="plain")
    assert "plan: plain" in out
    ours, fast = (
        [line["loss"] for line in metrics_without_timing(folder) if "loss" in line] for folder in (plain, places[1])
    )
    np.testing.assert_allclose(ours, fast, rtol=1e-3)
    killed_run(places, killed, at_step=12, compute__plan="plain")
    resume(places, killed, compute__plan="plain")
    assert_same_run(killed, plain)


TERNARY_SIT = {"diffusion__objective": "flow", "sample__method": "heun", "sample__spacing": "auto"}
TERNARY_SIT |= {f"model__{name}": value for name, value in (DIT | BY_CHANNEL).items()}


def test_a_ternary_sit_killed_and_resumed_equals_uninterrupted_and_is_drawn_from(places, tmp_path):
    """The other family, objective and quantiser in one."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    resume(places, whole, **TERNARY_SIT)
    killed_run(places, killed, at_step=12, **TERNARY_SIT)
    resume(places, killed, **TERNARY_SIT)
    assert_same_run(killed, whole)
    (last,) = [line for line in metrics_without_timing(whole) if line["step"] == 40 and "loss" in line]
    assert not {"mse", "vb"} & last.keys() and {"loss", "loss_t1of4", "grad_norm"} <= last.keys()
    draw = ("sample", f"--model={whole}", "--labels=0,1", f"--output={tmp_path / 'flow.npz'}")
    _, err = execute(*draw, "--method=ddim", status=2)
    assert (
        err.strip()
        == "error: sample.method='ddim' samples no flow model: give euler, heun, sde, dpmpp_2m, dpmpp_2m_sde, unipc"
    )
    execute(*draw, "--method=sde")
    with np.load(tmp_path / "flow.npz") as images:
        assert images["arr_0"].shape == (2, 8, 8, 3) and images["arr_0"].std() > 0


@pytest.mark.slow
def test_a_warm_and_soft_start_killed_and_resumed_equals_uninterrupted(places, tmp_path):
    """From full precision, which is not there any more when the run goes on in the middle of its soft start."""
    full, whole, killed = tmp_path / "full", tmp_path / "whole", tmp_path / "killed"
    resume(places, full, model__ternary=False, train__num_steps=4, log__heldout_every=0)
    start = {"train__init_from": full, "train__soft_start_steps": 30}
    out, _ = resume(places, whole, **start)
    assert "step 4, averaged; begun afresh: alpha, by least squares; the gain after adaLN, by least squares\n" in out
    assert "soft start, before step 30: unrolled blocks" in out and "step 30  the soft start is over" in out
    killed_run(places, killed, at_step=12, **start)
    shutil.rmtree(full)
    out, _ = resume(places, killed, **start)
    assert "weights from" not in out
    assert_same_run(killed, whole)
    _, err = resume(places, killed, **start | {"train__soft_start_steps": 20}, status=2)
    assert "holds a run with train.soft_start_steps=30, not 20" in err
    _, err = resume(places, tmp_path / "again", **start | {"train__init_from": whole}, status=2)
    message = f"soft_start_steps=30: begins at master weights, and config.train.init_from={whole} is ternary already"
    assert message in err and len(err.splitlines()) == 1 and not (tmp_path / "again").exists()


def test_a_sampler_of_the_other_objective_is_refused_before_anything_is_written(places, tmp_path):
    for fields in ({"diffusion__objective": "flow"}, {"sample__method": "heun"}):
        _, err = execute("main", *train_arguments(places[0], tmp_path / "new", **fields), status=2)
        assert re.fullmatch("error: sample.method='(ddpm|heun)' samples no (flow|ddpm) model: give [^\n]*\n", err)
    assert not (tmp_path / "new").exists()


def test_flipped_bit_in_the_newest_checkpoint_falls_back_and_ends_the_same(places, tmp_path):
    killed_run(places, tmp_path, at_step=24, saves=2)
    steps = signed_steps(tmp_path)
    flip(tmp_path / "checkpoints" / str(steps[-1]))
    out, err = resume(places, tmp_path)
    assert f"CHECKPOINT {steps[-1]} IS DAMAGED" in err
    assert f"resuming at step {steps[-2]}" in out
    assert (tmp_path / "damaged_checkpoints" / str(steps[-1])).exists()
    assert_same_run(tmp_path, places[1])


def test_sigterm_saves_and_the_same_command_goes_on(places, tmp_path):
    data, whole = places
    process = start("main", *train_arguments(data, tmp_path), cache=programs())
    while not logged_steps(tmp_path):
        assert process.poll() is None
        time.sleep(0.002)
    for _ in range(3):  # as schedulers do
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    out, err = finish(process)
    assert "stopped by SIGTERM" in out and err.count("SIGTERM: stops after the step under way") == 1
    assert 0 < saved_run(tmp_path)[1]["step"] < 40
    resume(places, tmp_path)
    assert_same_run(tmp_path, whole)


def test_a_finished_run_says_so_and_changes_nothing(places):
    data, whole = places
    before = (whole / "metrics.jsonl").read_bytes()
    out, _ = execute("main", *train_arguments(data, whole))
    assert "is done: it has trained 40 of 40 steps" in out
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_another_rate_and_length_continue_and_another_model_is_refused(places, tmp_path):
    data, _ = places
    execute("main", *train_arguments(data, tmp_path, train__num_steps=8))
    longer = train_arguments(data, tmp_path, train__num_steps=12, optimizer__learning_rate=1e-3)
    out, _ = execute("main", *longer)
    assert "config.optimizer.learning_rate: 0.004 -> 0.001" in out and "resuming at step 8" in out
    lines = metrics_without_timing(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [4, 8, 12]
    other = train_arguments(data, tmp_path, model__hidden_size=64)
    _, err = execute("main", *other, status=2)
    assert err.strip().splitlines()[-1].startswith("error: ") and "model.hidden_size=32, not 64" in err
    assert saved_run(tmp_path)[1]["step"] == 12


def test_sample_draws_from_the_run(places, tmp_path):
    _, whole = places
    common = ("sample", f"--model={whole}", "--labels=0,1,2", "--num_samples=6", "--num_steps=5")
    execute(*common, f"--output={tmp_path / 'grid.png'}")
    rows, columns, side = 2, 3, 64 + GAP
    assert Image.open(tmp_path / "grid.png").size == (columns * side + GAP, LINE + rows * side + GAP), "named columns"
    execute(*common, f"--output={tmp_path / 'a.npz'}", "--batch_size=6")
    execute(*common, f"--output={tmp_path / 'b.npz'}", "--batch_size=4")
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert a["arr_0"].shape == (6, 8, 8, 3) and a["arr_0"].dtype == np.uint8
        assert a["labels"].tolist() == [0, 1, 2, 0, 1, 2]
        # The same pictures whatever the batch, up to float rounding at a pixel's edge.
        assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1


def test_an_exported_run_draws_the_runs_pictures(places, tmp_path):
    _, whole = places
    artifact = tmp_path / "digits.safetensors"
    out, _ = execute("export", f"--workdir={whole}", f"--output={artifact}")
    assert "step 40, averaged weights" in out and open_weights(artifact).description.class_names == tuple("0123456789")
    for model, output in ((whole, "a.npz"), (artifact, "b.npz")):
        execute("sample", f"--model={model}", "--num_samples=6", f"--output={tmp_path / output}")
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert a["arr_0"].shape == (6, 8, 8, 3) and a["arr_0"].std() > 0
        np.testing.assert_array_equal(a["arr_0"], b["arr_0"])
        np.testing.assert_array_equal(a["labels"], b["labels"])


def test_a_run_that_only_diverges_is_aborted_with_its_steps_named(places, tmp_path):
    data, _ = places
    wild = {"optimizer__learning_rate": 1e30, "train__max_nonfinite_steps": 3, "log__heldout_every": 0}
    _, err = execute("main", *train_arguments(data, tmp_path, **wild), status=2)
    assert re.search(r"error: loss or gradient has been non-finite at every step from \d+ to \d+", err)


def test_what_sample_writes_evaluate_reads(places, tmp_path):
    _, whole = places
    npz, scores = tmp_path / "samples.npz", tmp_path / "scores.json"
    execute("sample", f"--model={whole}", "--num_samples=20", f"--output={npz}")
    out, _ = execute("evaluate", f"--workdir={whole}", f"--samples={npz}", f"--output={scores}")
    assert "classifier_agreement" in out and scores.exists()
