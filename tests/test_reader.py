import dataclasses
import itertools
import shutil

import numpy as np
import pytest

from terdit_jax.data import builder, reader, sources, synthetic
from terdit_jax.data.codec import PixelCodec
from terdit_jax.errors import UserError

NUM_TRAIN, NUM_HELDOUT = 37, 11


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "mirror"])
def dataset(request, tmp_path_factory):
    source = sources.make_digits_source()
    splits = {"train": source.splits["train"][:NUM_TRAIN], "heldout": source.splits["heldout"][:NUM_HELDOUT]}
    path = tmp_path_factory.mktemp("data") / "digits"
    builder.build(
        dataclasses.replace(source, splits=splits), path, codec=PixelCodec(), mirror=request.param, shard_bytes=2000
    )
    return reader.open_dataset(path)


def batches(dataset, num_steps, **changes):
    options = {
        "seed": 0,
        "batch_size": 8,
        "start_step": 0,
        "process_index": 0,
        "process_count": 1,
        "in_memory": False,
        "read_threads": 2,
        "prefetch": 3,
    }
    return list(itertools.islice(reader.make_batches(dataset, **(options | changes)), num_steps))


def joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        np.testing.assert_array_equal(left[name], right[name])


def row_numbers(dataset, batch):
    """Which record of the training split each row is; all digits in the split differ."""
    stored = dataset.records("train").read(np.arange(NUM_TRAIN))["mean"].reshape(NUM_TRAIN, -1)
    matches = (batch["mean"].reshape(len(batch["mean"]), 1, -1) == stored).all(axis=-1)
    np.testing.assert_array_equal(matches.sum(axis=1), 1)
    return matches.argmax(axis=1)


def test_batches_hold_the_record_fields(dataset):
    batch = batches(dataset, 1)[0]
    arrays = {"mean", "std"} | ({"mean_mirror", "std_mirror"} if dataset.metadata.has_mirror else set())
    assert set(batch) == arrays | {"label", "position"}
    for name in arrays:
        assert batch[name].shape == (8, 8, 8, 1) and batch[name].dtype == np.float16
    assert batch["label"].shape == (8,) and batch["label"].dtype == np.int32
    assert batch["position"].dtype == np.int64
    if dataset.metadata.has_mirror:
        np.testing.assert_array_equal(batch["mean_mirror"], batch["mean"][:, :, ::-1])


def test_rows_are_whole_records(dataset):
    batch = joined(batches(dataset, 6))
    items = list(dataset.data_source("train"))
    for row, index in enumerate(row_numbers(dataset, batch)):
        assert batch["label"][row] == items[index]["label"]
        np.testing.assert_array_equal(batch["mean"][row], items[index]["mean"])


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
    parts = [batches(dataset, 5, start_step=4, process_index=index, process_count=2) for index in range(2)]
    for step in range(5):
        assert_equal(joined([part[step] for part in parts]), whole[4 + step])


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
    stored = [record["mean"] for record in dataset.data_source("heldout")]
    np.testing.assert_array_equal(joined(whole)["mean"], [stored[index % NUM_HELDOUT] for index in range(20)])
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
        next(
            reader.heldout_batches(
                dataset, batch_size=batch_size, num_batches=1, process_index=0, process_count=process_count
            )
        )


def test_bad_input_is_refused(dataset, tmp_path):
    with pytest.raises(UserError, match="config.seed=-1"):
        batches(dataset, 1, seed=-1)
    with pytest.raises(UserError, match="no data set at"):
        reader.open_dataset(tmp_path / "nowhere")
    split = dataclasses.replace(dataset.metadata.splits["train"], records=3)
    metadata = dataclasses.replace(dataset.metadata, splits=dataset.metadata.splits | {"train": split})
    with pytest.raises(UserError, match="disagree"):
        reader.Dataset(dataset.path, metadata).records("train")


def test_a_damaged_shard_stops_the_run_in_one_line(dataset, tmp_path):
    shutil.copytree(dataset.path, tmp_path / "damaged")
    shard = tmp_path / "damaged" / dataset.metadata.splits["train"].shards[0].file
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="damaged cannot be read"):
        batches(reader.open_dataset(tmp_path / "damaged"), NUM_TRAIN)


def test_synthetic_data_looks_like_a_prepared_data_set():
    first, again = (synthetic.make_synthetic((4, 6, 2), 5) for _ in range(2))
    assert first.metadata.fingerprint == "synthetic-4x6x2-5"
    assert first.metadata.shape == (4, 6, 2) and first.metadata.num_classes == 5
    whole = batches(first, 6)
    for batch, expected in zip(batches(again, 5, start_step=1, in_memory=True), whole[1:], strict=True):
        assert_equal(batch, expected)
    batch = joined(whole)
    assert batch["mean"].shape == batch["std"].shape == (48, 4, 6, 2) and batch["mean"].dtype == np.float16
    assert batch["label"].dtype == np.int32 and set(batch["label"].tolist()) == set(range(5))
    assert np.isclose(batch["mean"].std(dtype=np.float32), 1, atol=0.1)
    heldout = next(reader.heldout_batches(first, batch_size=4, num_batches=1, process_index=1, process_count=2))
    assert set(heldout) == set(batch) and len(heldout["label"]) == 2
