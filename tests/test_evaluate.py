"""The command: samples and a reference in, the suite's figures out; what cannot be judged ends in one line."""

import json
import os
import subprocess
import sys

from inception_files import random_state_dict
import numpy as np
from PIL import Image
import pytest
from runs import ROOT, finish, prepare_digits, start, train_arguments
from torch_files import state_dict, torch_file

from terdit_jax.evaluation.picture_source import open_pictures

OPTIMISED = {"XLA_FLAGS": ""}  # which `runs.start` is not, and such a network's convolutions then take minutes


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(folder with 12 samples as samples.npz, 9 others as reference/, a cache of compiled programs)."""
    folder, rng = tmp_path_factory.mktemp("evaluate"), np.random.default_rng(0)
    np.savez(folder / "samples.npz", arr_0=rng.integers(0, 200, (12, 8, 8, 3), np.uint8))
    np.savez(folder / "floats.npz", arr_0=rng.uniform(-1, 1, (12, 8, 8, 3)))
    (folder / "reference").mkdir()
    for i in range(9):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / "reference" / f"{i}.png")
    return folder, tmp_path_factory.mktemp("cache")


SUITE = ["--samples={}/samples.npz", "--reference={}/reference"]
BAD_INPUT = {
    "--workdir is missing": [],
    "--reference is missing": SUITE[:1],
    "--output=metrics.json": SUITE,
    "exists already": [*SUITE, "--output={}/samples.npz"],
    "expected uint8": ["--samples={}/floats.npz", *SUITE[1:], "--output={}/a.json"],
    "--save_reference holds Inception's": [*SUITE[1:], "--save_reference={}/a.json", "--features=efficientnet_lite0"],
    "cannot read Inception weights": [*SUITE, "--output={}/a.json", "--inception={}/none.pth"],
}
ONE_AFTER_ANOTHER = """
import json, sys
from absl import flags
from terdit_jax import evaluate
from terdit_jax.errors import UserError
for arguments in json.loads(sys.argv[1]):
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    flags.FLAGS(["evaluate", *arguments])
    try:
        evaluate.main([])
        print("accepted")
    except UserError as error:
        print(error)
"""


def test_bad_input_is_one_line(places):
    folder, _ = places
    cases = [[flag.format(folder) for flag in flags] for flags in BAD_INPUT.values()]
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps(cases)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(BAD_INPUT), done.stdout
    for line, message in zip(lines, BAD_INPUT, strict=True):
        assert message in line
    assert not (folder / "a.json").exists()


def test_bad_input_ends_with_status_2(places):
    folder, cache = places
    _, err = finish(start("evaluate", f"--samples={folder}/samples.npz", cache=cache), status=2)
    assert "error: --reference is missing" in err and "Traceback" not in err


def evaluate(cache, *flags):
    out, _ = finish(start("evaluate", *flags, cache=cache, environment=OPTIMISED))
    return out


@pytest.mark.slow
def test_the_suite_from_files_to_figures(places):
    """With random weights; against a folder, and again against the reference file that was made of it."""
    folder, cache = places
    arrays = random_state_dict()
    (folder / "inception.pth").write_bytes(torch_file(state_dict(arrays), arrays.values()))
    flags = (f"--inception={folder}/inception.pth", f"--samples={folder}/samples.npz", "--batch_size=3")
    saved = f"--save_reference={folder}/saved.npz"
    out = evaluate(cache, *flags, f"--reference={folder}/reference", f"--output={folder}/a.json", saved)
    assert "published ones are of 50,000" in out and "reference of 9 pictures written" in out
    evaluate(cache, *flags, f"--reference={folder}/saved.npz", f"--output={folder}/b.json")
    figures, again = (json.loads((folder / f"{name}.json").read_text()) for name in "ab")
    names = ("fid", "sfid", "inception_score", "precision", "recall")
    assert [figures[name] for name in names] == pytest.approx([again[name] for name in names], rel=1e-6)
    assert figures["fid"] > 0 and figures["inception_score"] >= 1
    assert (figures["num_samples"], figures["num_reference_pictures"]) == (12, 9)
    assert len(figures["network"]["sha256"]) == 64
    assert open_pictures(folder / "saved.npz").count == 9


@pytest.mark.slow
def test_a_run_draws_the_samples_that_are_judged(places, tmp_path):
    folder, cache = places
    data, workdir = prepare_digits(tmp_path / "digits"), tmp_path / "run"
    finish(start("main", *train_arguments(data, workdir, train__num_steps=6), cache=cache))
    arrays = random_state_dict()
    (tmp_path / "inception.pth").write_bytes(torch_file(state_dict(arrays), arrays.values()))
    flags = (f"--samples={workdir}", "--num_samples=9", f"--inception={tmp_path}/inception.pth")
    evaluate(cache, *flags, f"--reference={folder}/reference", f"--output={tmp_path}/a.json")
    assert json.loads((tmp_path / "a.json").read_text())["num_samples"] == 9
