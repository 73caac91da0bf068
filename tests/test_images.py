"""Bytes of pictures: rounding and clipping, the layout of a grid, and files that are whole or not there."""

import errno
import os

import numpy as np
from PIL import Image
import pytest

from terdit_jax.errors import UserError
from terdit_jax.inference.images import GAP, LINE, make_grid, save_npz, save_png, to_uint8


def pictures(count, side=64, channels=3):
    return np.random.default_rng(0).integers(0, 255, (count, side, side, channels), dtype=np.uint8)  # never white


def test_every_byte_survives_the_way_to_floats_and_back():
    values = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(values.astype(np.float32) / 127.5 - 1), values)


def test_what_lies_outside_is_clipped_and_values_are_rounded():
    images = np.float32([-9, -1, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 1, 9])
    assert to_uint8(images).tolist() == [0, 0, 0, 1, 255, 255]
    assert to_uint8(images).dtype == np.uint8


@pytest.mark.parametrize(
    ("count", "columns", "rows_and_columns"),
    [(1, 0, (1, 1)), (4, 0, (2, 2)), (5, 0, (2, 3)), (16, 0, (4, 4)), (20, 0, (2, 10)), (6, 2, (3, 2)), (2, 5, (1, 5))],
)
def test_grid_layout(count, columns, rows_and_columns):
    images = pictures(count)
    grid = make_grid(images, columns)
    rows, columns = rows_and_columns
    assert grid.dtype == np.uint8
    assert grid.shape == (rows * (64 + GAP) + GAP, columns * (64 + GAP) + GAP, 3)
    rest = np.ones(grid.shape[:2], bool)
    for i, image in enumerate(images):
        top, left = GAP + i // columns * (64 + GAP), GAP + i % columns * (64 + GAP)
        np.testing.assert_array_equal(grid[top : top + 64, left : left + 64], image)
        rest[top : top + 64, left : left + 64] = False
    assert np.all(grid[rest] == 255), "gaps and empty cells are white"


def test_titles_stand_above_the_columns_and_change_no_image():
    images = pictures(4)
    plain, titled = make_grid(images, 2), make_grid(images, 2, ["cat", "a very long name of a class"])
    np.testing.assert_array_equal(titled[LINE:], plain)
    left, right = titled[:LINE, : 64 + GAP], titled[:LINE, 64 + 2 * GAP :]
    assert (left < 128).any() and (right < 128).any() and (titled[:LINE, -GAP:] == 255).all(), "cut to the column"


def test_titles_stand_above_each_image_where_a_column_has_several():
    images, step = pictures(5), 64 + GAP + LINE
    plain, titled = make_grid(images, 2), make_grid(images, 2, ["cat", "dog", "dog", "cat\n", "an\x1b[31m\nox"])
    assert len(titled) == len(plain) + 3 * LINE
    for row in range(3):
        above, below = titled[row * step : row * step + LINE], titled[row * step + LINE : (row + 1) * step]
        assert (above < 128).any()
        np.testing.assert_array_equal(below, plain[row * (64 + GAP) : (row + 1) * (64 + GAP)])
    np.testing.assert_array_equal(make_grid(images, 2, list("ababa")), make_grid(images, 2, list("ab")))


def test_small_pictures_are_enlarged_by_a_whole_factor_without_smoothing():
    images = pictures(1, side=24, channels=1)
    grid = make_grid(images)
    assert grid.shape == (72 + 2 * GAP, 72 + 2 * GAP, 3)
    inside = grid[GAP:-GAP, GAP:-GAP]
    for i in range(3):
        for j in range(3):
            np.testing.assert_array_equal(inside[i::3, j::3], np.repeat(images[0], 3, axis=-1))


def test_large_pictures_keep_their_size():
    assert make_grid(pictures(1, side=100)).shape == (100 + 2 * GAP, 100 + 2 * GAP, 3)


def test_png_is_lossless_and_makes_its_folder(tmp_path):
    (image,) = pictures(1, side=16)
    path = tmp_path / "new" / "grid.png"
    save_png(path, image)
    with Image.open(path) as opened:
        assert opened.format == "PNG" and opened.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(opened), image)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_is_what_evaluators_read(tmp_path, channels):
    images, labels = pictures(3, side=8, channels=channels), np.array([4, 0, 9])
    save_npz(tmp_path / "samples.npz", images, labels)
    with np.load(tmp_path / "samples.npz") as arrays:
        assert set(arrays) == {"arr_0", "labels"}
        assert arrays["arr_0"].shape == (3, 8, 8, 3) and arrays["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(arrays["arr_0"], np.broadcast_to(images, (3, 8, 8, 3)))
        np.testing.assert_array_equal(arrays["labels"], labels)


def test_a_path_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/grid\.png") as caught:
        save_png(tmp_path / "file" / "grid.png", pictures(1)[0])
    assert "\n" not in str(caught.value)


def test_a_write_that_fails_leaves_the_old_picture(tmp_path, monkeypatch):
    old, new = pictures(2, side=8)
    save_png(tmp_path / "grid.png", old)

    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="cannot write"):
        save_png(tmp_path / "grid.png", new)
    with Image.open(tmp_path / "grid.png") as opened:
        np.testing.assert_array_equal(np.asarray(opened), old)
