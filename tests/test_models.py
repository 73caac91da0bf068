"""The models of this repository are the files that their cards describe, and they draw."""

import hashlib
from pathlib import Path
import re

import numpy as np
import pytest

from terdit_jax import load_model

MODELS = Path(__file__).parents[1] / "models"
pytestmark = pytest.mark.skipif(not MODELS.exists(), reason="a source distribution has no models")


def test_the_card_has_the_digest_of_each_file():
    stated = re.findall(r"SHA-256[ |]+`([0-9a-f]{64})`", (MODELS / "README.md").read_text())
    files = sorted(path for path in MODELS.iterdir() if path.suffix != ".md")
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in files] == stated


@pytest.mark.slow
def test_the_cifar10_model_draws_its_classes():
    images = load_model(MODELS / "cifar10.safetensors").draw(np.array([1, 9]), num_steps=4)
    assert images.shape == (2, 32, 32, 3) and np.isfinite(images).all() and 0.3 < images.std() < 0.9
