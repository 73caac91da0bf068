import collections

import numpy as np
from PIL import Image
import pytest

from terdit_jax.data import sources
from terdit_jax.errors import UserError


def write_picture(path, size=(12, 10), seed=0, mode="RGB", **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path, **kwargs)
    return pixels


def write_classes(root, counts):
    for name, count in counts.items():
        for index in range(count):
            write_picture(root / name / f"{index:03d}.png", seed=index)


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
        picture = source.load(item.source_id)
        assert picture.shape == source.shape == (8, 8, 1) and picture.dtype == np.float32
        assert item.label == digits.target[index]
        stored = picture.astype(np.float16).astype(np.float64)
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


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan"), 0.05])
def test_split_refuses_useless_shares(share):
    with pytest.raises(UserError, match="heldout_share"):
        sources.split_heldout([sources.Item(str(index), 0) for index in range(10)], share)


def test_folder_lists_sorted_classes_and_follows_its_content(tmp_path):
    write_classes(tmp_path, {"b": 10, "a": 10, "c c": 10})
    (tmp_path / "README").write_text("not a class")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "a" / ".DS_Store").write_text("not a picture")
    source = sources.make_folder_source(tmp_path, image_size=8)
    assert source.class_names == ("a", "b", "c c")
    assert len(source.splits["train"]) == 27 and len(source.splits["heldout"]) == 3
    for items in source.splits.values():
        assert all(source.class_names[item.label] == item.source_id.split("/")[0] for item in items)
    assert sources.make_folder_source(tmp_path, image_size=8).description == source.description
    assert sources.make_folder_source(tmp_path, image_size=9).description != source.description
    write_picture(tmp_path / "a" / "new.png")
    assert sources.make_folder_source(tmp_path, image_size=8).description != source.description


@pytest.mark.parametrize("held", ["val", "test"])
def test_folder_keeps_its_own_split(tmp_path, held):
    write_classes(tmp_path / "train", {"a": 3, "b": 2})
    write_classes(tmp_path / held, {"b": 2, "a": 1})
    source = sources.make_folder_source(tmp_path, image_size=8)
    assert source.class_names == ("a", "b")
    train = [f"train/{name}.png" for name in ("a/000", "a/001", "a/002", "b/000", "b/001")]
    assert sorted(names(source.splits["train"])) == train
    heldout = [(f"{held}/{name}.png", label) for name, label in (("a/000", 0), ("b/000", 1), ("b/001", 1))]
    assert sorted(source.splits["heldout"]) == heldout
    assert source.load(f"{held}/a/000.png").shape == (8, 8, 3)
    with pytest.raises(UserError, match="its own held-out pictures"):
        sources.make_folder_source(tmp_path, heldout_share=0.5)
    write_classes(tmp_path / held, {"z": 1})
    with pytest.raises(UserError, match="z is a class that"):
        sources.make_folder_source(tmp_path)


def test_classes_may_be_called_train_and_test(tmp_path):
    write_classes(tmp_path, {"train": 6, "test": 6})
    assert sources.make_folder_source(tmp_path).class_names == ("test", "train")


def test_folder_refuses_what_it_cannot_use(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        sources.make_folder_source(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no class folders"):
        sources.make_folder_source(tmp_path)
    write_picture(tmp_path / "stray.png")
    with pytest.raises(UserError, match="no class folders"):
        sources.make_folder_source(tmp_path)
    write_classes(tmp_path, {"a": 5})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no pictures"):
        sources.make_folder_source(tmp_path)
    with pytest.raises(UserError, match="image_size=0"):
        sources.make_folder_source(tmp_path, image_size=0)
    with pytest.raises(UserError, match="channels=4"):
        sources.make_folder_source(tmp_path, channels=4)


def test_file_names_must_be_utf8(tmp_path):
    write_classes(tmp_path, {"a": 20})
    (tmp_path / "a" / b"\xff.png".decode(errors="surrogateescape")).write_bytes(b"")
    with pytest.raises(UserError, match="must be UTF-8"):
        sources.make_folder_source(tmp_path)


def test_pixels_survive_float16_exactly(tmp_path):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    (tmp_path / "a").mkdir()
    for index in range(10):
        Image.fromarray(pixels).save(tmp_path / "a" / f"{index}.png")
    source = sources.make_folder_source(tmp_path, image_size=16, channels=1)
    picture = source.load("a/0.png")
    assert picture.min() == -1 and picture.max() == 1 and picture.shape == (16, 16, 1)
    stored = picture.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(np.round((stored[..., 0] + 1) * 127.5).astype(np.uint8), pixels)


def bicubic_weights(size_in, size_out):
    """(size_out, size_in) weights of antialiased bicubic interpolation with a = -1/2, from its definition."""
    ratio = size_in / size_out
    support = max(ratio, 1.0)
    centres = (np.arange(size_out) + 0.5) * ratio
    x = np.abs((np.arange(size_in) + 0.5 - centres[:, None]) / support)
    weights = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    return weights / weights.sum(axis=1, keepdims=True)


def crop_in_float(pixels, size):
    """The crop of the ADM code in float64 from the definitions of its filters; pixels (H, W, C)."""
    pixels = pixels.astype(np.float64)
    while min(pixels.shape[:2]) >= 2 * size:
        height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
        assert pixels.shape[0] == 2 * height and pixels.shape[1] == 2 * width, "the oracle halves even sizes only"
        pixels = pixels.reshape(height, 2, width, 2, 3).mean(axis=(1, 3))
    scale = size / min(pixels.shape[:2])
    height, width = round(pixels.shape[0] * scale), round(pixels.shape[1] * scale)
    rows, columns = bicubic_weights(pixels.shape[0], height), bicubic_weights(pixels.shape[1], width)
    pixels = np.clip(np.einsum("hH,HWc,wW->hwc", rows, pixels, columns), 0, 255)
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("width, height, size", [(40, 56, 16), (56, 44, 8), (31, 20, 16), (9, 13, 16), (16, 16, 16)])
def test_crop_follows_the_definition(width, height, size):
    # Away from black and white: Pillow clips between its two passes, the definition does not.
    pixels = np.random.default_rng(width).integers(64, 192, size=(height, width, 3), dtype=np.uint8)
    cropped = np.asarray(sources.centre_crop(Image.fromarray(pixels), size))
    assert cropped.shape == (size, size, 3)
    # Pillow rounds after each of up to six passes, half a level at most; another filter or offset is ten levels off.
    difference = np.abs(cropped - crop_in_float(pixels, size))
    assert difference.max() < 3 and difference.mean() < 1.25


def test_crop_takes_the_centre_exactly():
    pixels = np.random.default_rng(0).integers(256, size=(10, 15, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(sources.centre_crop(Image.fromarray(pixels), 10)), pixels[:, 2:12])


def test_colour_modes_become_the_asked_channels(tmp_path):
    write_classes(tmp_path, {"a": 10})
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(tmp_path / "a" / "alpha.png")
    Image.new("P", (8, 8)).save(tmp_path / "a" / "palette.gif")
    Image.new("L", (8, 8), 255).save(tmp_path / "a" / "grey.jpg")
    Image.new("CMYK", (8, 8)).save(tmp_path / "a" / "cmyk.jpg")
    source = sources.make_folder_source(tmp_path, image_size=8)
    np.testing.assert_array_equal(source.load("a/alpha.png"), np.broadcast_to([1.0, -1, -1], (8, 8, 3)))
    np.testing.assert_array_equal(source.load("a/grey.jpg"), np.ones((8, 8, 3)))
    assert source.load("a/palette.gif").shape == source.load("a/cmyk.jpg").shape == (8, 8, 3)


def test_unusable_pictures_say_why(tmp_path):
    write_classes(tmp_path, {"a": 10})
    whole = (tmp_path / "a" / "000.png").read_bytes()
    (tmp_path / "a" / "short.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "a" / "text.png").write_text("not a picture")
    (tmp_path / "a" / "empty.png").write_bytes(b"")
    (tmp_path / "a" / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    write_picture(tmp_path / "a" / "long.png", size=(1001, 10))
    source = sources.make_folder_source(tmp_path, image_size=8)
    for name in ("short.png", "text.png", "empty.png", "script.eps"):
        with pytest.raises(sources.PictureError, match="Error"):
            source.load(f"a/{name}")
    with pytest.raises(sources.PictureError, match="1001x10 is too elongated"):
        source.load("a/long.png")
