import dataclasses
import hashlib

import numpy as np
import pytest

from terdit_jax.data import builder, schema
from terdit_jax.data.codec import PixelCodec
from terdit_jax.errors import UserError
from tests.forged_data import edited
from tests.test_builder import make_source

SHAPE = (4, 6, 3)


def random_record(seed, has_mirror):
    generator = np.random.default_rng(seed)
    arrays = {name: generator.normal(size=SHAPE).astype(np.float16) for name in schema.array_names(has_mirror)}
    return {**arrays, "label": seed + 700, "source_id": f"klass/pïcture {seed}.png"}


@pytest.fixture
def dataset(tmp_path):
    builder.build(make_source(20, 20), tmp_path / "digits", codec=PixelCodec(), shard_bytes=2000)
    return tmp_path / "digits"


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("has_mirror", [False, True])
def test_tfds_reads_back_what_a_record_holds(has_mirror):
    features = schema.make_features(SHAPE, has_mirror)
    records = [random_record(seed, has_mirror) for seed in range(3)]
    serialized = [schema.encode_record(features, record) for record in records]
    for data, record in zip(serialized, records, strict=True):
        by_tfds = features.deserialize_example_np(data)
        assert by_tfds.keys() == record.keys()
        assert by_tfds["source_id"].decode() == record["source_id"]
        assert by_tfds["label"] == record["label"]
        for name in schema.array_names(has_mirror):
            assert by_tfds[name].dtype == np.float16
            np.testing.assert_array_equal(by_tfds[name], record[name])


def test_record_fields_are_written_in_a_fixed_order():
    serialized = schema.encode_record(schema.make_features(SHAPE, False), random_record(0, False))
    positions = [serialized.index(name) for name in (b"label", b"mean", b"source_id", b"std")]
    assert positions == sorted(positions)


def test_metadata_round_trips(dataset):
    metadata = schema.read_metadata(dataset)
    assert schema.encode_metadata(metadata) == (dataset / "latents.json").read_bytes()
    assert schema.verify(dataset) == metadata


def test_fingerprint_covers_every_field_that_determines_training(dataset):
    metadata = schema.read_metadata(dataset)
    assert schema.compute_fingerprint(metadata) == metadata.fingerprint
    changes = {
        "schema_version": 2, "codec": "other", "latent_scale": 0.5, "shape": (8, 8, 2), "num_classes": 11,
        "has_mirror": True,
    }  # fmt: skip
    for name, value in changes.items():
        changed = dataclasses.replace(metadata, **{name: value})
        assert schema.compute_fingerprint(changed) != metadata.fingerprint, name


def test_fingerprint_changes_with_one_byte_of_one_shard(dataset):
    metadata = schema.read_metadata(dataset)
    shard = metadata.splits["train"].shards[1]
    flip_byte(dataset / shard.file)
    changed = dataclasses.replace(shard, sha256=hashlib.sha256((dataset / shard.file).read_bytes()).hexdigest())
    split = metadata.splits["train"]
    split = dataclasses.replace(split, shards=(split.shards[0], changed, *split.shards[2:]))
    splits = {**metadata.splits, "train": split}
    assert schema.compute_fingerprint(dataclasses.replace(metadata, splits=splits)) != metadata.fingerprint


def test_verify_finds_a_flipped_byte_that_opening_does_not_look_for(dataset):
    shard = schema.read_metadata(dataset).splits["heldout"].shards[0]
    flip_byte(dataset / shard.file)
    schema.read_metadata(dataset)
    with pytest.raises(UserError, match=f"{shard.file} has changed"):
        schema.verify(dataset)


def test_missing_data_set_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"no data set at .*nowhere.*terdit_jax\.prepare --source=digits --output=.*no"):
        schema.read_metadata(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no latents\.json.*terdit_jax\.prepare"):
        schema.read_metadata(tmp_path)
    with pytest.raises(UserError, match=r"no data set is named.*terdit_jax\.prepare"):
        schema.read_metadata("")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"schema_version": 1}', "\x00"])
def test_damaged_metadata(dataset, text):
    (dataset / "latents.json").write_text(text)
    with pytest.raises(UserError, match=r"latents\.json is damaged"):
        schema.read_metadata(dataset)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"schema_version": 99}, "schema version 99"),
        ({"latent_scale": 0.18215}, "does not match its own fingerprint"),
        ({"shape": [8, 8]}, "is damaged"),
        ({"shape": None}, "is damaged"),
        ({"class_names": ["a"]}, "is damaged"),
        ({"splits": {"train": {"records": 1, "shards": []}}}, "is damaged"),
        ({"splits": []}, "is damaged"),
        ({"surprise": 1}, "is damaged"),
    ],
)
def test_metadata_that_cannot_be_right(dataset, change, message):
    with edited(dataset / "latents.json") as raw:
        raw |= change
    with pytest.raises(UserError, match=message):
        schema.read_metadata(dataset)


def test_a_split_holds_what_its_shards_hold(dataset):
    with edited(dataset / "latents.json") as raw:
        raw["splits"]["train"]["records"] += 1
    with pytest.raises(UserError, match="is damaged: .*the shards of train do not hold 21 records"):
        schema.read_metadata(dataset)


def test_missing_and_short_files(dataset):
    shard = schema.read_metadata(dataset).splits["train"].shards[-1]
    content = (dataset / shard.file).read_bytes()
    (dataset / shard.file).write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"{shard.file} has {shard.bytes - 1} bytes instead of {shard.bytes}"):
        schema.read_metadata(dataset)
    (dataset / shard.file).unlink()
    with pytest.raises(UserError, match=f"{shard.file} is missing"):
        schema.read_metadata(dataset)
    (dataset / shard.file).write_bytes(content)
    (dataset / "dataset_info.json").unlink()
    with pytest.raises(UserError, match=r"dataset_info\.json is missing"):
        schema.read_metadata(dataset)
