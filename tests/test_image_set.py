"""Sets of any size: labels that depend on seed and index alone, and pictures that no kill and no device changes."""

from collections import Counter
from pathlib import Path
import random
import re
import shutil
import time

import jax
import numpy as np
import pytest

from terdit_jax.errors import UserError
from terdit_jax.inference import image_set
from terdit_jax.inference.image_set import digest, draw_set, make_labels, make_plan
from terdit_jax.inference.shards import Shards
from tests.deployed import make_workdir
from tests.runs import FAST_COMPILATION, finish, free_port, start


def test_balanced_labels_take_turns():
    assert make_labels([7, 2, 5], 7, "balanced", 0).tolist() == [7, 2, 5, 7, 2, 5, 7]


def test_random_labels_depend_on_seed_and_index_alone():
    labels = make_labels([3, 8, 9], 600, "random", 4)
    np.testing.assert_array_equal(make_labels([3, 8, 9], 1000, "random", 4)[:600], labels)
    assert np.any(make_labels([3, 8, 9], 600, "random", 5) != labels)
    counts = Counter(labels.tolist())
    assert set(counts) == {3, 8, 9}
    assert all(abs(count - 200) < 4 * np.sqrt(600 * 2 / 9) for count in counts.values())
    with pytest.raises(UserError, match="'sorted' is no order of labels"):
        make_labels([0], 3, "sorted", 0)


def test_digest_sees_every_byte_dtype_and_shape():
    tree = {"a": np.zeros((2, 3), np.float32), "b": np.uint8(1)}
    others = [
        {**tree, "a": np.zeros((3, 2), np.float32)},
        {**tree, "a": np.zeros((2, 3), np.int32)},
        {**tree, "a": np.float32([[0, 0, 0], [0, 0, 1e-30]])},
        {**tree, "b": np.uint8(2)},
    ]
    assert len({digest(other) for other in [tree, *others]}) == 5
    assert digest(jax.tree.map(jax.numpy.asarray, tree)) == digest(tree)


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def test_killed_again_and_again_the_set_is_that_of_an_undisturbed_run(tmp_path, monkeypatch):
    monkeypatch.setattr(image_set, "SHARD_SIZE", 4)
    plan = make_plan(model={}, settings={"num_images": 3, "method": "ddim"}, labels={}, num_samples=18, seed=0)
    assert plan["sample"] == {"method": "ddim"}, "the size of a grid changes no picture"
    labels, drawn, lines = make_labels(range(10), 18, "balanced", 0), [], []

    def draw(of_shard, first, report):
        drawn.append(first)
        report(len(of_shard))
        if killings and first == killings[0]:
            killings.pop(0)
            raise Killed
        pictures = np.random.default_rng(first).uniform(-1.1, 1.1, (len(of_shard), 4, 4, 1))
        return pictures + of_shard[:, None, None, None] / 100

    killings = []
    draw_set(Shards(tmp_path / "whole.npz", plan), labels, draw, lines.append)
    assert drawn == [0, 4, 8, 12, 16] and lines[-1].startswith("18/18 images")
    killings, drawn[:] = [0, 4, 8, 16, 16], []
    while True:
        try:
            draw_set(Shards(tmp_path / "killed.npz", plan), labels, draw, lines.append)
            break
        except Killed:
            pass
    assert drawn == [0, 0, 4, 4, 8, 8, 12, 16, 16, 16], "what was drawn is not drawn again"
    assert (tmp_path / "killed.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_shards_that_vanish_while_the_last_is_drawn_are_drawn_again(tmp_path, monkeypatch):
    """One process waits for no other's."""
    monkeypatch.setattr(image_set, "SHARD_SIZE", 4)
    plan = make_plan(model={}, settings={}, labels={}, num_samples=10, seed=0)
    labels, drawn = make_labels(range(10), 10, "balanced", 0), []

    def draw(of_shard, first, report):
        drawn.append(first)
        if drawn == [0, 4, 8]:
            shutil.rmtree(tmp_path / "set.npz.unfinished")
        return np.zeros((len(of_shard), 4, 4, 1))

    draw_set(Shards(tmp_path / "set.npz", plan), labels, draw, lambda line: None)
    assert drawn == [0, 4, 8, 0, 4] and np.load(tmp_path / "set.npz")["arr_0"].shape == (10, 4, 4, 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir of a small pixel model and a cache of compiled programs."""
    root = tmp_path_factory.mktemp("picture_set")
    make_workdir(root / "run", in_channels=3)
    return root / "run", root / "cache"


def sample(run, output: Path, *flags, devices=1, status=0, **environment):
    process = begin(run, output, *flags, devices=devices, **environment)
    return finish(process, status)


def begin(run, output: Path, *flags, devices=1, **environment):
    workdir, cache = run
    xla = f"{FAST_COMPILATION} --xla_force_host_platform_device_count={devices}"
    arguments = (f"--model={workdir}", f"--output={output}", *flags)
    return start("sample", *arguments, cache=cache, environment={"XLA_FLAGS": xla, **environment})


def pictures_of(path):
    with np.load(path) as arrays:
        return arrays["arr_0"].astype(int), arrays["labels"]


@pytest.mark.slow
def test_bad_input_is_one_line_and_touches_nothing(run, tmp_path):
    for flags, message in (
        (("--labels=3,10",), "label 10 is out of range: the model has classes 0 to 9"),
        (("--num_samples=0",), "--num_samples=0: 0 is not an integer in the range"),
        (("--cfg_t_min=500", "--cfg_t_max=400"), "guidance from timestep 500 to 400"),
    ):
        _, err = sample(run, tmp_path / "a.npz", *flags, status=2)
        assert err.strip().splitlines()[-1].startswith("error: ") and message in err
        assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_killed_five_times_and_resumed_equals_undisturbed(run, tmp_path):
    """The command itself, with kill -9 at random moments; more than one shard, the last one shorter."""
    flags = ("--num_samples=5000", "--method=dpmpp_2m", "--num_steps=40", "--batch_size=100", "--label_order=random")
    out, _ = sample(run, tmp_path / "whole.npz", *flags)
    assert re.search(r"1,024/5,000 images  [\d.,]+ a second  \w+ left", out)
    shards = tmp_path / "killed.npz.unfinished"
    for kill in range(5):
        process = begin(run, tmp_path / "killed.npz", *flags)
        while len(list(shards.glob("shard-*-of-00005.npz"))) < min(kill, 3):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(random.uniform(0, 1))
        process.kill()
        process.communicate()
        assert not (tmp_path / "killed.npz").exists()
    sample(run, tmp_path / "killed.npz", *flags)
    assert (tmp_path / "killed.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert not shards.exists()
    out, _ = sample(run, tmp_path / "killed.npz", *flags)
    assert "is complete: it holds the 5,000 images" in out
    _, err = sample(run, tmp_path / "killed.npz", *flags, "--seed=1", status=2)
    assert "its seed is 0 and not 1" in err


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ddpm", "unipc"])
def test_devices_batches_and_processes_change_no_picture(run, tmp_path, method):
    flags = ("--num_samples=40", f"--method={method}", "--num_steps=8")
    for devices in (1, 2, 8):
        sample(run, tmp_path / f"{devices}.npz", *flags, devices=devices)
    sample(run, tmp_path / "batch.npz", *flags, "--batch_size=7")
    expected, labels = pictures_of(tmp_path / "1.npz")
    assert expected.std() > 10
    for name in ("2", "8", "batch"):
        pictures, same = pictures_of(tmp_path / f"{name}.npz")
        np.testing.assert_array_equal(same, labels)
        assert np.abs(pictures - expected).max() <= 1, "float rounding at a pixel's edge"


@pytest.mark.slow
def test_two_processes_share_the_shards(run, tmp_path):
    flags = ("--num_samples=2500", "--method=ddim", "--num_steps=4", "--batch_size=128")
    sample(run, tmp_path / "one.npz", *flags)
    joined = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    both = [begin(run, tmp_path / "two.npz", *flags, JAX_PROCESS_ID=str(i), **joined) for i in range(2)]
    (out, _), (quiet, _) = [finish(process) for process in both]
    assert "2,500 images of" in out and "images" not in quiet
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
