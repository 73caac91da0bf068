import io
import itertools
import pathlib
import struct
import subprocess
import sys
import zlib

import numpy as np
from PIL import Image
import pytest

from terdit_jax.data import crop
from terdit_jax.data.image_file import ImageError
from terdit_jax.errors import UserError
from tests.image_files import encode, random_pixels

EVERY_FORMAT = (  # mode, options of save
    ("RGB", {"format": "BMP"}),
    ("P", {"format": "GIF"}),
    ("RGB", {"format": "JPEG"}),
    ("CMYK", {"format": "JPEG", "progressive": True}),
    ("RGBA", {"format": "PNG"}),
    ("I;16", {"format": "PNG"}),
    ("RGB", {"format": "PPM"}),
    ("RGB", {"format": "TIFF"}),
    ("I;16", {"format": "TIFF", "compression": "tiff_lzw"}),
    ("RGB", {"format": "TIFF", "compression": "tiff_adobe_deflate"}),
    ("1", {"format": "TIFF", "compression": "group4"}),
    ("RGB", {"format": "TIFF", "compression": "jpeg"}),
    ("RGB", {"format": "WEBP"}),
)


def cubic(x):
    x = abs(x)
    return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def box(x):
    return float(-0.5 < x <= 0.5)


def resample_rows(pixels, size, kernel, radius):
    """One antialiased pass along axis 0 of uint8 pixels in the fixed-point arithmetic of Pillow: 22 fractional bits."""
    length = pixels.shape[0]
    if length == size:
        return pixels
    ratio = length / size
    stretch = max(ratio, 1.0)
    rows = []
    for row in range(size):
        centre = (row + 0.5) * ratio
        low, high = max(int(centre - radius * stretch + 0.5), 0), min(int(centre + radius * stretch + 0.5), length)
        weights = [kernel((index - centre + 0.5) / stretch) for index in range(low, high)]
        weights = np.array(weights) / list(itertools.accumulate(weights))[-1]
        fixed = np.trunc(weights * 2**22 + np.copysign(0.5, weights)).astype(np.int64)
        total = np.tensordot(fixed, pixels[low:high].astype(np.int64), axes=(0, 0)) + 2**21
        rows.append(np.clip(total >> 22, 0, 255).astype(np.uint8))
    return np.stack(rows)


def resample(pixels, width, height, kernel, radius):
    columns = resample_rows(pixels.swapaxes(0, 1), width, kernel, radius).swapaxes(0, 1)
    return resample_rows(columns, height, kernel, radius)


def published_crop(pixels, size):
    """The crop of the ADM and DiT codes on pixels (H, W, C), without Pillow."""
    height, width = pixels.shape[:2]
    while min(height, width) >= 2 * size:
        height, width = height // 2, width // 2
        pixels = resample(pixels, width, height, box, 0.5)
    scale = size / min(height, width)
    height, width = round(height * scale), round(width * scale)
    pixels = resample(pixels, width, height, cubic, 2.0)
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "width, height, size",
    [
        (500, 375, 256),  # the usual image of ImageNet
        (375, 500, 256),
        (1127, 1061, 256),  # halved twice, odd on the way
        (512, 700, 256),  # halved onto the very size
        (511, 600, 256),  # just not halved
        (1031, 1300, 512),
        (120, 97, 256),  # smaller than the crop
        (300, 211, 512),
        (77, 130, 37),
        (1, 1, 5),
        (9, 200, 16),
        (64, 64, 64),
    ],
)
def test_crop_is_the_published_one_bit_for_bit(width, height, size):
    pixels = random_pixels(width, height, seed=width)
    decoded = crop.decode_crop(encode(pixels, format="PNG"), size, 3)
    assert decoded.shape == (size, size, 3) and decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, published_crop(pixels, size))


def test_crop_takes_the_centre_exactly():
    pixels = random_pixels(15, 10)
    np.testing.assert_array_equal(np.asarray(crop.centre_crop(Image.fromarray(pixels), 10)), pixels[:, 2:12])


@pytest.mark.parametrize("mode, options", EVERY_FORMAT)
def test_every_format_comes_out_in_both_channel_counts(mode, options):
    data = encode(Image.fromarray(random_pixels(24, 24)).convert("L" if mode == "I;16" else mode), **options)
    for channels in (1, 3):
        decoded = crop.decode_crop(data, 24, channels)
        assert decoded.shape == (24, 24, channels) and decoded.dtype == np.uint8
        reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB" if channels == 3 else "L"))
        np.testing.assert_array_equal(decoded, reference.reshape(decoded.shape))


def test_alpha_is_dropped_not_blended():
    red = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    for format_name in ("PNG", "TIFF"):
        np.testing.assert_array_equal(crop.decode_crop(encode(red, format=format_name), 8, 3)[0, 0], [255, 0, 0])
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    for transparency in (1, bytes([255, 0])):
        data = encode(palette, format="PNG", transparency=transparency)
        np.testing.assert_array_equal(crop.decode_crop(data, 8, 3)[0, 0], [9, 8, 7])


def test_cmyk_jpeg_of_adobe_is_stored_inverted():
    data = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), format="JPEG", quality=100)
    assert b"Adobe" in data
    np.testing.assert_allclose(crop.decode_crop(data, 8, 3)[0, 0], [255, 0, 0], atol=2)


def tiff(data, width, height, bits, photometric=1, channels=1):
    """An uncompressed little-endian TIFF of grey channels."""
    tags = {
        256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: channels, 278: height,
        279: len(data),
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + directory


def test_deep_grey_is_scaled_and_not_clipped():
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257  # all of 0 to 65,535
    expected = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    a, b = (values.reshape(-1, 2) >> 4).T  # two pixels of 12 bits fill three bytes
    twelve = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], axis=1).astype(np.uint8)
    files = {
        "PNG": encode(values, format="PNG"),
        "PNG, without the low byte": encode(values & 0xFF00, format="PNG"),
        "TIFF": encode(values, format="TIFF"),
        "TIFF, compressed": encode(values, format="TIFF", compression="tiff_lzw"),
        "TIFF, big-endian": encode(values.astype(">u2"), format="TIFF"),
        "TIFF, white is zero": tiff((65535 - values).astype("<u2").tobytes(), 16, 16, 16, photometric=0),
        "TIFF, 12 bits": tiff(twelve.tobytes(), 16, 16, 12),
        "TIFF, 32-bit integers": encode(values.astype(np.int32), format="TIFF"),
        "TIFF, floats": encode((expected[..., 0] / 255).astype(np.float32), format="TIFF"),
        "PGM": b"P5 16 16 65535\n" + values.astype(">u2").tobytes(),
        "PFM": b"Pf\n16 16\n-1.0\n" + (expected[::-1, :, 0] / 255).astype("<f4").tobytes(),
    }
    for name, data in files.items():
        np.testing.assert_array_equal(crop.decode_crop(data, 16, 1), expected, err_msg=name)
        np.testing.assert_array_equal(crop.decode_crop(data, 16, 3), np.repeat(expected, 3, axis=2), err_msg=name)


def test_grey_and_colour_of_16_bits_are_scaled_alike():
    values = np.random.default_rng(0).integers(2**16, size=(8, 8), dtype=np.uint16)
    rows = [b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in values]
    colour = png(struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0), zlib.compress(b"".join(rows)))
    grey = encode(values, format="PNG")
    np.testing.assert_array_equal(crop.decode_crop(colour, 8, 3), crop.decode_crop(grey, 8, 3))


def png(header, pixels):
    chunks = [(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bomb(width):
    return png(struct.pack(">IIBBBBB", width, width, 8, 2, 0, 0, 0), zlib.compress(b""))


def reason(data):
    reasons = set()
    for _ in range(2):  # the same words every time: no addresses
        with pytest.raises(ImageError) as caught:
            crop.decode_crop(bytes(bytearray(data)), 8, 3)
        reasons.add(str(caught.value))
    (text,) = reasons
    assert text and text.splitlines() == [text]
    return text


def test_unusable_images_say_why():
    whole = encode(random_pixels(12, 10), format="PNG")
    assert "truncated" in reason(whole[: len(whole) // 2])
    assert "truncated" in reason(encode(random_pixels(40, 40), format="JPEG")[:900])
    assert reason(b"") == "the file is empty"
    for data in (b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"):
        assert reason(data).startswith("not an image in any of the formats BMP, GIF, ")
    assert reason(encode(random_pixels(1001, 10), format="PNG")) == "1001x10 is too elongated to crop"
    for values in (np.full((8, 8), 70_000, np.int32), np.full((8, 8), -1, np.int32)):
        assert "only 0 to 65535" in reason(encode(values, format="TIFF"))
    for value in (1.5, -0.1, np.nan, np.inf):
        assert "only 0 to 1 " in reason(encode(np.full((8, 8), value, np.float32), format="TIFF"))


@pytest.mark.parametrize("size", [0, -1, 2049, 20_000, 2**31, 2**63])
def test_sizes_that_no_crop_has_are_refused(size):
    with pytest.raises(UserError, match=f"--image_size={size}: must be from 1 to 2048"):
        crop.check_crop(size, 3)


def test_a_large_crop_of_an_elongated_image_allocates_nothing():
    data = encode(random_pixels(90, 1), format="PNG")
    assert crop.decode_crop(data, 8, 3).shape == (8, 8, 3)
    with pytest.raises(ImageError, match="90x1 is too elongated"):
        crop.decode_crop(data, 2048, 3)


@pytest.mark.parametrize("format_name", ["ICO", "TGA", "PCX", "JPEG2000", "AVIF", "EPS", "SGI"])
def test_other_formats_stay_closed(format_name):
    try:
        data = encode(random_pixels(8, 8), format=format_name)
    except (KeyError, OSError):
        pytest.skip("this Pillow does not write it")
    assert reason(data).startswith("not an image")


def damaged_images(count):
    """Images of every format with flipped bits, overwritten stretches and lost ends."""
    rng = np.random.default_rng(0)
    for index in range(count):
        mode, options = EVERY_FORMAT[index % len(EVERY_FORMAT)]
        image = Image.fromarray(random_pixels(20, 17, seed=index))
        if mode == "I;16":
            image = Image.fromarray(rng.integers(2**16, size=(17, 20), dtype=np.uint16))
        data = bytearray(encode(image if mode == "I;16" else image.convert(mode), **options))
        stretch = len(data) if rng.random() < 0.5 else min(len(data), 64)  # half of them in the header
        for _ in range(int(rng.integers(1, 6))):
            data[rng.integers(stretch)] ^= 1 << rng.integers(8)
        if rng.random() < 0.3:
            start = int(rng.integers(stretch))
            data[start : start + 4] = rng.bytes(4)
        yield bytes(data[: rng.integers(len(data))] if rng.random() < 0.4 else data)


def test_damage_gives_an_image_or_a_reason_and_no_noise():
    code = "from tests import test_crop; test_crop.survive_damage(650)"  # not here, where pytest takes the warnings
    command = [sys.executable, "-W", "always", "-c", code]
    done = subprocess.run(command, cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    usable, refused = map(int, done.stdout.split())
    assert usable > 100 and refused > 100 and usable + refused == 650


def survive_damage(count):
    for width in (10_000, 30_000):  # Pillow warns of the first and refuses the second
        assert "bomb" in reason(bomb(width))
    reason(tiff(bytes(64), 8, 8, 8, channels=2051))  # Pillow logs an error of its own
    refused = 0
    for data in damaged_images(count):
        try:
            assert crop.decode_crop(data, 8, 3).shape == (8, 8, 3)
        except ImageError:
            reason(data)
            refused += 1
    print(count - refused, refused)
