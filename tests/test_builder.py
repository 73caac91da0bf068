from concurrent import futures
import dataclasses
import json
import os

from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
import fsspec
from fsspec.implementations.memory import MemoryFileSystem
import numpy as np
import pytest
import tensorflow_datasets as tfds

from terdit_jax import paths
from terdit_jax.data import builder, schema, sources
from terdit_jax.data.codec import PixelCodec
from terdit_jax.data.image_file import ImageError
from terdit_jax.data.sources import Item
from terdit_jax.errors import UserError


class ToyCodec:
    """Halves the size and has a spread; a mirrored image's latent is not the mirrored latent."""

    name = "toy"
    latent_scale = 0.5
    batch_size = 16

    def latent_shape(self, image_shape):
        height, width, channels = image_shape
        return height // 2, width // 2, channels + 1

    def encode(self, images):
        mean = np.concatenate([images[:, ::2, ::2], images[:, 1::2, 1::2, :1]], axis=-1)
        return mean, np.abs(mean) / 4 + 0.1


def make_source(num_train=30, num_heldout=10, bad=(), load=None):
    source = sources.make_digits_source()
    items = {"train": source.splits["train"][:num_train], "heldout": source.splits["heldout"][:num_heldout]}
    unusable = {items["train"][index].source_id for index in bad}

    def load_or_fail(item):
        if item.source_id in unusable:
            raise ImageError("broken on purpose")
        return source.load(item)

    return dataclasses.replace(source, splits=items, load=load or load_or_fail)


@pytest.fixture
def bucket(monkeypatch):
    """The name of a bucket whose gs:// paths lie in memory, as if the package for them were installed."""
    monkeypatch.setitem(paths._SCHEMES, "gs", ("fsspec", "fsspec"))
    for protocol in ("gs", "gcs"):
        fsspec.register_implementation(protocol, MemoryFileSystem, clobber=True)
    yield "bucket-of-a-test"
    MemoryFileSystem.store.clear()


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
            np.testing.assert_array_equal(record["mean"], source.load(item)[0])
            assert not record["std"].any()


def test_shards_split_the_records_in_order(tmp_path):
    source = make_source(num_train=150)
    metadata = builder.build(source, tmp_path / "d", codec=PixelCodec(), shard_bytes=10_000)
    shards = metadata.splits["train"].shards
    assert [shard.file for shard in shards] == [f"latents-train.array_record-0000{k}-of-00004" for k in range(4)]
    assert [shard.records for shard in shards] == [37, 38, 37, 38]
    records = tfds.builder_from_directory(tmp_path / "d").as_data_source("train")
    assert [record["source_id"].decode() for record in records] == [item.source_id for item in source.splits["train"]]


def test_mirrored_latents_are_those_of_mirrored_images(tmp_path):
    source = make_source()
    metadata = builder.build(source, tmp_path / "d", codec=ToyCodec(), mirror=True)
    assert metadata.has_mirror and metadata.shape == (4, 4, 2)
    assert (metadata.codec, metadata.latent_scale) == ("toy", 0.5)
    for record in tfds.builder_from_directory(tmp_path / "d").as_data_source("train"):
        image = source.load(Item(record["source_id"].decode(), int(record["label"])))[0][None]
        for view, suffix in ((image, ""), (image[:, :, ::-1], "_mirror")):
            mean, std = ToyCodec().encode(view)
            np.testing.assert_array_equal(record["mean" + suffix], mean[0].astype(np.float16))
            np.testing.assert_array_equal(record["std" + suffix], std[0].astype(np.float16))


def test_channel_statistics_are_those_of_posterior_draws_of_the_training_split(tmp_path):
    source = make_source(num_train=100)
    metadata = builder.build(source, tmp_path / "d", codec=ToyCodec())
    images = np.stack([source.load(item)[0] for item in source.splits["train"]])
    mean, std = (array.astype(np.float16).astype(np.float64) for array in ToyCodec().encode(images))
    np.testing.assert_allclose(metadata.channel_mean, mean.mean(axis=(0, 1, 2)), rtol=1e-12)
    variance = mean.var(axis=(0, 1, 2)) + (std**2).mean(axis=(0, 1, 2))
    np.testing.assert_allclose(metadata.channel_std, np.sqrt(variance), rtol=1e-12)


def test_unusable_images_are_named_counted_and_skipped(tmp_path, caplog):
    source = make_source(bad=(0, 7, 29))
    with caplog.at_level("WARNING"):
        metadata = builder.build(source, tmp_path / "d", codec=PixelCodec(), max_bad_share=0.1, shard_bytes=256)
    assert metadata.splits["train"].records == 27
    skipped = [source.splits["train"][index].source_id for index in (0, 7, 29)]
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == [f"skipped {source_id}: broken on purpose" for source_id in skipped]
    assert json.loads((tmp_path / "d" / "skipped.json").read_text()) == {
        "train": dict.fromkeys(skipped, "broken on purpose"),
        "heldout": {},
    }
    # With a record a shard some shards are now empty; the others must still be found.
    records = tfds.builder_from_directory(tmp_path / "d").as_data_source("train")
    read = [record["source_id"].decode() for record in records]
    assert read == [item.source_id for item in source.splits["train"] if item.source_id not in skipped]


def test_what_a_source_ignores_is_said_and_named(tmp_path, caplog):
    ignored = {"README": "beside the class folders", "n03.txt": "hidden"}
    builder.build(
        dataclasses.replace(make_source(bad=(0,)), ignored=ignored),
        tmp_path / "d",
        codec=PixelCodec(),
        max_bad_share=0.1,
    )
    (line,) = [record.getMessage() for record in caplog.records if "IGNORED" in record.getMessage()]
    assert line == "the input: 2 entries are IGNORED: README (beside the class folders), n03.txt (hidden)"
    written = json.loads((tmp_path / "d" / "skipped.json").read_text())
    assert written["ignored"] == ignored and len(written["train"]) == 1
    builder.build(dataclasses.replace(make_source(), ignored=ignored), tmp_path / "e", codec=PixelCodec())
    assert json.loads((tmp_path / "e" / "skipped.json").read_text()) == {"ignored": ignored}


@pytest.mark.parametrize("label", [10, -1, 1.5, None, "3"])
def test_a_class_that_the_source_does_not_have_is_refused(tmp_path, label):
    source = make_source()
    with pytest.raises(UserError, match="its class is .*, the source has 10"):
        builder.build(make_source(load=lambda item: (source.load(item)[0], label)), tmp_path / "d", codec=PixelCodec())


def test_too_many_unusable_images_abort(tmp_path):
    source = make_source(bad=(3, 4, 5, 6))
    with pytest.raises(UserError, match=r"3 of 40 images cannot be used, more than --max_bad_share=0\.05;.*purpose"):
        builder.build(source, tmp_path / "d", codec=PixelCodec(), max_bad_share=0.05)
    # Asked for less, the next run goes on.
    metadata = builder.build(source, tmp_path / "d", codec=PixelCodec(), max_bad_share=0.1)
    assert metadata.splits["train"].records == 26
    with pytest.raises(UserError, match="none of the 2 images of the train split"):
        builder.build(make_source(num_train=2, bad=(0, 1)), tmp_path / "e", codec=PixelCodec(), max_bad_share=0.5)
    with pytest.raises(UserError, match="max_bad_share=1.5"):
        builder.build(make_source(), tmp_path / "f", codec=PixelCodec(), max_bad_share=1.5)


def test_unusable_images_of_all_workers_count_together(tmp_path):
    source = make_source(num_train=80, bad=(1, 25, 45, 65))  # one or two in each worker's shards
    options = {"codec": PixelCodec(), "shard_bytes": 5120, "max_bad_share": 0.03}  # 20 records a shard
    assert builder.build(source, tmp_path / "d", worker=(0, 2), **options) is None
    with pytest.raises(UserError, match="3 of 90 images cannot be used"):
        builder.build(source, tmp_path / "d", worker=(1, 2), **options)


def test_an_interrupted_build_goes_on_where_it_stopped(tmp_path):
    loaded = []

    def interrupt(item):
        loaded.append(item.source_id)
        if len(loaded) == 70:
            raise KeyboardInterrupt
        return sources.make_digits_source().load(item)

    options = {"codec": PixelCodec(), "shard_bytes": 5120}  # 20 records a shard
    with pytest.raises(KeyboardInterrupt):
        builder.build(make_source(num_train=100, load=interrupt), tmp_path / "d", **options)
    with pytest.raises(UserError, match="not finished"):
        schema.read_metadata(tmp_path / "d")
    first = builder.find_prepared(make_source(num_train=100), tmp_path / "d", codec=PixelCodec(), mirror=False)
    assert first is None
    lines = []
    metadata = builder.build(make_source(num_train=100), tmp_path / "d", report=lines.append, **options)
    assert lines[0] == "3 of 6 shards are there already" and len(lines) == 4
    assert schema.verify(tmp_path / "d") == metadata
    builder.build(make_source(num_train=100), tmp_path / "whole", **options)
    assert read_files(tmp_path / "d") == read_files(tmp_path / "whole")


@pytest.mark.parametrize("num_workers", [2, 3, 7])
def test_workers_in_any_order_make_the_data_set_of_one(tmp_path, num_workers):
    options = {"codec": ToyCodec(), "mirror": True, "shard_bytes": 2560}
    source = make_source(num_train=100)
    results = [
        builder.build(source, tmp_path / "d", worker=(worker, num_workers), **options)
        for worker in reversed(range(num_workers))
    ]
    assert results[:-1] == [None] * (num_workers - 1)
    assert results[-1] == builder.build(source, tmp_path / "whole", **options)
    assert read_files(tmp_path / "d") == read_files(tmp_path / "whole")


def test_workers_that_end_together_wait_for_each_other(tmp_path):
    options = {"codec": PixelCodec(), "shard_bytes": 5120, "wait": True}
    with futures.ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(builder.build, make_source(num_train=100), tmp_path / "d", worker=(k, 3), **options)
            for k in range(3)
        ]
        metadata = [run.result(timeout=60) for run in runs]
    assert metadata[0] == metadata[1] == metadata[2] == schema.verify(tmp_path / "d")


def test_a_full_disk_ends_in_one_line_and_keeps_what_is_finished(tmp_path, monkeypatch):
    options = {"codec": PixelCodec(), "shard_bytes": 5120}
    source = make_source(num_train=100)

    class FullDisk(ArrayRecordWriter):
        def __init__(self, path, options):
            super().__init__("/dev/full" if "train.array_record-00003" in path else path, options)

    with monkeypatch.context() as patch:
        patch.setattr(builder, "ArrayRecordWriter", FullDisk)
        with pytest.raises(UserError, match="cannot be written .*No space left on device"):
            builder.build(source, tmp_path / "d", **options)
    kept = [f"latents-train.array_record-{k:05d}-of-00005" for k in range(3)]
    assert sorted(os.listdir(tmp_path / "d")) == [".unfinished", *kept]
    times = {file: os.stat(tmp_path / "d" / file).st_mtime_ns for file in kept}
    metadata = builder.build(source, tmp_path / "d", **options)
    assert schema.verify(tmp_path / "d") == metadata
    assert {file: os.stat(tmp_path / "d" / file).st_mtime_ns for file in kept} == times


def test_an_unfinished_data_set_is_not_mixed_with_another(tmp_path):
    options = {"codec": PixelCodec(), "worker": (0, 2), "shard_bytes": 1024}
    assert builder.build(make_source(), tmp_path / "d", **options) is None
    before = read_files(tmp_path / "d" / ".unfinished")
    with pytest.raises(UserError, match="unfinished data set, whose mirror is False and not True"):
        builder.build(make_source(), tmp_path / "d", mirror=True, **options)
    with pytest.raises(UserError, match="unfinished data set, whose shards.heldout is 3 and not 2"):
        builder.build(make_source(), tmp_path / "d", **options | {"shard_bytes": 2048})
    assert read_files(tmp_path / "d" / ".unfinished") == before


def test_object_stores(tmp_path, bucket):
    options = {"codec": ToyCodec(), "mirror": True, "shard_bytes": 2560}
    metadata = builder.build(make_source(), tmp_path / "local", **options)
    remote = epath.Path(f"gs://{bucket}/data/digits")
    assert builder.build(make_source(), remote, worker=(1, 2), **options) is None
    assert builder.build(make_source(), remote, worker=(0, 2), **options) == metadata
    assert read_files(remote) == read_files(tmp_path / "local")
    assert schema.verify(remote) == metadata
    assert builder.find_prepared(make_source(), remote, codec=ToyCodec(), mirror=True) == metadata


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
    source = make_source(load=lambda item: (np.full((8, 8, 1), value, np.float32), 0))
    with pytest.raises(UserError, match="does not fit float16"):
        builder.build(source, tmp_path / "d", codec=PixelCodec())
