import collections
import os

import numpy as np
from PIL import Image
import pytest

from terdit_jax.data import sources
from terdit_jax.data.image_file import ImageError
from terdit_jax.data.sources import make_folder_source
from terdit_jax.errors import UserError
from tests.image_files import all_items, assert_threads_load_what_one_does, encode, random_pixels


def write_image(path, size=(12, 10), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random_pixels(*size, seed)
    path.write_bytes(encode(pixels))
    return pixels


def write_classes(root, counts):
    for name, count in counts.items():
        for index in range(count):
            write_image(root / name / f"{index:03d}.png", seed=index)


def names(items):
    return [item.source_id for item in items]


def test_digits_are_exact_and_split_by_class():
    from sklearn.datasets import load_digits

    digits = load_digits()
    source = sources.make_digits_source()
    train, heldout = source.splits["train"], source.splits["heldout"]
    assert sorted(names(train + heldout)) == [f"digits-{index:04d}" for index in range(1797)]
    assert len(heldout) == 359  # 0.2 of 1797
    for label, count in collections.Counter(digits.target.tolist()).items():
        assert abs(sum(item.label == label for item in heldout) - 0.2 * count) <= 1
    for item in train[:50]:
        index = int(item.source_id[-4:])
        image, label = source.load(item)
        assert image.shape == source.shape == (8, 8, 1) and image.dtype == np.float32
        assert label == item.label == digits.target[index]
        stored = image.astype(np.float16).astype(np.float64)
        np.testing.assert_array_equal((stored[..., 0] + 1) * 8, digits.images[index])


def test_every_stretch_of_a_split_samples_all_classes():
    train = sources.make_digits_source().splits["train"]
    counts = collections.Counter(item.label for item in train[:200])
    assert len(counts) == 10 and min(counts.values()) >= 8


def test_split_depends_on_names_alone():
    items = [sources.Item(f"{label}/{index}", label) for label in range(7) for index in range(10)]
    train, heldout = sources.split_heldout(items, 0.1)
    assert collections.Counter(item.label for item in heldout) == dict.fromkeys(range(7), 1)
    assert sorted(train + heldout) == sorted(items)
    again = sources.split_heldout(items[::-1], 0.1)
    assert (train, heldout) == again


def test_images_without_labels_are_split_by_their_hashes():
    items = [sources.Item(f"train/{index}", sources.UNLABELLED) for index in range(40)]
    train, heldout = sources.split_heldout(items, 0.25)
    assert len(heldout) == 10 and sorted(train + heldout) == sorted(items)
    assert (train, heldout) == sources.split_heldout(items[::-1], 0.25)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan"), 0.05])
def test_split_refuses_useless_shares(share):
    with pytest.raises(UserError, match="heldout_share"):
        sources.split_heldout([sources.Item(str(index), 0) for index in range(10)], share)


def test_folder_lists_sorted_classes_and_follows_its_content(tmp_path):
    write_classes(tmp_path, {"b": 10, "a": 10, "c c": 10})
    (tmp_path / "README").write_text("not a class")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "a" / ".DS_Store").write_text("not an image")
    source = make_folder_source(tmp_path, image_size=8)
    assert source.class_names == ("a", "b", "c c")
    assert len(source.splits["train"]) == 27 and len(source.splits["heldout"]) == 3
    for items in source.splits.values():
        assert all(source.class_names[item.label] == item.source_id.split("/")[0] for item in items)
    assert make_folder_source(tmp_path, image_size=8).description == source.description
    for other in ({"image_size": 9}, {"channels": 1}, {"heldout_share": 0.2}):
        assert make_folder_source(tmp_path, **{"image_size": 8} | other).description != source.description
    write_image(tmp_path / "a" / "new.png")
    assert make_folder_source(tmp_path, image_size=8).description != source.description


@pytest.mark.parametrize("held", ["val", "test"])
def test_folder_keeps_its_own_split(tmp_path, held):
    write_classes(tmp_path / "train", {"a": 3, "b": 2})
    write_classes(tmp_path / held, {"b": 2, "a": 1})
    source = make_folder_source(tmp_path, image_size=8)
    assert source.class_names == ("a", "b")
    train = [f"train/{name}.png" for name in ("a/000", "a/001", "a/002", "b/000", "b/001")]
    assert sorted(names(source.splits["train"])) == train
    heldout = [(f"{held}/{name}.png", label) for name, label in (("a/000", 0), ("b/000", 1), ("b/001", 1))]
    assert sorted(source.splits["heldout"]) == heldout
    for item in all_items(source):
        image, label = source.load(item)
        assert image.shape == (8, 8, 3) and image.dtype == np.uint8 and label == item.label
    with pytest.raises(UserError, match="its own held-out images"):
        make_folder_source(tmp_path, heldout_share=0.5)
    write_classes(tmp_path / held, {"z": 1})
    with pytest.raises(UserError, match="z is a class that"):
        make_folder_source(tmp_path)


def test_classes_may_be_called_train_and_test(tmp_path):
    write_classes(tmp_path, {"train": 6, "test": 6})
    assert make_folder_source(tmp_path).class_names == ("test", "train")


def test_folder_refuses_what_it_cannot_use(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        make_folder_source(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no class folders"):
        make_folder_source(tmp_path)
    write_image(tmp_path / "stray.png")
    with pytest.raises(UserError, match="no class folders"):
        make_folder_source(tmp_path)
    write_classes(tmp_path, {"a": 5})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no images"):
        make_folder_source(tmp_path)
    with pytest.raises(UserError, match="image_size=0"):
        make_folder_source(tmp_path, image_size=0)
    with pytest.raises(UserError, match="channels=4"):
        make_folder_source(tmp_path, channels=4)


def test_what_lies_among_the_images_is_named_and_never_a_class(tmp_path):
    write_classes(tmp_path, {"a": 10, "b": 10})
    for name in ("README", "n03.png", ".cache", "a/.draft.png", "b/000.png~"):
        (tmp_path / name).write_text("?")
    for name in ("a/.DS_Store", "a/._000.png", "a/Thumbs.db", ".DS_Store", "desktop.ini"):  # nobody's
        (tmp_path / name).write_text("?")
    write_image(tmp_path / "__MACOSX" / "a" / "._000.png")
    source = make_folder_source(tmp_path, image_size=8)
    assert source.class_names == ("a", "b") and sum(map(len, source.splits.values())) == 20
    beside = "beside the class folders"
    hidden = dict.fromkeys((".cache", "a/.draft.png", "b/000.png~"), "hidden")
    assert source.ignored == {"README": beside, "n03.png": beside, **hidden}
    os.mkfifo(tmp_path / "a" / "pipe.png")
    assert make_folder_source(tmp_path, image_size=8).ignored["a/pipe.png"] == "no regular file"


def test_what_lies_beside_the_splits_is_named(tmp_path):
    for split in ("train", "val", "test"):
        write_classes(tmp_path / split, {"a": 2})
    for name in ("labels.csv", "train/extra.png", "val/notes"):
        (tmp_path / name).write_text("?")
    source = make_folder_source(tmp_path, image_size=8)
    assert set(source.ignored) == {"test", "labels.csv", "train/extra.png", "val/notes"}
    assert {item.source_id.split("/")[0] for item in source.splits["heldout"]} == {"val"}


@pytest.mark.parametrize("inner", ["a/more", "a/000.png.d", "train/cat", "valid/cat"])
def test_a_folder_within_a_class_folder_is_refused(tmp_path, inner):
    write_classes(tmp_path, {"a": 5, "b": 5})
    write_image(tmp_path / inner / "x.png")
    with pytest.raises(UserError, match=f"{inner} is a folder within a class folder: .*val/ or test/"):
        make_folder_source(tmp_path)


def test_links_to_nothing_are_images_that_cannot_be_read_and_no_classes(tmp_path):
    write_classes(tmp_path, {"a": 10})
    (tmp_path / "a" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "a" / "loop.png").symlink_to("loop.png")
    source = make_folder_source(tmp_path, image_size=8)
    items = {item.source_id: item for item in all_items(source)}
    assert len(items) == 12 and not source.ignored
    for name, reason in (("lost", "No such file"), ("loop", "Too many levels")):
        with pytest.raises(ImageError, match=f"cannot be read: {reason}"):
            source.load(items[f"a/{name}.png"])
    (tmp_path / "n02").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="n02 is a link to nothing, perhaps to a class"):
        make_folder_source(tmp_path)


def test_linked_classes_and_images_count(tmp_path):
    write_classes(tmp_path / "real", {"a": 10})
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "cat").symlink_to(tmp_path / "real" / "a")
    write_classes(tmp_path / "in", {"dog": 9})
    (tmp_path / "in" / "dog" / "last.png").symlink_to(tmp_path / "real" / "a" / "000.png")
    source = make_folder_source(tmp_path / "in", image_size=8)
    assert source.class_names == ("cat", "dog") and sum(map(len, source.splits.values())) == 20


def test_file_names_must_be_utf8(tmp_path):
    write_classes(tmp_path, {"a": 20})
    (tmp_path / "a" / b"\xff.png".decode(errors="surrogateescape")).write_bytes(b"")
    with pytest.raises(UserError, match="must be UTF-8"):
        make_folder_source(tmp_path)


def test_pixels_arrive_as_they_were_stored(tmp_path):
    pixels = {f"{index}.png": write_image(tmp_path / "a" / f"{index}.png", (16, 16), index) for index in range(10)}
    grey = make_folder_source(tmp_path, image_size=16, channels=1)
    for item in grey.splits["train"]:
        image, label = grey.load(item)
        expected = Image.fromarray(pixels[item.source_id.removeprefix("a/")]).convert("L")
        np.testing.assert_array_equal(image, np.asarray(expected)[..., None])
        assert label == 0 and image.dtype == np.uint8
    colour = make_folder_source(tmp_path, image_size=16)
    assert_threads_load_what_one_does(colour)
    for item in colour.splits["train"]:
        np.testing.assert_array_equal(colour.load(item)[0], pixels[item.source_id.removeprefix("a/")])


def test_content_and_not_the_suffix_decides(tmp_path):
    for name in ("a.JPEG", "b.jpg", "c.txt", "d", "e.gif", "f.Png"):
        pixels = write_image(tmp_path / "a" / name, (8, 8))
    source = make_folder_source(tmp_path, image_size=8, heldout_share=0.5)
    assert len(all_items(source)) == 6
    for item in all_items(source):
        np.testing.assert_array_equal(source.load(item)[0], pixels)
