"""The command: samples and a reference in, the suite's figures out; what cannot be judged ends in one line."""

import json
import re

import numpy as np
from PIL import Image
import pytest

from terdit_jax.data.reader import open_dataset
from terdit_jax.errors import UserError
from terdit_jax.evaluation.image_source import open_images
from tests.commands import no_flags
from tests.inception_files import random_state_dict
from tests.runs import execute, prepare_digits, train_arguments
from tests.torch_files import save_state_dict

OPTIMISED = {"XLA_FLAGS": ""}  # which `runs.start` is not, and such a network's convolutions then take minutes


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with 12 samples as samples.npz, and 9 others as reference/."""
    folder, rng = tmp_path_factory.mktemp("evaluate"), np.random.default_rng(0)
    np.savez(folder / "samples.npz", arr_0=rng.integers(0, 200, (12, 8, 8, 3), np.uint8))
    np.savez(folder / "floats.npz", arr_0=rng.uniform(-1, 1, (12, 8, 8, 3)))
    (folder / "reference").mkdir()
    for i in range(9):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / "reference" / f"{i}.png")
    return folder


SUITE = ["--samples={}/samples.npz", "--reference={}/reference"]
BAD_INPUT = {
    "--workdir is missing": [],
    "--reference is missing": SUITE[:1],
    "holds no checkpoint of a run": ["--workdir={}/reference", SUITE[0], "--output={}/a.json"],
    "--output=metrics.json": SUITE,
    "exists already": [*SUITE, "--output={}/samples.npz"],
    "expected uint8": ["--samples={}/floats.npz", *SUITE[1:], "--output={}/a.json"],
    "cannot read Inception weights": [*SUITE, "--output={}/a.json", "--inception={}/none.pth"],
}


@pytest.mark.parametrize("message", BAD_INPUT)
def test_bad_input_is_one_line(places, message):
    _, err = execute("evaluate", *(flag.format(places) for flag in BAD_INPUT[message]), status=2)
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not (places / "a.json").exists()


GOOD_LABELS = np.arange(10)
BAD_SAMPLES = {
    "label 10 is out of range: the data set has classes 0 to 9": {"labels": np.arange(5, 15)},
    "label -1 is out of range": {"labels": GOOD_LABELS - 1},
    "labels are <U1, the first 0": {"labels": np.array([str(k) for k in range(10)])},
    "labels are float64, the first 0.0": {"labels": GOOD_LABELS.astype(float)},
    "labels are float32, the first nan": {"labels": np.full(10, np.nan, np.float32)},
    "labels are bool": {"labels": GOOD_LABELS > 4},
    "10 samples with labels of shape (9,)": {"labels": np.arange(9)},
    "10 samples with labels of shape (1, 10)": {"labels": GOOD_LABELS[None]},
    "0 samples are too few": {"arr_0": np.zeros((0, 8, 8, 1), np.uint8), "labels": np.zeros(0, int)},
    "not an npz with arr_0 and labels (KeyError": {},
    "not an npz with arr_0 and labels (ValueError": {"labels": np.array([None] * 10)},
    "samples are (8, 9, 1), the data set's images (8, 8, 1)": {
        "arr_0": np.zeros((10, 8, 9, 1), np.uint8),
        "labels": GOOD_LABELS,
    },
    "arr_0 is float32": {"arr_0": np.zeros((10, 8, 8, 1), np.float32), "labels": GOOD_LABELS},
}


def test_samples_are_checked_before_anything_is_trained(tmp_path):
    """They are read as for `--workdir --samples`: of grey digits, in three channels or in one."""
    with no_flags():
        from terdit_jax.evaluate import _load_samples
    dataset = open_dataset(prepare_digits(tmp_path / "digits"))
    path, images = tmp_path / "a.npz", np.random.default_rng(0).integers(256, size=(10, 8, 8, 1), dtype=np.uint8)
    for message, arrays in BAD_SAMPLES.items():
        np.savez(path, **{"arr_0": images} | arrays)
        with pytest.raises(UserError, match=re.escape(f"--samples={path}: {message}")):
            _load_samples(str(path), dataset)
    with pytest.raises(UserError, match="not an npz with arr_0 and labels .IsADirectoryError"):
        _load_samples(str(tmp_path), dataset)
    for arr_0 in (images, images.repeat(3, axis=-1), np.asfortranarray(images)):
        for dtype in (np.int64, np.uint8, ">i4"):
            np.savez(path, arr_0=arr_0, labels=GOOD_LABELS.astype(dtype))
            samples = _load_samples(str(path), dataset)
            np.testing.assert_array_equal(samples.images, images.astype(np.float32) / 127.5 - 1)
            np.testing.assert_array_equal(samples.labels, GOOD_LABELS)


def evaluate(*flags):
    out, _ = execute("evaluate", *flags, environment=OPTIMISED)
    return out


@pytest.mark.slow
def test_the_suite_from_files_to_figures(places):
    """With random weights; against a folder, and again against the reference file that was made of it."""
    folder = places
    arrays = random_state_dict()
    save_state_dict(arrays, folder / "inception.pth")
    flags = (f"--inception={folder}/inception.pth", f"--samples={folder}/samples.npz", "--batch_size=3")
    saved = f"--save_reference={folder}/saved.npz"
    out = evaluate(*flags, f"--reference={folder}/reference", f"--output={folder}/a.json", saved)
    assert "published ones are of 50,000" in out and "reference of 9 images written" in out
    evaluate(*flags, f"--reference={folder}/saved.npz", f"--output={folder}/b.json")
    figures, again = (json.loads((folder / f"{name}.json").read_text()) for name in "ab")
    names = ("fid", "sfid", "inception_score", "precision", "recall")
    assert [figures[name] for name in names] == pytest.approx([again[name] for name in names], rel=1e-6)
    assert figures["fid"] > 0 and figures["inception_score"] >= 1
    assert (figures["num_samples"], figures["num_reference_pictures"]) == (12, 9)
    assert len(figures["network"]["sha256"]) == 64
    assert open_images(folder / "saved.npz").count == 9


@pytest.mark.slow
def test_a_run_draws_the_samples_that_are_judged(places, tmp_path):
    folder = places
    data, workdir = prepare_digits(tmp_path / "digits"), tmp_path / "run"
    execute("main", *train_arguments(data, workdir, train__num_steps=6))
    arrays = random_state_dict()
    save_state_dict(arrays, tmp_path / "inception.pth")
    flags = (f"--samples={workdir}", "--num_samples=9", f"--inception={tmp_path}/inception.pth")
    evaluate(*flags, f"--reference={folder}/reference", f"--output={tmp_path}/a.json")
    assert json.loads((tmp_path / "a.json").read_text())["num_samples"] == 9
