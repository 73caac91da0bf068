"""Image files and archives, made in memory, and what holds of every source of them."""

from concurrent import futures
import io
import tarfile

import numpy as np
from PIL import Image


def random_pixels(width, height, seed=0):
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def encode(image, format="PNG", **options):
    """The file of a Pillow image or of an array."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format, **options)
    return file.getvalue()


def image_bytes(seed):
    return encode(random_pixels(14, 12 + seed % 5, seed), "JPEG")


def tar_bytes(members, tar_format=tarfile.GNU_FORMAT):
    """A tar of {name: content}; a TarInfo instead of a content goes in as it is."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def all_items(source):
    return source.splits["train"] + source.splits["heldout"]


def assert_threads_load_what_one_does(source):
    """Files and readers are opened by whichever thread comes first."""
    items = sorted(all_items(source)) * 10
    with futures.ThreadPoolExecutor(16) as pool:
        loaded = list(pool.map(source.load, items))
    for item, (pixels, label) in zip(items, loaded, strict=True):
        expected, expected_label = source.load(item)
        np.testing.assert_array_equal(pixels, expected)
        assert label == expected_label
