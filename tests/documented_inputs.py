"""Files that the pages take for granted: folders of images, an archive, checkpoints, all of them tiny."""

import argparse
import importlib.util
import io
from pathlib import Path
import shutil
import subprocess
import tarfile

import numpy as np
from PIL import Image

from terdit_jax.interop.exports import export
from terdit_jax.interop.published import published_tensors
from terdit_jax.interop.weights import Weights
from tests.deployed import random_weights, small_config
from tests.golden_models import DIT
from tests.runs import ROOT, prepare_digits
from tests.torch_files import as_tensor

TINY_VAE = ROOT / "tests" / "golden" / "vae_tiny"


def make(name: str, path: Path) -> None:
    """Makes the input of this name at a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    MAKERS[name](path)


def image_bytes(seed: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(256, size=(66, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def make_class_folders(path: Path, names: list[str], count: int) -> None:
    for label, name in enumerate(names):
        (path / name).mkdir(parents=True)
        for index in range(count):
            (path / name / f"{index}.png").write_bytes(image_bytes(label * count + index))


def _pictures(path: Path) -> None:
    make_class_folders(path, ["cat", "dog"], 10)


def _cifar10(path: Path) -> None:
    """Two of its ten classes, so that its model is that of the pictures and compiled once."""
    for split, count in (("train", 8), ("test", 4)):
        make_class_folders(path / split, ["airplane", "automobile"], count)


def _archive(path: Path) -> None:
    """ImageNet's training archive: a tar of tars, one a class."""
    with tarfile.open(path, "w") as outer:
        for label, name in enumerate(("n01440764", "n01443537")):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for index in range(2):
                    _add(archive, f"{name}_{index}.JPEG", image_bytes(10 * label + index, "JPEG"))
            _add(outer, f"{name}.tar", inner.getvalue())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def _weights() -> Weights:
    return random_weights(small_config(num_classes=1000), codec="vae")


def _published(path: Path) -> None:
    """A published checkpoint of a tiny model: ternary weights in PyTorch's layout."""
    if importlib.util.find_spec("torch"):  # else no command that reads it is run
        export(_weights(), path, "torch")


def _state_dict() -> dict:
    """The state dict of a tiny model as files of DiT and SiT hold it, as tensors."""
    model = small_config(**DIT, ternary=False, depth=1, num_classes=1000)
    return {name: as_tensor(array) for name, array in published_tensors(model, random_weights(model).leaves())}


def _dit(path: Path) -> None:
    """A published checkpoint of DiT or SiT."""
    if importlib.util.find_spec("torch"):
        import torch

        torch.save(_state_dict(), path)


def _dit_training(path: Path) -> None:
    """A checkpoint of DiT's or SiT's training."""
    if importlib.util.find_spec("torch"):
        import torch

        torch.save({"model": _state_dict(), "ema": _state_dict(), "opt": {}, "args": argparse.Namespace()}, path)


def _environment(path: Path) -> None:
    """Makes a folder that launch/setup.sh takes for an installed environment: its Python is the one on the PATH."""
    (path / "bin").mkdir(parents=True)
    (path / "bin" / "python").write_text('#!/bin/sh\nexec python "$@"\n')
    (path / "bin" / "python").chmod(0o755)
    root = path.parent
    stamp = subprocess.run(
        ["bash", "-c", 'echo "$0 $(cat "$0/requirements.txt" "$0/pyproject.toml" | cksum)"', root],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (path / "terdit-jax.stamp").write_text(stamp.stdout)


def _digits_artifact(path: Path) -> None:
    model = small_config(input_size=8, in_channels=1)
    export(random_weights(model), path, "packed")


def _vae(path: Path) -> None:
    shutil.copytree(TINY_VAE, path)


# "runs/digits" is the run that the README's quickstart leaves: the test trains it once for all pages.
MAKERS = {
    "pictures": _pictures,
    "cifar10": _cifar10,
    "ILSVRC2012_img_train.tar": _archive,
    "sd-vae-ft-ema": _vae,
    "stabilityai/sd-vae-ft-ema": _vae,
    "3B_1180000": _published,
    "checkpoints/3B_1180000": _published,
    "DiT-XL-2-256x256.pt": _dit,
    "SiT-XL-2-256.pt": _dit,
    "0400000.pt": _dit_training,
    "terdit_4b.safetensors": lambda path: export(_weights(), path, "packed") and None,
    "digits.safetensors": _digits_artifact,
    "scores.json": lambda path: path.write_text('{"classifier_agreement": 0.98}') and None,
    "data/digits": prepare_digits,
    ".venv": _environment,
}
