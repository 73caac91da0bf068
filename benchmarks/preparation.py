"""The processor time of a host that prepares latents: archives listed, pictures decoded and cropped, records written.

python -m benchmarks.preparation --output=preparation.json

The last row is the whole of `terdit_jax.prepare` with an autoencoder that takes no time, so it bounds what accelerators
can be fed with. Pictures are JPEGs of smooth noise of about the size of ImageNet's, archives sparse files whose headers
lie as far apart as real ones. Processor time, of all threads together, says what a core can do, and depends less on who
else is busy.
"""

from collections.abc import Callable, Sequence
import datetime
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import tarfile
import tempfile
import time

from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter
import numpy as np
from PIL import Image

from benchmarks.random_latents import WRITER_OPTIONS
from terdit_jax.data import builder, schema
from terdit_jax.data.crop import decode_crop
from terdit_jax.data.sources import Item, Source
from terdit_jax.data.tar_source import make_tar_source
from terdit_jax.errors import run_command
from terdit_jax.paths import define_path

_WIDTH = flags.DEFINE_integer("width", 500, "Of a picture.", lower_bound=1)
_HEIGHT = flags.DEFINE_integer("height", 375, "Of a picture.", lower_bound=1)
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 256, "Of the crop; a multiple of 8.", lower_bound=8)
_PICTURES = flags.DEFINE_integer("pictures", 2000, "Of a run, the same 50 over and over.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Runs, of which the best counts.", lower_bound=1)
_OUTPUT = define_path("output", "preparation.json", "JSON file.")


class FreeCodec:
    """The shapes of the autoencoder's latents, and random numbers drawn beforehand in their place."""

    name, latent_scale, batch_size = "free", 1.0, 32

    def __init__(self, side: int):
        """For pictures of `side` pixels."""
        generator, shape = np.random.default_rng(0), (self.batch_size, side // 8, side // 8, 4)
        self._mean = (5 * generator.standard_normal(shape, np.float32)).astype(np.float16)
        self._std = generator.lognormal(-3, 0.5, shape).astype(np.float16)

    def latent_shape(self, picture_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """See `Codec.latent_shape`."""
        return picture_shape[0] // 8, picture_shape[1] // 8, 4

    def encode(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Codec.encode`."""
        return self._mean[: len(pictures)], self._std[: len(pictures)]


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    jpegs = [make_jpeg(seed) for seed in range(50)]
    jpeg_bytes = sum(map(len, jpegs)) // len(jpegs)
    with tempfile.TemporaryDirectory() as scratch:
        write_archives(pathlib.Path(scratch), _PICTURES.value, jpeg_bytes)
        what = {
            "listed in archives": lambda _: make_tar_source(scratch),
            "decoded and cropped, one thread": lambda _: decode(jpegs),
            "records written": write,
            "prepared, all cores": lambda path: prepare(jpegs, path),
        }
        rows = [{"what": name, **measure(run)} for name, run in what.items()]
    content = {
        "date": datetime.date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in ("pillow", "array_record", "numpy")}
        | {"python": platform.python_version()},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "picture": [_WIDTH.value, _HEIGHT.value],
        "jpeg_bytes": jpeg_bytes,
        "image_size": _IMAGE_SIZE.value,
        "rows": rows,
    }
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(content, indent=1) + "\n")
    print(
        f"{_WIDTH.value}x{_HEIGHT.value} pictures of {jpeg_bytes / 1e3:.0f} kB, to {_IMAGE_SIZE.value} px, on "
        f"{content['cores']} cores"
    )
    for row in rows:
        print(f"{row['what']:<34}{row['per_second']:>8,.0f}/s{row['cpu_ms']:>8.2f} ms of a core each")


def decode(jpegs: list[bytes]) -> None:
    """From the bytes to the crops, in one thread."""
    for index in range(_PICTURES.value):
        decode_crop(jpegs[index % len(jpegs)], _IMAGE_SIZE.value, 3)


def write(path: pathlib.Path) -> None:
    """Writes one record a picture, with its mirror, into one shard."""
    codec = FreeCodec(_IMAGE_SIZE.value)
    mean, std = (array[0] for array in codec.encode(np.empty((1, 1, 1, 3))))
    record = {"mean": mean, "std": std, "mean_mirror": mean, "std_mirror": std, "label": 1, "source_id": "n01/n01_1"}
    features = schema.make_features(mean.shape, has_mirror=True)
    writer = ArrayRecordWriter(os.fspath(path), WRITER_OPTIONS["zstd"])
    for _ in range(_PICTURES.value):
        writer.write(schema.encode_record(features, record))
    writer.close()


def prepare(jpegs: list[bytes], path: pathlib.Path) -> None:
    """A data set of the pictures."""
    size = _IMAGE_SIZE.value
    items = [Item(f"{index:07d}", 0) for index in range(_PICTURES.value)]
    source = Source(
        description={"kind": "noise"},
        shape=(size, size, 3),
        class_names=("noise",),
        splits={"train": items, "heldout": items[:1]},
        load=lambda item: (decode_crop(jpegs[int(item.source_id) % len(jpegs)], size, 3), item.label),
    )
    builder.build(source, path, codec=FreeCodec(size), mirror=True, report=lambda line: None)


def measure(run: Callable[[pathlib.Path], object]) -> dict[str, float]:
    """The best of a few runs, each given a path where nothing is: pictures a second, processor time of each."""
    seconds, cpu_seconds = [], []
    for _ in range(_REPEATS.value):
        with tempfile.TemporaryDirectory() as scratch:
            begin, cpu_begin = time.perf_counter(), time.process_time()
            run(pathlib.Path(scratch) / "output")
            seconds.append(time.perf_counter() - begin)
            cpu_seconds.append(time.process_time() - cpu_begin)
    return {"per_second": _PICTURES.value / min(seconds), "cpu_ms": min(cpu_seconds) / _PICTURES.value * 1e3}


def write_archives(folder: pathlib.Path, pictures: int, size: int) -> None:
    """Writes ten tars of classes that together hold this number of pictures of `size` bytes, all of them holes."""
    for label in range(10):
        with (folder / f"n{label:08d}.tar").open("wb") as file:
            for index in range(label, pictures, 10):
                member = tarfile.TarInfo(f"n{label:08d}_{index}.JPEG")
                member.size = size
                file.write(member.tobuf(tarfile.USTAR_FORMAT))
                file.seek(-(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, os.SEEK_CUR)
            file.write(bytes(2 * tarfile.BLOCKSIZE))


def make_jpeg(seed: int) -> bytes:
    """Noise with as much in every octave, as photographs have it; about 100 kB of 500 x 375."""
    generator, size = np.random.default_rng(seed), (_WIDTH.value, _HEIGHT.value)
    noise = np.full((size[1], size[0], 3), 128, np.float32)
    for scale in (1, 2, 4, 8, 16, 32, 64):
        coarse = generator.normal(128, 20, (-(-size[1] // scale), -(-size[0] // scale), 3)).astype(np.uint8)
        noise += np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.float32) - 128
    file = io.BytesIO()
    Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


if __name__ == "__main__":
    run_command(main)
