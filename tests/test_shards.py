"""Shards on disk: whole or not there, checked before they are used, and put together to the same bytes."""

import json

import numpy as np
from PIL import Image
import pytest

from terdit_jax.errors import UserError
from terdit_jax.inference.shards import Shards

PLAN = {"num_samples": 10, "shard_size": 4, "seed": 0, "sample": {"num_steps": 5}}
PICTURES = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(10) % 3


def write(shards, numbers=(0, 1, 2)):
    for number in numbers:
        rows = slice(4 * number, 4 * number + shards.sizes[number])
        shards.write(number, PICTURES[rows], LABELS[rows])


def finished(path, order=(0, 1, 2)):
    shards = Shards(path, PLAN)
    write(shards, order)
    assert shards.finish() == []
    return path


def test_an_npz_is_what_evaluators_read_and_the_same_bytes_whatever_the_order(tmp_path):
    a, b = finished(tmp_path / "a.npz"), finished(tmp_path / "b.npz", (2, 0, 1))
    assert a.read_bytes() == b.read_bytes()
    with np.load(a) as arrays:
        assert set(arrays) == {"arr_0", "labels"}
        assert arrays["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(arrays["arr_0"], PICTURES)
        np.testing.assert_array_equal(arrays["labels"], LABELS)
    assert json.loads((tmp_path / "a.npz.json").read_text()) == PLAN
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.npz.json", "b.npz", "b.npz.json"]
    assert Shards(a, PLAN).is_complete()


def test_a_folder_of_pngs(tmp_path):
    folder = finished(tmp_path / "pictures")
    names = [f"{i:06}.png" for i in range(10)]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "labels.json", "settings.json"]
    for name, picture in zip(names, PICTURES, strict=True):
        with Image.open(folder / name) as opened:
            np.testing.assert_array_equal(np.asarray(opened), picture)
    assert json.loads((folder / "labels.json").read_text()) == LABELS.tolist()
    assert Shards(folder, PLAN).is_complete() and not (tmp_path / "pictures.unfinished").exists()


def test_grey_pictures_get_three_channels(tmp_path):
    shards = Shards(tmp_path / "a.npz", {**PLAN, "num_samples": 4})
    shards.write(0, PICTURES[:4, :, :, :1], LABELS[:4])
    shards.finish()
    with np.load(tmp_path / "a.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], PICTURES[:4, :, :, :1].repeat(3, -1))


def test_missing_cut_and_flipped_shards_are_drawn_again(tmp_path, caplog):
    shards = Shards(tmp_path / "a.npz", PLAN)
    assert not shards.is_written(0) and shards.read(0) is None
    write(shards)
    cut, flipped = (tmp_path / "a.npz.unfinished" / f"shard-{number:05}-of-00003.npz" for number in (0, 1))
    cut.write_bytes(cut.read_bytes()[:100])
    content = bytearray(flipped.read_bytes())
    content[400] ^= 1
    flipped.write_bytes(content)
    again = Shards(tmp_path / "a.npz", PLAN)
    assert [again.read(number) is None for number in range(3)] == [True, True, False]
    assert "shard-00000-of-00003.npz IS DAMAGED" in caplog.text
    assert again.finish() == [0, 1] and not (tmp_path / "a.npz").exists()
    write(again, (0, 1))
    assert again.finish() == []
    assert (tmp_path / "a.npz").read_bytes() == finished(tmp_path / "b.npz").read_bytes()


def test_every_flipped_bit_of_a_shard_is_seen_or_harmless(tmp_path):
    shards = Shards(tmp_path / "a.npz", {**PLAN, "num_samples": 1})
    shards.write(0, PICTURES[:1], LABELS[:1])
    (path,) = (tmp_path / "a.npz.unfinished").glob("shard*")
    sound, rng = path.read_bytes(), np.random.default_rng(1)
    seen = 0
    for bit in rng.integers(0, 8 * len(sound), 200):
        content = bytearray(sound)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        if (read := shards.read(0)) is None:
            seen += 1
        else:
            np.testing.assert_array_equal(read[0], PICTURES[:1])
            np.testing.assert_array_equal(read[1], LABELS[:1])
    assert seen > 100


def test_settings_are_not_mixed(tmp_path):
    shards = Shards(tmp_path / "a.npz", PLAN)
    write(shards, (0,))
    other = {**PLAN, "sample": {"num_steps": 6}}
    with pytest.raises(UserError, match=r"a.npz: its sample.num_steps is 5 and not 6, and it is unfinished: finish it"):
        Shards(tmp_path / "a.npz", other)
    write(shards, (1, 2))
    shards.finish()
    before = (tmp_path / "a.npz").read_bytes()
    with pytest.raises(UserError, match=r"a.npz: its sample.num_steps is 5 and not 6, and it holds other images"):
        Shards(tmp_path / "a.npz", other)
    assert (tmp_path / "a.npz").read_bytes() == before


def test_a_shard_of_another_plan_that_found_its_way_in_is_not_used(tmp_path):
    for name, plan in (("a", PLAN), ("b", {**PLAN, "seed": 1})):
        write(Shards(tmp_path / f"{name}.npz", plan))
    (tmp_path / "b.npz.unfinished" / "shard-00001-of-00003.npz").replace(
        tmp_path / "a.npz.unfinished" / "shard-00001-of-00003.npz"
    )
    shards = Shards(tmp_path / "a.npz", PLAN)
    assert [shards.read(number) is None for number in range(3)] == [False, True, False]


def test_what_somebody_else_has_put_there_is_left_alone(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"precious")
    with pytest.raises(UserError, match="exists and no a.npz.json tells its settings") as caught:
        Shards(tmp_path / "a.npz", PLAN)
    assert "\n" not in str(caught.value)
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError, match="pictures: exists and no settings.json"):
        Shards(tmp_path / "pictures", PLAN)
    assert (tmp_path / "a.npz").read_bytes() == b"precious"


def test_a_kill_behind_the_last_rename_leaves_a_complete_output(tmp_path):
    path = finished(tmp_path / "a.npz")
    leftover = tmp_path / "a.npz.unfinished"
    leftover.mkdir()
    (leftover / "shard-00000-of-00003.npz").write_bytes(b"")
    assert Shards(path, PLAN).is_complete() and not leftover.exists()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write") as caught:
        Shards(tmp_path / "file" / "a.npz", PLAN)
    assert "\n" not in str(caught.value)
