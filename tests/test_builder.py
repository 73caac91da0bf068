import dataclasses
import json
import os

import numpy as np
import pytest
import tensorflow_datasets as tfds

from terdit_jax.data import builder, schema, sources
from terdit_jax.data.codec import PixelCodec
from terdit_jax.errors import UserError


class ToyCodec:
    """Halves the size and has a spread; a mirrored picture's latent is not the mirrored latent."""

    name = "toy"
    latent_scale = 0.5

    def latent_shape(self, picture_shape):
        height, width, channels = picture_shape
        return height // 2, width // 2, channels + 1

    def encode(self, pictures):
        mean = np.concatenate([pictures[:, ::2, ::2], pictures[:, 1::2, 1::2, :1]], axis=-1)
        return mean, np.abs(mean) / 4 + 0.1


def make_source(num_train=30, num_heldout=10, bad=(), load=None):
    source = sources.make_digits_source()
    items = {"train": source.splits["train"][:num_train], "heldout": source.splits["heldout"][:num_heldout]}
    unusable = {items["train"][index].source_id for index in bad}

    def load_or_fail(source_id):
        if source_id in unusable:
            raise sources.PictureError("broken on purpose")
        return source.load(source_id)

    return dataclasses.replace(source, splits=items, load=load or load_or_fail)


def read_files(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def test_tfds_reads_what_was_built(tmp_path):
    source = make_source()
    metadata = builder.build(source, tmp_path / "d", codec=PixelCodec())
    assert schema.verify(tmp_path / "d") == metadata
    assert (metadata.codec, metadata.latent_scale) == ("none", 1.0)
    assert metadata.shape == (8, 8, 1) and not metadata.has_mirror
    assert metadata.class_names == tuple("0123456789")
    for split, items in source.splits.items():
        records = tfds.builder_from_directory(tmp_path / "d").as_data_source(split)
        assert len(records) == len(items) == metadata.splits[split].records
        for record, item in zip(records, items, strict=True):
            assert record["source_id"].decode() == item.source_id and record["label"] == item.label
            np.testing.assert_array_equal(record["mean"], source.load(item.source_id))
            assert not record["std"].any()


def test_shards_split_the_records_in_order(tmp_path):
    source = make_source(num_train=150)
    metadata = builder.build(source, tmp_path / "d", codec=PixelCodec(), shard_bytes=10_000)
    shards = metadata.splits["train"].shards
    assert [shard.file for shard in shards] == [f"latents-train.array_record-0000{k}-of-00004" for k in range(4)]
    assert [shard.records for shard in shards] == [37, 38, 37, 38]
    records = tfds.builder_from_directory(tmp_path / "d").as_data_source("train")
    assert [record["source_id"].decode() for record in records] == [item.source_id for item in source.splits["train"]]


def test_the_same_source_gives_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        builder.build(make_source(), tmp_path / name, codec=ToyCodec(), mirror=True, shard_bytes=1000)
    assert read_files(tmp_path / "first") == read_files(tmp_path / "second")


def test_mirrored_latents_are_those_of_mirrored_pictures(tmp_path):
    source = make_source()
    metadata = builder.build(source, tmp_path / "d", codec=ToyCodec(), mirror=True)
    assert metadata.has_mirror and metadata.shape == (4, 4, 2)
    assert (metadata.codec, metadata.latent_scale) == ("toy", 0.5)
    for record in tfds.builder_from_directory(tmp_path / "d").as_data_source("train"):
        picture = source.load(record["source_id"].decode())[None]
        for view, suffix in ((picture, ""), (picture[:, :, ::-1], "_mirror")):
            mean, std = ToyCodec().encode(view)
            np.testing.assert_array_equal(record["mean" + suffix], mean[0].astype(np.float16))
            np.testing.assert_array_equal(record["std" + suffix], std[0].astype(np.float16))


def test_channel_statistics_are_those_of_posterior_draws_of_the_training_split(tmp_path):
    source = make_source(num_train=100)
    metadata = builder.build(source, tmp_path / "d", codec=ToyCodec())
    pictures = np.stack([source.load(item.source_id) for item in source.splits["train"]])
    mean, std = (array.astype(np.float16).astype(np.float64) for array in ToyCodec().encode(pictures))
    np.testing.assert_allclose(metadata.channel_mean, mean.mean(axis=(0, 1, 2)), rtol=1e-12)
    variance = mean.var(axis=(0, 1, 2)) + (std**2).mean(axis=(0, 1, 2))
    np.testing.assert_allclose(metadata.channel_std, np.sqrt(variance), rtol=1e-12)


def test_unusable_pictures_are_named_counted_and_skipped(tmp_path, caplog):
    source = make_source(bad=(0, 7, 29))
    with caplog.at_level("WARNING"):
        metadata = builder.build(source, tmp_path / "d", codec=PixelCodec(), max_bad_share=0.1, shard_bytes=256)
    assert metadata.splits["train"].records == 27
    skipped = [source.splits["train"][index].source_id for index in (0, 7, 29)]
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == [f"skipped {source_id}: broken on purpose" for source_id in skipped]
    # With a record a shard some shards are now empty; the others must still be found.
    records = tfds.builder_from_directory(tmp_path / "d").as_data_source("train")
    read = [record["source_id"].decode() for record in records]
    assert read == [item.source_id for item in source.splits["train"] if item.source_id not in skipped]


def test_too_many_unusable_pictures_abort(tmp_path):
    with pytest.raises(UserError, match=r"3 of 40 pictures cannot be used, more than --max_bad_share=0\.05;.*purpose"):
        builder.build(make_source(bad=(3, 4, 5, 6)), tmp_path / "d", codec=PixelCodec(), max_bad_share=0.05)
    assert os.listdir(tmp_path) == []
    with pytest.raises(UserError, match="none of the 2 pictures of the train split"):
        builder.build(make_source(num_train=2, bad=(0, 1)), tmp_path / "d", codec=PixelCodec(), max_bad_share=0.5)
    with pytest.raises(UserError, match="max_bad_share=1.5"):
        builder.build(make_source(), tmp_path / "d", codec=PixelCodec(), max_bad_share=1.5)


def test_an_interrupted_build_leaves_nothing_and_the_next_one_succeeds(tmp_path):
    def interrupt(source_id):
        assert os.listdir(tmp_path) == ["d.incomplete"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        builder.build(make_source(load=interrupt), tmp_path / "d", codec=PixelCodec())
    assert os.listdir(tmp_path) == []
    # What a killed process leaves behind, since it cannot clean up.
    (tmp_path / "d.incomplete").mkdir()
    (tmp_path / "d.incomplete" / "latents-train.array_record-00000-of-00009").write_bytes(b"half")
    builder.build(make_source(), tmp_path / "d", codec=PixelCodec())
    assert os.listdir(tmp_path) == ["d"]
    assert schema.verify(tmp_path / "d").splits["train"].records == 30


def test_nothing_is_overwritten(tmp_path):
    metadata = builder.build(make_source(), tmp_path / "d", codec=PixelCodec())
    before = read_files(tmp_path / "d")
    assert builder.find_prepared(make_source(), tmp_path / "d", codec=PixelCodec(), mirror=False) == metadata
    with pytest.raises(UserError, match="already holds this data set"):
        builder.build(make_source(), tmp_path / "d", codec=PixelCodec())
    with pytest.raises(UserError, match="whose mirror is False and not True"):
        builder.build(make_source(), tmp_path / "d", codec=PixelCodec(), mirror=True)
    with pytest.raises(UserError, match="whose codec is 'none' and not 'toy'"):
        builder.build(make_source(), tmp_path / "d", codec=ToyCodec())
    other = dataclasses.replace(make_source(), description={"kind": "digits", "heldout_share": 0.3})
    with pytest.raises(UserError, match="whose heldout_share is 0.2 and not 0.3"):
        builder.find_prepared(other, tmp_path / "d", codec=PixelCodec(), mirror=False)
    assert read_files(tmp_path / "d") == before


def test_output_directories(tmp_path):
    (tmp_path / "empty").mkdir()
    builder.build(make_source(), tmp_path / "empty", codec=PixelCodec())
    builder.build(make_source(), tmp_path / "several" / "levels", codec=PixelCodec())
    assert read_files(tmp_path / "empty") == read_files(tmp_path / "several" / "levels")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="holds other files"):
        builder.build(make_source(), tmp_path / "taken", codec=PixelCodec())
    with pytest.raises(UserError, match="is a file"):
        builder.build(make_source(), tmp_path / "file", codec=PixelCodec())
    with pytest.raises(UserError, match="cannot be written"):
        builder.build(make_source(), tmp_path / "file" / "below", codec=PixelCodec())
    assert (tmp_path / "taken" / "thesis.tex").read_text() == (tmp_path / "file").read_text() == "precious"


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("value", [np.nan, 1e6])
def test_latents_that_float16_cannot_hold_are_refused(tmp_path, value):
    source = make_source(load=lambda source_id: np.full((8, 8, 1), value, np.float32))
    with pytest.raises(UserError, match="does not fit float16"):
        builder.build(source, tmp_path / "d", codec=PixelCodec())


def test_metadata_file_is_readable_without_this_code(tmp_path):
    builder.build(make_source(), tmp_path / "d", codec=PixelCodec())
    raw = json.loads((tmp_path / "d" / "latents.json").read_text())
    assert raw["schema_version"] == 1 and raw["shape"] == [8, 8, 1] and raw["num_classes"] == 10
    assert raw["splits"]["train"]["records"] == 30
    shard = raw["splits"]["train"]["shards"][0]
    assert shard["bytes"] == os.path.getsize(tmp_path / "d" / shard["file"])
