import json
import os
from pathlib import Path

import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from terdit_jax.data import builder, schema, sources
from terdit_jax.data.codec import PixelCodec
from terdit_jax.data.crop import decode_crop
from terdit_jax.interop.vae_weights import load_vae, vae_identity
from terdit_jax.model.vae import encode
from tests.runs import completed

ROOT = Path(__file__).parents[1]
TINY_VAE = ROOT / "tests" / "golden" / "vae_tiny"


def prepare(*args):
    return completed("prepare", *args)


def fails(*args):
    """The one line that the command prints before it ends with status 2."""
    run = prepare(*args)
    assert run.returncode == 2, run.stderr
    assert run.stderr.count("\n") == 1 and run.stderr.startswith("error: "), run.stderr
    return run.stderr


def test_digits(tmp_path):
    output = tmp_path / "digits"
    first = prepare("--source=digits", f"--output={output}")
    assert first.returncode == 0, first.stderr
    # Another process, so this also shows that the bytes do not depend on the process.
    metadata = builder.build(sources.make_digits_source(), tmp_path / "here", codec=PixelCodec())
    assert schema.verify(output) == metadata
    lines = first.stdout.splitlines()
    assert lines[-3] == "1,438 training and 359 held-out records of 8x8x1, 10 classes"
    assert metadata.fingerprint in lines[-2]
    assert lines[-1].startswith("next: python -m terdit_jax.main --config=digits")
    assert lines[-1].endswith(f"--config.data.dir={output}")
    times = {file: os.stat(output / file).st_mtime_ns for file in os.listdir(output)}
    again = prepare("--source=digits", f"--output={output}")
    assert again.returncode == 0 and "already holds this data set" in again.stdout
    assert again.stdout.splitlines()[1:] == lines[-3:]
    assert {file: os.stat(output / file).st_mtime_ns for file in os.listdir(output)} == times
    assert "heldout_share is 0.2 and not 0.5" in fails("--source=digits", f"--output={output}", "--heldout_share=0.5")


def test_folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for index in range(10):
            pixels = np.full((20, 30, 3), 10 * index, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "in" / name / f"{index}.png")
    (tmp_path / "in" / "dog" / "bad.jpg").write_text("not an image")
    (tmp_path / "in" / "README").write_text("beside the classes")
    options = ["--source=folder", f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}", "--image_size=16"]
    options += ["--channels=1", "--heldout_share=0.25", "--mirror"]
    assert "1 of 21 images cannot be used" in prepare(*options).stderr
    assert not (tmp_path / "out" / "latents.json").exists()
    run = prepare(*options, "--max_bad_share=0.1")
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("skipped dog/bad.jpg") == 1
    assert run.stderr.count("1 entry is IGNORED: README (beside the class folders)") == 1
    left_out = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert left_out["ignored"] == {"README": "beside the class folders"}
    assert "dog/bad.jpg" in left_out["train"] | left_out["heldout"] and "skipped.json" in run.stdout
    metadata = schema.verify(tmp_path / "out")
    assert metadata.shape == (16, 16, 1) and metadata.class_names == ("cat", "dog") and metadata.has_mirror
    assert sum(split.records for split in metadata.splits.values()) == 20
    next_command = run.stdout.splitlines()[-1]
    for override in ("input_size=16", "in_channels=1", "num_classes=2"):
        assert f"--config.model.{override}" in next_command


def test_latents_of_an_autoencoder(tmp_path):
    """Two workers, then a look at what they made."""
    images = tmp_path / "in"
    for label in range(2):
        for index in range(6):
            (images / str(label)).mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(10 * label + index).integers(256, size=(40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / str(label) / f"{index}.png")
    options = ["--source=folder", f"--input={images}", f"--output={tmp_path / 'out'}", "--image_size=32"]
    options += [f"--vae={TINY_VAE}", "--shard_mb=0.01", "--batch_size=4"]
    first = prepare(*options, "--worker=1/2")
    assert first.returncode == 0 and first.stdout.splitlines()[-1].startswith("worker 1/2 is done"), first.stderr
    second = prepare(*options, "--worker=0/2")
    assert second.returncode == 0, second.stderr
    assert "--config=terdit_600m" in second.stdout.splitlines()[-1]
    metadata = schema.verify(tmp_path / "out")
    config, params = load_vae(TINY_VAE)
    assert metadata.codec == f"vae-{vae_identity(config, params)}-float32" and metadata.has_mirror
    for record in tfds.builder_from_directory(tmp_path / "out").as_data_source("train"):
        data = (images / record["source_id"].decode()).read_bytes()
        pixels = decode_crop(data, 32, 3)[None] / np.float32(127.5) - 1
        for view, suffix in ((pixels, ""), (pixels[:, :, ::-1], "_mirror")):
            for name, expected in zip(("mean", "std"), encode(config, params, view), strict=True):
                np.testing.assert_allclose(record[name + suffix], expected[0], rtol=2e-3, atol=2e-3)
    sheet = tmp_path / "sheet.png"
    run = prepare(f"--inspect={tmp_path / 'out'}", f"--vae={TINY_VAE}", f"--output={sheet}")
    assert run.returncode == 0, run.stderr
    assert f"codec {metadata.codec}" in run.stdout and Image.open(sheet).size[0] > 2 * 96
    assert "exists" in fails(f"--inspect={tmp_path / 'out'}", f"--output={sheet}")


@pytest.mark.parametrize(
    "args, message",
    [
        (["--source=digits", "--worker=3/3"], "--worker=3/3: write K/N"),
        (["--source=folder", "--input=docs/pods", "--heldout_share=0.5", "--vae=/nowhere"], "/nowhere is no folder"),
        (["--inspect=/nowhere", "--output={}/sheet.png"], "no data set at /nowhere"),
        (["--inspect=/nowhere", "--source=digits"], "--source=digits: takes no part with --inspect"),
        (["--source=digits", "--num_samples=5"], "--num_samples=5: takes no part without --inspect"),
        (["--source=digits", "--data_dir=x"], "--data_dir=x: takes no part with --source=digits"),
        (["--source=digits", "--dtype=float32"], "--dtype=float32: takes no part without --vae"),
        (["--source=digits", "--batch_size=5"], "--batch_size=5: takes no part without --vae"),
        ([], "--source is missing"),
        (["--source=imagenet"], "imagenet"),
        (["--source=digits", "--image_size=16"], "--image_size=16: the digits are embedded"),
        (["--source=folder"], "--input is missing"),
        (["--source=folder", "--input=/nowhere/at/all"], "/nowhere/at/all: no such folder"),
        (["--source=folder", "--input=docs", "--image_size=20000"], "20000 is not an integer in the range [1, 2048]"),
        (["--source=tar", "--input=docs", "--image_size=9223372036854775808"], "not an integer in the range [1, 2048]"),
        (["--source=digits", "--shard_mb=nan"], "--shard_mb=nan: must be a finite number from 0.001 to 1e+06"),
        (["--source=digits", "--shard_mb=inf"], "--shard_mb=inf: must be"),
        (["--source=digits", "--batch_size=1000000"], "--batch_size"),
        (["--source=digits", "--num_samples=1000000"], "--num_samples"),
        (["--source=digits", "--output="], "--output=: is empty, give a path or leave it out"),
        (["--sauce=digits"], "sauce"),
    ],
)
def test_flags_that_cannot_be_used(tmp_path, args, message):
    assert message in fails(f"--output={tmp_path / 'out'}", *(arg.format(tmp_path) for arg in args))
    assert os.listdir(tmp_path) == []
