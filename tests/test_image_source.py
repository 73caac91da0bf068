"""Images come in order and whole from each kind of place, and what is no set of images is refused in one line."""

import numpy as np
from PIL import Image
import pytest

from terdit_jax.data.reader import open_dataset
from terdit_jax.errors import UserError
from terdit_jax.evaluation.image_source import open_images
from tests.runs import prepare_digits


def draw_images(count=11, channels=3):
    return np.random.default_rng(0).integers(0, 256, (count, 6, 5, channels), np.uint8)


def write_folder(path, images, suffix=".png"):
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:06}{suffix}")
    (path / "settings.json").write_text("{}")
    return path


def streamed(source, first, stop, size):
    return np.concatenate(list(source.stream(first, stop, size)))


SAVES = {"npz": np.savez, "compressed": np.savez_compressed}
ORDERS = {"": np.ascontiguousarray, ", column-major": np.asfortranarray}
EVERY_NPZ = [(save, order) for save in SAVES.values() for order in ORDERS.values()]
EVERY_NPZ_NAME = [save + order for save in SAVES for order in ORDERS]


@pytest.fixture(params=["folder", *EVERY_NPZ], ids=["folder", *EVERY_NPZ_NAME])
def place(request, tmp_path):
    if request.param == "folder":
        return write_folder(tmp_path / "samples", draw_images())
    save, order = request.param
    save(tmp_path / "samples.npz", labels=np.arange(11), arr_0=order(draw_images()))
    return tmp_path / "samples.npz"


@pytest.mark.parametrize("size", [1, 4, 11, 50])
def test_images_come_in_order_in_portions(place, size):
    source = open_images(place)
    assert (source.count, source.shape) == (11, (6, 5, 3))
    portions = list(source.stream(0, 11, size))
    assert [len(portion) for portion in portions] == [min(size, 11 - first) for first in range(0, 11, size)]
    np.testing.assert_array_equal(np.concatenate(portions), draw_images())
    assert all(portion.dtype == np.uint8 for portion in portions)


def test_a_part_is_read_alone(place):
    source = open_images(place)
    for first, stop in ((4, 9), (10, 11)):
        np.testing.assert_array_equal(streamed(source, first, stop, 2), draw_images()[first:stop])
    np.testing.assert_array_equal(source.take(np.array([0, 3, 10])), draw_images()[[0, 3, 10]])


@pytest.mark.parametrize("order", ORDERS.values())
def test_grey_images_get_three_channels(tmp_path, order):
    grey = draw_images(channels=1)
    np.savez(tmp_path / "a.npz", arr_0=order(grey))
    source = open_images(tmp_path / "a.npz")
    assert source.shape == (6, 5, 3)
    np.testing.assert_array_equal(streamed(source, 0, 11, 4), grey.repeat(3, axis=-1))
    source = open_images(write_folder(tmp_path / "grey", grey[..., 0]))
    np.testing.assert_array_equal(streamed(source, 0, 11, 4), grey.repeat(3, axis=-1))


@pytest.mark.parametrize(
    "names, ignored",
    [
        (["a.webp", "b.bmp", "c.PNG", "d.TIF", "e.Jpg", "f.gif", "g.ppm"], []),
        (["cat/a.png", "dog/b.webp", "dog/c.JPEG"], []),
        (["a.png", "notes.txt", "b.avif", "c"], ["notes.txt", "b.avif", "c"]),
        (["a.png", ".hidden.png", ".cache/b.png"], [".hidden.png", ".cache/b.png"]),
        (["a.png", ".DS_Store", "._a.png", "__MACOSX/._a.png", "Thumbs.db", "labels.json", "settings.json"], []),
        (["cat/a.png", "README"], ["README"]),
    ],
)
def test_every_image_of_a_folder_counts_or_is_named(tmp_path, caplog, names, ignored):
    """By any suffix, in folders or not; a file whose suffix is no image's is named on standard error."""
    litter = ("._", ".DS_Store", "__MACOSX", "Thumbs.db", "labels.json", "settings.json")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(draw_images()[0]).save(tmp_path / name, "PNG")
    source = open_images(tmp_path)
    assert source.count == sum(name not in ignored and not name.startswith(litter) for name in names)
    assert streamed(source, 0, source.count, 2).shape == (source.count, 6, 5, 3)
    said = [record.getMessage() for record in caplog.records if "IGNORED" in record.getMessage()]
    assert len(said) == bool(ignored)
    for name in ignored:
        assert name in said[0]


def test_a_long_list_of_what_is_ignored_is_one_line_with_a_count(tmp_path, caplog):
    write_folder(tmp_path / "a", draw_images(3))
    for k in range(2000):
        (tmp_path / "a" / f"{k}.npy").touch()
    open_images(tmp_path / "a")
    (line,) = [record.getMessage() for record in caplog.records]
    assert "2,000 entries are IGNORED: 0.npy (no image by its suffix), " in line and line.endswith(", 1,997 more")


def test_folders_of_which_it_is_unclear_what_counts_are_refused(tmp_path):
    write_folder(tmp_path / "a", draw_images(3))
    write_folder(tmp_path / "a" / "originals", draw_images(2))
    with pytest.raises(UserError, match=r"holds 00000\d.png and, a folder deeper, originals/00000\d.png: name"):
        open_images(tmp_path / "a")
    write_folder(tmp_path / "b", draw_images(3))
    (tmp_path / "b" / "again").symlink_to(tmp_path / "b")
    with pytest.raises(UserError, match="again is a link to a folder above it"):
        open_images(tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="x.png is no image that can be read .cannot be read: No such file"):
        open_images(tmp_path / "c")


def test_linked_folders_count(tmp_path):
    write_folder(tmp_path / "a", draw_images(3))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "cat").symlink_to(tmp_path / "a")
    (tmp_path / "b" / "dog").symlink_to(tmp_path / "a")
    assert open_images(tmp_path / "b").count == 6


def test_other_arrays_of_an_npz_are_named(tmp_path, caplog):
    np.savez(tmp_path / "a.npz", draw_images(), draw_images(), labels=np.arange(11), mu=np.zeros(2))
    assert open_images(tmp_path / "a.npz").count == 11
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("a.npz: 1 entry is IGNORED: arr_1 (not arr_0)")


def test_a_prepared_data_set_gives_its_training_images(tmp_path):
    path = prepare_digits(tmp_path / "digits")
    source, records = open_images(path), open_dataset(path).records("train")
    assert source.count == len(records) and source.shape == (8, 8, 3)
    expected = records.read(np.array([5, 6]))["mean"].astype(np.float64)
    found = streamed(source, 5, 7, 2)
    np.testing.assert_array_equal(found, np.round((expected + 1) * 127.5).astype(np.uint8).repeat(3, axis=-1))
    assert found.max() > 200 and found.min() == 0


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 4, 4, 3), np.float32), r"float32 \(5, 4, 4, 3\), expected uint8 .*0 to 255"),
        (np.zeros((5, 4, 4, 3), np.int64), "int64"),
        (np.zeros((5, 4, 4), np.uint8), r"\(5, 4, 4\)"),
        (np.zeros((5, 4, 4, 4), np.uint8), r"\(5, 4, 4, 4\)"),
        (np.zeros((0, 4, 4, 3), np.uint8), r"\(0, 4, 4, 3\)"),
        (np.asfortranarray(np.zeros((5, 4, 4, 4), np.uint8)), r"\(5, 4, 4, 4\)"),
        (np.array([{}, 1], object), "object"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
    np.savez(tmp_path / "a.npz", arr_0=array)
    with pytest.raises(UserError, match=message):
        open_images(tmp_path / "a.npz")


def test_what_holds_no_images_is_refused(tmp_path):
    np.savez(tmp_path / "labels.npz", labels=np.zeros(3))
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "labels.npz": "not an npz with images in arr_0",
        "text.npz": "not an npz with images in arr_0",
        "empty": "holds no .bmp, .gif, .*, .webp",
        "none": "does not exist",
    }.items():
        with pytest.raises(UserError, match=message):
            open_images(tmp_path / name)


@pytest.mark.parametrize("save, order", EVERY_NPZ, ids=EVERY_NPZ_NAME)
def test_a_damaged_npz_is_refused_when_it_is_read(tmp_path, save, order):
    """Wherever it is damaged: what numpy's parser makes of a header is an exception of many kinds."""
    path, images = tmp_path / "a.npz", draw_images(3000) // 64  # of few values, which deflate does not just store
    save(path, arr_0=order(images))
    sound = path.read_bytes()
    refused = 0
    starts = [*range(0, 200, 5), *range(200, len(sound) - 200, len(sound) // 20)]
    for start in starts:
        damaged = bytearray(sound)
        damaged[start : start + 5] = bytes(value ^ 85 for value in damaged[start : start + 5])
        path.write_bytes(damaged)
        try:
            assert (streamed(open_images(path), 0, 3000, 100) == images).all()  # none of its bytes matters
        except UserError as error:
            assert str(error).startswith(f"{path}: ")
            refused += 1
    assert refused > len(starts) // 2


def test_files_of_several_sizes_and_damaged_ones_are_named(tmp_path):
    folder = write_folder(tmp_path / "a", draw_images())
    Image.fromarray(draw_images()[0, :4]).save(folder / "000007.png")
    with pytest.raises(UserError, match=r"000007.png is \(4, 5\) .* others are \(6, 5\)"):
        streamed(open_images(folder), 0, 11, 4)
    (folder / "000007.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="000007.png is no image"):
        streamed(open_images(folder), 0, 11, 4)
