"""A set of images on disk while it is being drawn: shards that outlive a kill, then one npz or a folder of PNGs.

What the images are and who draws which shard is left to `image_set`; everything here only ever appears by the
renaming of a whole file, beside the output and on its file system.
"""

from collections.abc import Iterator, Mapping
import concurrent.futures
import contextlib
import hashlib
import json
import os
from typing import Any, BinaryIO
import zipfile

from absl import logging
from etils import epath
import numpy as np

from terdit_jax.errors import UserError
from terdit_jax.files import check_output, new_file, refusing
from terdit_jax.inference.images import encode_png, in_color
from terdit_jax.paths import as_path, is_remote
from terdit_jax.untrusted import difference, load_arrays, parse_json, reading

PLAN_FILE = "plan.json"
_WRITERS = 16  # threads that compress PNGs


class Shards:
    """The shards of one output, in the folder OUTPUT.unfinished until all of them are there.

    Attributes:
      sizes: images of each shard.

    Raises:
      UserError: the output exists, or its shards do, with images of another plan.
    """

    def __init__(self, output: epath.PathLike, plan: Mapping[str, Any]):
        """Args:
        output: a path that ends in .npz, or the name of a folder of PNGs.
        plan: all that decides the images, as JSON can hold it, with num_samples and shard_size among it.
        """
        self.output = as_path(output, "--output")
        self.folder = self.output.with_name(self.output.name + ".unfinished")
        self.plan = json.loads(json.dumps(plan))
        self._fingerprint = hashlib.sha256(json.dumps(self.plan, sort_keys=True).encode()).hexdigest()
        count, size = self.plan["num_samples"], self.plan["shard_size"]
        self.sizes = [min(size, count - first) for first in range(0, count, size)]
        if self.output.exists():
            self._check_output()
        elif (self.folder / PLAN_FILE).exists():
            self._check(self.folder / PLAN_FILE, "is unfinished: finish it with those settings, or delete {}")
        else:
            self._write_json(self.folder / PLAN_FILE)

    def is_complete(self) -> bool:
        """Whether the output is in its place; what a kill has left is then removed."""
        if not self.output.exists():
            return False
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            self.folder.rmtree()
        return True

    def is_written(self, number: int) -> bool:
        """Whether a shard is in its place, sound or not."""
        return self._path(number).exists()

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The images (S, H, W, 3) uint8 and labels (S,) of a shard; None while it is missing, loudly if damaged."""
        path = self._path(number)
        if not path.exists():
            return None
        try:
            refusal = f"SHARD {path} IS DAMAGED"
            with reading(refusal), path.open("rb") as file:
                arrays = load_arrays(file, ("arr_0", "labels", "fingerprint"), refusal)
                images, labels = arrays["arr_0"], arrays["labels"]
                if str(arrays["fingerprint"]) != self._fingerprint:
                    raise ValueError("it is of other settings")
                if not _is_shard(images, labels, self.sizes[number]):
                    raise ValueError(f"it holds {images.dtype} {images.shape} and {labels.dtype} {labels.shape}")
            return images, labels
        except UserError as error:
            # Every member of an npz carries a CRC, which reading it checks.
            logging.error("%s: it is drawn again", error)
            return None

    def write(self, number: int, images: np.ndarray, labels: np.ndarray) -> None:
        """Puts a shard, (S, H, W, 1 or 3) uint8 and (S,), in its place; on disk when this returns."""
        with self._new_file(self._path(number)) as file:
            np.savez(file, arr_0=in_color(images), labels=labels, fingerprint=np.array(self._fingerprint))

    def finish(self) -> list[int]:
        """Makes the output of all shards and removes them; the numbers of damaged ones if there are any.

        One shard is in memory at a time. Two runs of one plan give the same bytes.
        """
        if damaged := [number for number in range(len(self.sizes)) if self.read(number) is None]:
            return damaged
        if self.output.exists():  # since this command began
            self._check_output()
        elif self.output.suffix == ".npz":
            self._write_json(self._settings_file())
            with self._new_file(self.output) as file:
                self._write_npz(file)
        else:
            self._write_pngs()
        self.folder.rmtree()
        return []

    def _write_npz(self, file: BinaryIO) -> None:
        """Writes the bytes that np.savez would write of all at once."""
        image_shape = self._must_read(0)[0].shape[1:]
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            # A name alone would be stamped with the time of day.
            member = zipfile.ZipInfo("arr_0.npy")
            with archive.open(member, "w", force_zip64=True) as array:
                header = {"descr": "|u1", "fortran_order": False, "shape": (sum(self.sizes), *image_shape)}
                np.lib.format.write_array_header_1_0(array, header)
                labels = []
                for number in range(len(self.sizes)):
                    images, of_shard = self._must_read(number)
                    array.write(np.ascontiguousarray(images).data)
                    labels.append(of_shard)
            with archive.open(zipfile.ZipInfo("labels.npy"), "w", force_zip64=True) as array:
                np.lib.format.write_array(array, np.concatenate(labels), allow_pickle=False)

    def _write_pngs(self) -> None:
        folder = self.folder / "pictures"
        digits, first, all_labels = max(6, len(str(sum(self.sizes)))), 0, []

        def write(path: epath.Path, image: np.ndarray) -> None:
            path.write_bytes(encode_png(image))

        with refusing(self.output), concurrent.futures.ThreadPoolExecutor(_WRITERS) as pool:
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(len(self.sizes)):
                images, labels = self._must_read(number)
                paths = [folder / f"{first + i:0{digits}}.png" for i in range(len(images))]
                list(pool.map(write, paths, images))
                first += len(images)
                all_labels += labels.tolist()
            (folder / "labels.json").write_text(json.dumps(all_labels))
            self._write_json(folder / "settings.json")
            if not is_remote(folder):
                os.sync()  # once for all of them, before the shards that could make them anew are removed
            folder.rename(self.output)

    def _must_read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        shard = self.read(number)
        if shard is None:
            raise UserError(f"{self._path(number)} was damaged while it was read: run the command again")
        return shard

    def _path(self, number: int) -> epath.Path:
        return self.folder / f"shard-{number:05}-of-{len(self.sizes):05}.npz"

    def _settings_file(self) -> epath.Path:
        if self.output.suffix == ".npz":
            return self.output.with_name(self.output.name + ".json")
        return self.output / "settings.json"

    def _check_output(self) -> None:
        self._check(self._settings_file(), "holds other images: name another output, or delete it")

    def _check(self, path: epath.Path, what: str) -> None:
        """Compares the plan with the one in a file."""
        what = what.format(self.folder)
        try:
            found = parse_json(path.read_bytes(), path.name, dict)
        except (OSError, UserError):
            raise UserError(f"--output={self.output}: exists and no {path.name} tells its settings; {what}") from None
        if change := difference(found, self.plan):
            raise UserError(f"--output={self.output}: its {change}, and it {what}")

    def _write_json(self, path: epath.Path) -> None:
        with self._new_file(path) as file:
            file.write((json.dumps(self.plan, indent=1, sort_keys=True) + "\n").encode())

    @contextlib.contextmanager
    def _new_file(self, path: epath.Path) -> Iterator[BinaryIO]:
        """A file to write; it appears whole at `path` when the body ends, or not at all."""
        with (
            refusing(path),
            new_file(path, scratch=self.folder) as temporary,
            temporary.open("wb") as file,
        ):
            yield file


def _is_shard(images: np.ndarray, labels: np.ndarray, size: int) -> bool:
    """Whether these can be what `Shards.write` wrote."""
    sound = images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == 3
    return sound and labels.dtype.kind == "i" and len(images) == size and labels.shape == (size,)


def check_set(output: epath.Path) -> None:
    """Raises UserError for an output that no set can have or be continued in, whatever its plan."""
    settings = output.with_name(output.name + ".json") if output.suffix == ".npz" else output / "settings.json"
    try:
        if output.exists() and not settings.exists():
            raise UserError(f"--output={output}: exists and no {settings.name} tells its settings; name another place")
    except OSError as error:
        raise UserError(f"--output={output}: {error.strerror or error}") from error
    if not output.exists():
        check_output(output)
