"""The files of a data set are data: nothing that they name is imported, and no file elsewhere is read."""

import contextlib
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds

from terdit_jax.data import builder, reader
from terdit_jax.data.codec import PixelCodec
from terdit_jax.data.inspection import inspect
from terdit_jax.data.tfds_source import make_tfds_source
from terdit_jax.errors import UserError
from tests.commands import no_flags
from tests.forged_data import edited, sign_metadata
from tests.test_builder import make_source
from tests.test_tfds_source import make_examples, refusal, write_data_set

MODULE = "a_module_of_the_attacker"
CLASS = f"{MODULE}.Evil"
CORE = "tensorflow_datasets.core.features"


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Whether the module in the current folder, which tells when it is imported, has been."""
    sentinel = tmp_path / "code ran"
    folder = tmp_path / "current"
    folder.mkdir()
    code = f"open({str(sentinel)!r}, 'w').close()\nimport tensorflow_datasets as tfds\n"
    (folder / f"{MODULE}.py").write_text(code + "class Evil(tfds.features.Text): pass\n")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    yield sentinel.exists
    sys.modules.pop(MODULE, None)
    tfds.features.FeatureConnector._registered_features.pop(CLASS, None)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "digits"
    builder.build(make_source(20, 20), path, codec=PixelCodec(), shard_bytes=2000)
    return path


@pytest.fixture
def dataset(digits, tmp_path):
    shutil.copytree(digits, tmp_path / "digits")
    return tmp_path / "digits"


def evil_leaf():
    return {"pythonClassName": CLASS, "jsonFeature": {"json": "{}"}}


def features_dict(fields):
    return {"pythonClassName": f"{CORE}.features_dict.FeaturesDict", "featuresDict": {"features": fields}}


def in_sequence(leaf):
    sequence = {"pythonClassName": f"{CORE}.sequence_feature.Sequence", "sequence": {"feature": leaf, "length": "-1"}}
    return features_dict({"x": sequence})


def legacy(content):
    return {"type": f"{CORE}.features_dict.FeaturesDict", "content": content}


FEATURES = {
    "at the top": evil_leaf(),
    "in a dict": features_dict({"x": evil_leaf()}),
    "two dicts deep": features_dict({"x": features_dict({"y": evil_leaf()})}),
    "in a sequence": in_sequence(evil_leaf()),
    "in the older format": {"type": CLASS, "content": {}},
    "in the older format, in a dict": legacy({"x": {"type": CLASS, "content": {}}}),
    "as a proto in the older format": legacy({"features": {"x": evil_leaf()}})
    | {"proto_cls": "tensorflow_datasets.FeaturesDict"},
}


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_a_data_set_of_tfds_runs_no_code(tmp_path, ran, features):
    folder = write_data_set(tmp_path, {"train": make_examples(4)})
    (folder / "features.json").write_text(json.dumps(features))
    assert CLASS in refusal("animals", tmp_path) and not ran()


def test_neither_does_the_other_file_that_names_features(tmp_path, ran):
    folder = write_data_set(tmp_path, {"train": make_examples(4)})
    with edited(folder / "dataset_info.json") as info:
        info |= {"features": evil_leaf(), "moduleName": MODULE}
    assert CLASS in refusal("animals", tmp_path) and not ran()


def test_without_the_guard_the_code_would_run(tmp_path, ran, monkeypatch):
    monkeypatch.setattr("terdit_jax.data.tfds_source._own_features_only", contextlib.nullcontext)
    folder = write_data_set(tmp_path, {"train": make_examples(4)})
    (folder / "features.json").write_text(json.dumps(evil_leaf()))
    refusal("animals", tmp_path)
    assert ran()


def test_tfds_is_left_as_it_was(tmp_path, ran):
    folder = write_data_set(tmp_path, {"train": make_examples(20)})
    make_tfds_source("animals", data_dir=tmp_path)
    assert tfds.builder_from_directory(folder).info.features["label"].num_classes == 3
    assert tfds.features.FeatureConnector.cls_from_name(CLASS).__name__ == "Evil" and ran()


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_a_prepared_data_set_is_looked_at_without_what_its_files_say_to_tfds(dataset, ran, features):
    (dataset / "features.json").write_text(json.dumps(features))
    (dataset / "dataset_info.json").write_text("not even JSON")
    opened = reader.open_dataset(dataset)
    assert len(inspect(opened, 5).labels) == 5
    assert len(opened.records("train", in_memory=True)) == 20
    assert not ran()


def test_the_command_runs_no_code_either(dataset, ran, monkeypatch, tmp_path, capsys):
    (dataset / "features.json").write_text(json.dumps(evil_leaf()))
    with no_flags():
        from terdit_jax import prepare
    monkeypatch.setattr(prepare, "keep_programs", lambda place, name: None)
    given = {"_OUTPUT": str(tmp_path / "sheet.png"), "_VAE": None, "_NUM_SAMPLES": 48, "_CACHE": None}
    for name, value in given.items():
        monkeypatch.setattr(prepare, name, SimpleNamespace(value=value))
    prepare._inspect(str(dataset))
    assert not ran() and (tmp_path / "sheet.png").exists()
    assert "20 training" in capsys.readouterr().out


@pytest.mark.parametrize(
    "template", ["/etc/{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}", "../{SPLIT}-{SHARD_INDEX}", "a/../../b"]
)
def test_a_data_set_of_tfds_reads_no_file_elsewhere(tmp_path, template):
    folder = write_data_set(tmp_path, {"train": make_examples(4)})
    with edited(folder / "dataset_info.json") as info:
        info["splits"][0]["filepathTemplate"] = template
    text = refusal("animals", tmp_path)
    assert "which is not in" in text or "no data set that TFDS can read" in text


def test_a_feature_that_names_a_file_elsewhere_is_refused(tmp_path):
    folder = write_data_set(tmp_path, {"train": make_examples(4)})
    with edited(folder / "features.json") as features:
        fields = features["featuresDict"]["features"]
        fields["../../label"] = fields.pop("label")
    assert "names a file elsewhere" in refusal("animals", tmp_path)


@pytest.mark.parametrize("lengths", [["9223372036854775807", "1"], ["-5", "9"], ["5"], ["5", "1000000000"], ["0", "0"]])
def test_numbers_of_records_are_not_believed(tmp_path, lengths):
    folder = write_data_set(tmp_path, {"train": make_examples(10)})
    with edited(folder / "dataset_info.json") as info:
        info["splits"][0]["shardLengths"] = lengths
    refusal("animals", tmp_path)


@pytest.mark.parametrize("count", ["9223372036854775807", "-1", "0"])
def test_numbers_of_classes_are_not_believed(tmp_path, count):
    folder = write_data_set(tmp_path, {"train": make_examples(4)})
    with edited(folder / "features.json") as features:
        features["featuresDict"]["features"]["label"]["classLabel"]["numClasses"] = count
    (folder / "label.labels.txt").unlink()
    refusal("animals", tmp_path)


@contextlib.contextmanager
def signed(dataset):
    """The content of latents.json, to be changed, with the first shard of its training split; then signed again."""
    with edited(dataset / "latents.json") as raw:
        yield raw, raw["splits"]["train"]["shards"][0]
        with contextlib.suppress(TypeError, KeyError, AttributeError, ValueError):  # too wrong to sign
            sign_metadata(raw)


def refused(dataset):
    with pytest.raises(UserError) as caught:
        reader.open_dataset(dataset)
    text = str(caught.value)
    assert text.isprintable() and len(text) < 700
    return text


@pytest.mark.parametrize("name", ["/{outside}/", "../outside/", "./", "outside/../", "../digits/"])
def test_a_shard_lies_in_the_data_sets_own_folder(dataset, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    with signed(dataset) as (_, shard):
        shutil.copy(dataset / shard["file"], outside)
        shard["file"] = name.format(outside=str(outside).lstrip("/")) + shard["file"]
    assert "latents.json is damaged: prepare" in refused(dataset)


@pytest.mark.parametrize(
    "file", ["", ".", "..", "\0", "latents.json", "x" * 300, "latents-train.array_record-00000-of-00001\n", 3, None]
)
def test_other_names_of_shards_are_refused(dataset, file):
    with signed(dataset) as (_, shard):
        shard["file"] = file
    assert "is damaged" in refused(dataset)


def test_a_shard_may_be_a_link(dataset, tmp_path):
    """Who makes links decides where they lead: a large data set is often put together of them."""
    shard = dataset / json.loads((dataset / "latents.json").read_text())["splits"]["train"]["shards"][0]["file"]
    shard.rename(tmp_path / "kept elsewhere")
    shard.symlink_to(tmp_path / "kept elsewhere")
    reader.open_dataset(dataset).records("train").read(np.arange(3))


ODD = [None, True, "1", "nan", [], {}, -1, 0, -0.5, 1e300, 1 << 70, float("nan"), float("inf")]


TYPES = [None, 1, "yes", [], {}, 0.0]
SHAPES = [[8, 8], [8, 8, -1], [True, 8, 8], [0, 8, 1], [1 << 40, 8, 1], [1 << 14] * 3, [8.0, 8, 1]]
FIELDS = {
    **dict.fromkeys(("latent_scale", "num_classes", "schema_version", "channel_mean", "class_names"), ODD),
    **dict.fromkeys(("has_mirror", "source", "splits"), TYPES),
    "codec": [None, 1, [], {}, 0.0],
    "shape": ODD + SHAPES,
}


@pytest.mark.parametrize("field, value", [(field, value) for field in FIELDS for value in FIELDS[field]], ids=repr)
def test_odd_values_are_refused(dataset, field, value):
    with signed(dataset) as (raw, _):
        raw[field] = value
    refused(dataset)


@pytest.mark.parametrize("value", [*TYPES, "0" * 64], ids=repr)
def test_odd_fingerprints_are_refused(dataset, value):
    with edited(dataset / "latents.json") as raw:
        raw["fingerprint"] = value
    refused(dataset)


@pytest.mark.parametrize("value", [None, True, "5", -5, 1 << 70, 10**9, 2.5, [5]], ids=repr)
@pytest.mark.parametrize("field", ["records", "bytes", "sha256"])
def test_odd_shards_are_refused(dataset, field, value):
    with signed(dataset) as (raw, shard):
        shard[field] = value
        if field == "records" and isinstance(value, int):
            raw["splits"]["train"]["records"] = sum(shard["records"] for shard in raw["splits"]["train"]["shards"])
    refused(dataset)


@pytest.mark.parametrize(
    "text",
    ['{"schema_version": 1, "schema_version": 1}', "[" * 100_000, '"\\ud800"', "\xff", "NaN", "1" * 5000],
    ids=range(6),
)
def test_odd_json_is_refused(dataset, text):
    (dataset / "latents.json").write_bytes(text.encode("latin-1"))
    assert "is damaged" in refused(dataset)
