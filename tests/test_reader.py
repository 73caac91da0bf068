import itertools
import re
import shutil

from array_record.python.array_record_module import ArrayRecordWriter
import numpy as np
import pytest
import tensorflow_datasets as tfds

from terdit_jax.data import builder, draws, reader, schema, synthetic
from terdit_jax.data.codec import PixelCodec
from terdit_jax.data.inspection import inspect
from terdit_jax.errors import UserError
from tests.test_builder import make_source

NUM_TRAIN, NUM_HELDOUT = 37, 11


class LopsidedCodec(PixelCodec):
    """Keeps the size, has a spread, and a mirrored image's latent is not the mirrored latent."""

    name = "lopsided"

    def encode(self, images):
        mean, _ = super().encode(images)
        ramp = np.linspace(0, 1, images.shape[2], dtype=np.float32)[:, None]
        return mean + ramp, 0.1 + ramp * mean**2


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "mirror"])
def dataset(request, tmp_path_factory):
    """Records that are images and hold one view, or records of latents that hold both."""
    path = tmp_path_factory.mktemp("data") / "digits"
    source, codec = make_source(NUM_TRAIN, NUM_HELDOUT), LopsidedCodec() if request.param else PixelCodec()
    builder.build(source, path, codec=codec, mirror=request.param, shard_bytes=2000)
    return reader.open_dataset(path)


def batches(dataset, num_steps, **changes):
    options = {
        "seed": 0, "batch_size": 8, "start_step": 0, "process_index": 0, "process_count": 1, "horizontal_flip": True,
        "in_memory": False, "read_threads": 2, "prefetch": 3,
    }  # fmt: skip
    return list(itertools.islice(reader.make_batches(dataset, **(options | changes)), num_steps))


def joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        np.testing.assert_array_equal(left[name], right[name])


def by_tfds(dataset, split):
    """The records as TFDS decodes them."""
    return tfds.builder_from_directory(dataset.path).as_data_source(split)


def both_views(dataset, name):
    """An array of all training records as TFDS decodes them, and that of their mirrors: (2, N, H, W, C)."""
    items = list(by_tfds(dataset, "train"))
    return np.stack([[item[name], item.get(f"{name}_mirror", item[name][:, ::-1])] for item in items], axis=1)


def row_numbers(dataset, batch):
    """Which record of the training split each row is, in either view; all digits in the split differ."""
    stored = both_views(dataset, "mean").reshape(2, 1, NUM_TRAIN, -1)
    matches = (batch["mean"].reshape(len(batch["mean"]), 1, -1) == stored).all(axis=-1).any(axis=0)
    np.testing.assert_array_equal(matches.sum(axis=1), 1)
    return matches.argmax(axis=1)


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("horizontal_flip", [False, True])
def test_rows_are_the_drawn_view_of_whole_records(dataset, horizontal_flip, in_memory):
    batch = joined(batches(dataset, 24, horizontal_flip=horizontal_flip, in_memory=in_memory))
    shapes = {"mean": (192, 8, 8, 1), "std": (192, 8, 8, 1), "label": (192,), "position": (192,)}
    assert {name: array.shape for name, array in batch.items()} == shapes
    assert [batch[name].dtype for name in shapes] == [np.float16, np.float16, np.int32, np.int64]
    index = row_numbers(dataset, batch)
    mirrored = draws.draw_mirrored(0, batch["position"]) & horizontal_flip
    for name in ("mean", "std"):
        views = both_views(dataset, name)
        np.testing.assert_array_equal(batch[name], views[mirrored.astype(int), index])
    np.testing.assert_array_equal(batch["label"], [by_tfds(dataset, "train")[i]["label"] for i in index.tolist()])
    assert len({*zip(index.tolist(), mirrored.tolist(), strict=True)}) > NUM_TRAIN or not horizontal_flip


def test_half_of_the_views_are_mirrored_and_each_record_in_some_epochs(dataset):
    num_epochs = 40
    batch = joined(batches(dataset, num_epochs, batch_size=NUM_TRAIN))
    index = row_numbers(dataset, batch)
    # A symmetric image is its own mirror.
    plain, mirror = (view.reshape(NUM_TRAIN, -1) for view in both_views(dataset, "mean"))
    asymmetric = (plain != mirror).any(axis=1)
    assert asymmetric.sum() > 30
    mirrored = (batch["mean"].reshape(len(index), -1) != plain[index]).any(axis=1)
    assert abs(mirrored[asymmetric[index]].mean() - 0.5) < 0.05  # four standard deviations
    times = np.bincount(index[mirrored], minlength=NUM_TRAIN)[asymmetric]
    assert times.min() > 0 and times.max() < num_epochs


def test_flips_do_not_change_the_order(dataset):
    plain, flipped = (joined(batches(dataset, 12, horizontal_flip=flip)) for flip in (False, True))
    np.testing.assert_array_equal(row_numbers(dataset, plain), row_numbers(dataset, flipped))


def test_every_epoch_holds_every_record_once_in_an_order_of_its_own(dataset):
    stream = row_numbers(dataset, joined(batches(dataset, 19)))  # four epochs and a bit
    epochs = [stream[start : start + NUM_TRAIN].tolist() for start in range(0, 4 * NUM_TRAIN, NUM_TRAIN)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(NUM_TRAIN))
    assert len({tuple(epoch) for epoch in [*epochs, range(NUM_TRAIN)]}) == 5


def test_the_seed_decides_the_order(dataset):
    first, again, other = (joined(batches(dataset, 4, seed=seed)) for seed in (5, 5, 6))
    assert_equal(first, again)
    assert (row_numbers(dataset, first) != row_numbers(dataset, other)).any()


@pytest.mark.parametrize("process_count", [2, 4, 8])
def test_processes_share_each_batch_in_blocks(dataset, process_count):
    whole = batches(dataset, 12)
    parts = [batches(dataset, 12, process_index=index, process_count=process_count) for index in range(process_count)]
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(batch["position"], np.arange(step * 8, step * 8 + 8))
        assert_equal(joined([part[step] for part in parts]), batch)


def test_restart_continues_the_stream_under_any_number_of_processes(dataset):
    whole = batches(dataset, 14)
    for start in (1, 4, 5, 9):  # the first epoch ends inside batch 4, the second inside batch 9
        for batch, expected in zip(batches(dataset, 14 - start, start_step=start), whole[start:], strict=True):
            assert_equal(batch, expected)
    # One process, then two, then four: flips and order stay those of a run that was never stopped.
    for start, process_count in ((4, 2), (9, 4)):
        parts = [
            batches(dataset, 5, start_step=start, process_index=index, process_count=process_count)
            for index in range(process_count)
        ]
        for step in range(5):
            assert_equal(joined([part[step] for part in parts]), whole[start + step])


@pytest.mark.parametrize("options", [{"read_threads": 0, "prefetch": 1}, {"read_threads": 16, "prefetch": 4}])
def test_threads_do_not_change_the_order(dataset, options):
    for batch, expected in zip(batches(dataset, 20, **options), batches(dataset, 20), strict=True):
        assert_equal(batch, expected)


def test_in_memory_batches_equal_streamed_ones(dataset, monkeypatch):
    monkeypatch.setattr(reader, "READ_CHUNK", 10)
    for start, index, count in ((0, 0, 1), (3, 1, 2)):
        options = {"start_step": start, "process_index": index, "process_count": count}
        streamed = batches(dataset, 12, **options)
        for batch, expected in zip(batches(dataset, 12, in_memory=True, **options), streamed, strict=True):
            assert_equal(batch, expected)


def test_batches_may_be_single_records_or_larger_than_the_split(dataset):
    single = joined(batches(dataset, 80, batch_size=1))
    assert_equal(joined(batches(dataset, 10)), single)
    assert_equal(batches(dataset, 1, batch_size=80)[0], single)


def test_late_steps_are_as_good_as_early_ones(dataset):
    step = 10**9
    batch = batches(dataset, 1, start_step=step, batch_size=NUM_TRAIN)[0]
    assert batch["position"][0] == step * NUM_TRAIN
    assert sorted(row_numbers(dataset, batch)) == list(range(NUM_TRAIN))


def test_heldout_batches_start_at_the_first_record_and_wrap(dataset):
    options = {"batch_size": 4, "num_batches": 5}
    whole = list(reader.heldout_batches(dataset, **options, process_index=0, process_count=1))
    assert len(whole) == 5
    assert set(whole[0]) == {"mean", "std", "label", "position"}
    stored = list(by_tfds(dataset, "heldout"))
    for name in ("mean", "std", "label"):
        expected = [stored[index % NUM_HELDOUT][name] for index in range(20)]
        np.testing.assert_array_equal(joined(whole)[name], expected)
    parts = [
        list(reader.heldout_batches(dataset, **options, process_index=index, process_count=2)) for index in range(2)
    ]
    for step in range(5):
        assert_equal(joined([part[step] for part in parts]), whole[step])


@pytest.mark.parametrize("batch_size, process_count", [(8, 3), (1, 2), (0, 1), (-4, 2)])
def test_a_batch_must_divide_among_the_processes(dataset, batch_size, process_count):
    with pytest.raises(UserError, match=f"batch_size={batch_size}: .*{process_count} process"):
        batches(dataset, 1, batch_size=batch_size, process_count=process_count)
    with pytest.raises(UserError, match=f"batch_size={batch_size}"):
        options = {"batch_size": batch_size, "num_batches": 1, "process_index": 0, "process_count": process_count}
        next(reader.heldout_batches(dataset, **options))


def test_bad_input_is_refused(dataset, tmp_path):
    with pytest.raises(UserError, match="config.seed=-1"):
        batches(dataset, 1, seed=-1)
    with pytest.raises(UserError, match="no data set at"):
        reader.open_dataset(tmp_path / "nowhere")


def test_empty_shards_are_passed_over(dataset):
    split, empty = dataset.metadata.splits["train"], schema.Shard("never opened", 0, 0, "")
    shards = (empty, split.shards[0], empty, empty, *split.shards[1:], empty)
    records = reader.StoredRecords(dataset.path, schema.Split(split.records, shards), dataset.metadata)
    indices = np.arange(NUM_TRAIN)
    assert_equal(records.read(indices), dataset.records("train").read(indices))


def flip_bit(content):
    return content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(
    "damage",
    [flip_bit, lambda content: bytes(len(content)), lambda content: content[: len(content) // 2]],
    ids=["a bit flipped", "zeros", "cut short while running"],
)
def test_a_damaged_shard_stops_the_run_in_one_line(dataset, tmp_path, damage, in_memory):
    shutil.copytree(dataset.path, tmp_path / "copy")
    copy = reader.open_dataset(tmp_path / "copy")
    shard = tmp_path / "copy" / dataset.metadata.splits["train"].shards[1].file
    shard.write_bytes(damage(shard.read_bytes()))
    for _ in range(2):
        with pytest.raises(UserError) as failure:
            batches(copy, NUM_TRAIN, in_memory=in_memory)
        assert re.fullmatch(rf"{shard}: record \d+ cannot be read, copy .* or prepare .*: .*", str(failure.value))
        shard.unlink(missing_ok=True)


@pytest.mark.parametrize("count, message", [(1, "not a tf.train.Example"), (2, "holds 2 records, not 1")])
def test_a_sound_shard_of_other_content_is_refused(dataset, tmp_path, count, message):
    writer = ArrayRecordWriter(str(tmp_path / "shard"), "group_size:1")
    for _ in range(count):
        writer.write(b"something else")
    writer.close()
    split = schema.Split(1, (schema.Shard("shard", 1, 0, ""),))
    records = reader.StoredRecords(tmp_path, split, dataset.metadata)
    with pytest.raises(UserError, match=f"{tmp_path / 'shard'}: record 0 cannot be read, .*: .*{message}"):
        records.read(np.array([0]))


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("label", [10, 11, 127, 128, 70_000])
def test_a_label_that_the_data_set_does_not_have_stops_the_run_in_one_line(dataset, tmp_path, label, in_memory):
    """10 of 10 classes would be the model's null class, and train as that without a word."""
    shutil.copytree(dataset.path, tmp_path / "copy")
    features = schema.make_features(dataset.metadata.shape, dataset.metadata.has_mirror)
    shard = dataset.metadata.splits["train"].shards[1]
    writer = ArrayRecordWriter(str(tmp_path / "copy" / shard.file), "group_size:1")
    stored = dataset.stored("train").examples(np.arange(NUM_TRAIN))
    start = dataset.metadata.splits["train"].shards[0].records
    for place, record in enumerate(stored[start : start + shard.records]):
        writer.write(schema.encode_record(features, record | {"label": label} if place == 1 else record))
    writer.close()
    copy = reader.Dataset(tmp_path / "copy", dataset.metadata)
    with pytest.raises(UserError) as failure:
        batches(copy, NUM_TRAIN, in_memory=in_memory)
    where = f"{tmp_path / 'copy' / shard.file}: record 1 has label {label}"
    assert str(failure.value) == f"{where}, and the data set classes 0 to 9: prepare it again"
    with pytest.raises(UserError, match=f"label {label} is out of range: the data set has classes 0 to 9"):
        inspect(copy, NUM_TRAIN)


def test_synthetic_data_looks_like_a_prepared_data_set():
    first, again = (synthetic.make_synthetic((4, 6, 2), 5) for _ in range(2))
    assert first.metadata.fingerprint == "synthetic-4x6x2-5"
    assert first.metadata.shape == (4, 6, 2) and first.metadata.num_classes == 5
    whole = batches(first, 6)
    for batch, expected in zip(batches(again, 5, start_step=1, in_memory=True), whole[1:], strict=True):
        assert_equal(batch, expected)
    for batch, plain in zip(whole, batches(first, 6, horizontal_flip=False), strict=True):
        mirrored = draws.draw_mirrored(0, batch["position"])[:, None, None, None]
        np.testing.assert_array_equal(batch["mean"], np.where(mirrored, plain["mean"][:, :, ::-1], plain["mean"]))
    batch = joined(whole)
    assert batch["mean"].shape == batch["std"].shape == (48, 4, 6, 2) and batch["mean"].dtype == np.float16
    assert batch["label"].dtype == np.int32 and set(batch["label"].tolist()) == set(range(5))
    assert np.isclose(batch["mean"].std(dtype=np.float32), 1, atol=0.1)
    heldout = next(reader.heldout_batches(first, batch_size=4, num_batches=1, process_index=1, process_count=2))
    assert set(heldout) == set(batch) and len(heldout["label"]) == 2
