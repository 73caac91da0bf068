"""The training command that `prepare` prints is one that the configurations take, whatever was prepared."""

import dataclasses
import importlib.util

import pytest

from terdit_jax.config import freeze
from terdit_jax.config_file import SHIPPED
from terdit_jax.data.schema import Metadata, Shard, Split
from terdit_jax.data.suggestion import choose_patch_size, remark, training_command
from terdit_jax.model.config import DiTConfig


def metadata(size=32, channels=3, classes=10, codec="none", kind="folder", mirror=False, records=50_000) -> Metadata:
    split = Split(records, (Shard("a", records, 1, ""),))
    names = tuple(map(str, range(classes)))
    return Metadata(
        schema_version=1, source={"kind": kind}, codec=codec, latent_scale=1.0, shape=(size, size, channels),
        num_classes=classes, class_names=names, has_mirror=mirror, splits={"train": split, "heldout": split},
        channel_mean=(0.0,) * channels, channel_std=(1.0,) * channels,
    )  # fmt: skip


def config_of(words: list[str]):
    """The configuration that a command's words make, as the command line makes it."""
    given = dict(word.removeprefix("--").partition("=")[::2] for word in words[3:])
    spec = importlib.util.spec_from_file_location("named", SHIPPED[given.pop("config")])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    for name, value in given.items():
        if name.startswith("config."):
            *sections, field = name.split(".")[1:]
            section = config
            for part in sections:
                section = section[part]
            section[field] = value if isinstance(section[field], str) else eval(value)
    return config


@pytest.mark.parametrize(("codec", "records"), [("none", 9_999), ("none", 50_000), ("vae-123-float32", 100)])
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("classes", [1, 2, 200, 1000])
@pytest.mark.parametrize("size", [1, 2, 7, 8, 28, 31, 32, 33, 48, 64, 97, 100, 251, 256, 512])
def test_the_suggested_configuration_is_one_and_fits_the_data(size, classes, mirror, codec, records):
    channels = 3 if codec == "none" else 4
    words = training_command(metadata(size, channels, classes, codec, mirror=mirror, records=records), "data/x")
    config = freeze(config_of(words))
    model = DiTConfig.from_config(config)
    assert model.sample_shape == (size, size, channels) and model.num_classes == classes
    assert model.num_tokens <= 4096
    assert model.hidden_size == 128 if records == 9_999 else model.hidden_size >= 512
    assert mirror or codec == "none" or not config.data.horizontal_flip, "as set_up asks for"
    assert config.data.dir == "data/x"


def test_patches_are_as_many_as_published_models_have():
    assert [choose_patch_size(size, latents=False) for size in (28, 32, 33, 64, 128, 256)] == [2, 2, 3, 4, 8, 16]
    assert [choose_patch_size(size, latents=False, few=True) for size in (8, 28, 32, 64, 256)] == [1, 4, 4, 8, 32]
    assert [choose_patch_size(size, latents=True) for size in (32, 64, 128)] == [2, 2, 8]


def test_a_run_is_named_after_its_data_and_large_data_stay_on_disk():
    small = training_command(metadata(), "gs://bucket/flowers")
    assert small[3:5] == ["--config=cifar10", "--workdir=runs/flowers"]
    assert not any("in_memory" in word for word in small)
    large = training_command(dataclasses.replace(metadata(records=3_000_000)), "data/flowers/")
    assert "--workdir=runs/flowers" in large and "--config.data.in_memory=False" in large


def test_sizes_without_a_fitting_divisor_are_remarked_on():
    assert all(remark(metadata(size)) is None for size in (1, 7, 8, 28, 31, 32, 33, 48, 64, 100, 256))
    assert "251 pixels divide into 1 x 1 patches only; --image_size=256" in remark(metadata(251))


def test_digits_have_a_configuration_of_their_own():
    words = training_command(metadata(8, 1, 10, kind="digits"), "data/digits")
    assert words[3:] == ["--config=digits", "--workdir=runs/digits", "--config.data.dir=data/digits"]
