"""Views are what TFDS reads, and nothing that is not a record is taken for one."""

import itertools

import numpy as np
import pytest
from tensorflow_datasets.proto import tf_example_pb2

from terdit_jax.data import schema
from terdit_jax.data.schema import decode_view

SHAPE = (2, 3, 4)
LABELS = (0, 1, 127, 128, 999, 16_383, 16_384, 2_097_151)
NAMES = ("", "a", "n01440764/n01440764_10026.JPEG", "pïcture", "x" * 100, "x" * 127, "x" * 128, "x" * 20_000)


def make_record(has_mirror, label=7, source_id="a", seed=0):
    generator = np.random.default_rng(seed)
    arrays = {name: generator.normal(size=SHAPE).astype(np.float16) for name in schema.array_names(has_mirror)}
    return {**arrays, "label": label, "source_id": source_id}


def as_array(content):
    return np.frombuffer(content, "<f2").reshape(SHAPE)


def parse_by_protobuf(data, has_mirror, mirrored):
    """(mean, std, label) as protobuf reads them, None where the bytes are no record."""
    try:
        fields = tf_example_pb2.Example.FromString(data).features.feature
        arrays = {name: list(fields[name].bytes_list.value) for name in schema.array_names(has_mirror)}
        (label,) = fields["label"].int64_list.value
    except Exception:
        return None
    if any([len(value) for value in values] != [2 * np.prod(SHAPE)] for values in arrays.values()):
        return None
    suffix = "_mirror" if mirrored else ""
    return (arrays[f"mean{suffix}"][0], arrays[f"std{suffix}"][0], label) if 0 <= label < 2**31 else None


def assert_agrees_with_protobuf(data, has_mirror, mirrored):
    expected = parse_by_protobuf(data, has_mirror, mirrored)
    if expected is None:
        with pytest.raises(ValueError):
            decode_view(data, SHAPE, has_mirror, mirrored)
    else:
        view = decode_view(data, SHAPE, has_mirror, mirrored)
        assert (bytes(view.mean), bytes(view.std), view.label) == expected


@pytest.mark.parametrize("has_mirror", [False, True])
def test_both_views_are_what_tfds_reads(has_mirror):
    features = schema.make_features(SHAPE, has_mirror)
    for seed, (label, source_id) in enumerate(itertools.product(LABELS, NAMES)):
        data = schema.encode_record(features, make_record(has_mirror, label, source_id, seed))
        record = features.deserialize_example_np(data)
        for suffix, mirrored in (("", False), ("_mirror", True))[: 1 + has_mirror]:
            view = decode_view(data, SHAPE, has_mirror, mirrored)
            assert view.label == record["label"]
            np.testing.assert_array_equal(as_array(view.mean), record[f"mean{suffix}"])
            np.testing.assert_array_equal(as_array(view.std), record[f"std{suffix}"])


@pytest.mark.parametrize("has_mirror", [False, True])
def test_a_changed_byte_is_read_as_protobuf_reads_it_or_refused(has_mirror):
    features = schema.make_features(SHAPE, has_mirror)
    data = schema.encode_record(features, make_record(has_mirror, label=300))
    refused = 0
    for place, change in itertools.product(range(len(data)), (1, 2, 0x80, 0xFF)):
        changed = data[:place] + bytes([data[place] ^ change]) + data[place + 1 :]
        for mirrored in (False, True)[: 1 + has_mirror]:
            assert_agrees_with_protobuf(changed, has_mirror, mirrored)
        refused += parse_by_protobuf(changed, has_mirror, False) is None
    assert refused > 200


def test_cut_lengthened_and_empty_bytes():
    features = schema.make_features(SHAPE, True)
    data = schema.encode_record(features, make_record(True))
    for size in range(len(data)):
        assert_agrees_with_protobuf(data[:size], True, True)
    for more in (b"\0", b"\n", data, b"\x1a\x00"):
        assert_agrees_with_protobuf(data + more, True, False)


def test_records_in_another_order_or_with_more_fields_are_read_as_well():
    record = make_record(True, label=3_000_000)
    entries = []
    for name in ("std", "source_id", "mean_mirror", "label", "extra", "mean", "std_mirror"):
        example = tf_example_pb2.Example()
        value = record.get(name, "more")
        if name == "label":
            example.features.feature[name].int64_list.value.append(value)
        else:
            content = value.encode() if isinstance(value, str) else value.tobytes()
            example.features.feature[name].bytes_list.value.append(content)
        entries.append(example.SerializeToString())
    data = b"".join(entries)  # protobuf merges messages that follow each other
    for suffix, mirrored in (("", False), ("_mirror", True)):
        view = decode_view(data, SHAPE, True, mirrored)
        np.testing.assert_array_equal(as_array(view.mean), record[f"mean{suffix}"])
        np.testing.assert_array_equal(as_array(view.std), record[f"std{suffix}"])
        assert view.label == 3_000_000


def test_what_is_wrong_with_a_record_is_said():
    def encode(record, shape=SHAPE, has_mirror=True):
        return schema.encode_record(schema.make_features(shape, has_mirror), record)

    with pytest.raises(ValueError, match="not a tf.train.Example"):
        decode_view(b"\xff", SHAPE, True, False)
    with pytest.raises(ValueError, match="its mean is not an array of 48 bytes"):
        decode_view(b"", SHAPE, True, False)
    with pytest.raises(ValueError, match="its mean_mirror is not an array of 48 bytes"):
        decode_view(encode(make_record(False), has_mirror=False), SHAPE, True, False)
    for label in (-1, 2**31):
        with pytest.raises(ValueError, match="its label is not the number of a class"):
            decode_view(encode(make_record(True, label=label)), SHAPE, True, False)
