"""Every mode and format of image files: `prepare` and `evaluate` see the same bytes."""

import io

import numpy as np
from PIL import Image
import pytest

from terdit_jax.data.image_file import ImageError, decode_image, to_8_bits
from terdit_jax.data.sources import make_folder_source
from terdit_jax.errors import UserError
from terdit_jax.evaluation.image_source import open_images
from tests.image_files import encode

SIDE = 12
GREY_16 = (np.arange(SIDE * SIDE, dtype=np.uint16) * 455).reshape(SIDE, SIDE)  # up to 65,065
COLOUR = np.random.default_rng(0).integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)
EVERY_MODE = (
    "1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F",
    "I;16", "I;16B", "I;16L", "I;16N",
)  # fmt: skip
SAVED = (  # mode, format, options
    ("1", "PNG", {}), ("1", "TIFF", {"compression": "group4"}), ("1", "PPM", {}), ("L", "PNG", {}), ("L", "JPEG", {}),
    ("LA", "PNG", {}), ("LA", "TIFF", {}), ("P", "PNG", {}), ("P", "PNG", {"transparency": 1}), ("P", "GIF", {}),
    ("P", "PNG", {"transparency": bytes(range(256))}), ("P", "BMP", {}), ("PA", "TIFF", {}), ("RGB", "WEBP", {}),
    ("RGB", "BMP", {}), ("RGBA", "PNG", {}), ("RGBA", "WEBP", {"lossless": True}), ("RGBX", "TIFF", {}),
    ("CMYK", "JPEG", {}), ("CMYK", "TIFF", {}), ("YCbCr", "TIFF", {}), ("YCbCr", "JPEG", {}), ("LAB", "TIFF", {}),
    ("I", "TIFF", {}), ("I", "PPM", {}), ("F", "TIFF", {}), ("F", "PPM", {}), ("I;16", "PNG", {}), ("I;16", "TIFF", {}),
    ("I;16B", "TIFF", {}), ("I;16B", "PNG", {}), ("I;16L", "TIFF", {}),
)  # fmt: skip


def of_mode(mode):
    """An image of a mode with many values in it."""
    if mode == "F":
        return Image.fromarray((GREY_16 / 65535).astype(np.float32))
    if mode == "I":
        return Image.fromarray(GREY_16.astype(np.int32))
    if mode == "I;16B":
        return Image.frombytes(mode, (SIDE, SIDE), GREY_16.astype(">u2").tobytes())
    if mode.startswith("I;16"):
        return Image.frombytes(mode, (SIDE, SIDE), GREY_16.astype("<u2").tobytes())
    if mode in ("P", "PA"):
        return Image.fromarray(COLOUR).quantize(64).convert(mode)
    if mode in ("La", "RGBa"):
        return of_mode(mode.upper()).convert(mode)
    bands = Image.new(mode, (1, 1)).getbands()
    if mode == "1":
        return Image.fromarray(COLOUR[..., 0]).convert("1")
    return Image.merge(mode, [Image.fromarray(np.roll(COLOUR[..., 0], k, axis=0)) for k in range(len(bands))])


def both_commands(folder, data, suffix=".png"):
    """(H, W, 3) as `prepare` and as `evaluate` read one file."""
    path = folder / "in" / "a"
    path.mkdir(parents=True)
    for name in "01":
        (path / f"{name}{suffix}").write_bytes(data)
    prepared = make_folder_source(folder / "in", image_size=SIDE, heldout_share=0.5)
    cropped, _ = prepared.load(prepared.splits["train"][0])
    source = open_images(path)
    assert source.count == 2 and source.shape == (SIDE, SIDE, 3)
    (judged,) = source.stream(0, 1, 1)
    return cropped, judged[0]


@pytest.mark.parametrize("mode, format_name, options", SAVED)
def test_both_commands_read_the_same_bytes(tmp_path, mode, format_name, options):
    cropped, judged = both_commands(tmp_path, encode(of_mode(mode), format_name, **options))
    np.testing.assert_array_equal(cropped, judged)
    assert len(np.unique(judged)) > (1 if mode == "1" else 30)


@pytest.mark.parametrize("mode", EVERY_MODE)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_of_pillow_becomes_8_bits(mode, channels):
    image = to_8_bits(of_mode(mode), channels)
    assert image.mode == ("RGB" if channels == 3 else "L") and image.size == (SIDE, SIDE)
    values = np.asarray(image)
    if mode in ("I", "F") or mode.startswith("I;16"):
        grey = values if channels == 1 else values[..., 0]
        assert np.abs(grey.astype(int) - (GREY_16 >> 8)).max() <= (mode == "F")  # floats are rounded
    elif mode not in ("La", "LAB"):  # those Pillow does not convert by itself
        np.testing.assert_array_equal(values, np.asarray(of_mode(mode).convert(image.mode)))
    assert len(np.unique(values)) > (1 if mode == "1" else 30)


def test_the_list_has_every_mode():
    from PIL import ImageMode

    known = set()
    for mode in (*EVERY_MODE, "BGR;15", "BGR;16", "BGR;24", "I;16S", "RGB;16", "LA;16"):
        try:
            Image.new(mode, (1, 1))
            known.add(ImageMode.getmode(mode).mode)
        except (ValueError, KeyError):
            continue  # this Pillow has no such mode
    assert known == set(EVERY_MODE)


@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_orientation_is_ignored_by_both_but_in_tiff(tmp_path, orientation, format_name):
    """In a TIFF it is no note of a camera but part of how rows are stored, and Pillow obeys it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format_name == "WEBP" else {}
    plain, turned = encode(COLOUR, format_name, **options), encode(COLOUR, format_name, exif=exif, **options)
    cropped, judged = both_commands(tmp_path, turned)
    np.testing.assert_array_equal(cropped, judged)
    assert np.array_equal(judged, np.asarray(Image.open(io.BytesIO(plain)))) == (format_name != "TIFF")


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG", "TIFF"])
def test_both_take_the_first_frame(tmp_path, format_name):
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    lossless = {"lossless": True} if format_name == "WEBP" else {}
    data = encode(frames[0], format_name, save_all=True, append_images=frames[1:], **lossless)
    for read in both_commands(tmp_path, data):
        np.testing.assert_array_equal(read, np.full((SIDE, SIDE, 3), [200, 0, 0]))


@pytest.mark.parametrize(
    "data, reason",
    [
        (encode(np.full((SIDE, SIDE), 70_000, np.int32), "TIFF"), "only 0 to 65535"),
        (encode(np.full((SIDE, SIDE), -1, np.int32), "TIFF"), "only 0 to 65535"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "formats BMP, GIF"),
    ],
    ids=["too deep", "below 0", "EPS, which Pillow hands to Ghostscript"],
)
def test_both_refuse_the_same(tmp_path, data, reason):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ImageError, match=reason):
        decode_image(data, 3)
    with pytest.raises(UserError, match=f"a.png is no image .*{reason}"):
        open_images(tmp_path)
