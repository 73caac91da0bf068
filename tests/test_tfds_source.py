import io
import sys

from array_record.python.array_record_module import ArrayRecordWriter
import numpy as np
import pytest
import tensorflow_datasets as tfds

from terdit_jax.data.crop import decode_crop
from terdit_jax.data.image_file import ImageError
from terdit_jax.data.sources import UNLABELLED
from terdit_jax.data.tfds_source import make_tfds_source
from terdit_jax.errors import UserError
from tests.image_files import all_items, assert_threads_load_what_one_does, image_bytes

CLASSES = ["cat", "dog", "ant"]
FEATURES = {
    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
    "label": tfds.features.ClassLabel(names=CLASSES),
    "file_name": tfds.features.Text(),
}


def make_examples(count, first_seed=0):
    return [
        {"image": image_bytes(first_seed + index), "label": (index * 7 + 1) % 3, "file_name": f"{index}.jpg"}
        for index in range(count)
    ]


def write_data_set(root, splits, name="animals", features=None, num_shards=2, supervised_keys=None):
    """A data set as TFDS leaves it in `root`: ArrayRecord shards and metadata, no code. Gives its folder."""
    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(features or FEATURES)
    infos = []
    for split, examples in splits.items():
        lengths = []
        for shard in range(num_shards):
            part = examples[shard * len(examples) // num_shards : (shard + 1) * len(examples) // num_shards]
            path = folder / f"{name}-{split}.array_record-{shard:05d}-of-{num_shards:05d}"
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for example in part:
                opened = {key: io.BytesIO(value) if key == "image" else value for key, value in example.items()}
                writer.write(features.serialize_example(features.encode_example(opened)))
            writer.close()
            lengths.append(len(part))
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=0))
    options = {"version": "1.0.0", "check_data": False, "supervised_keys": supervised_keys}
    tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=infos, **options)
    return folder


def test_images_and_classes_are_those_written(tmp_path):
    splits = {"train": make_examples(23), "validation": make_examples(9, 100), "test": make_examples(5, 200)}
    write_data_set(tmp_path, splits)
    source = make_tfds_source("animals", data_dir=tmp_path, image_size=8)
    assert source.class_names == ("cat", "dog", "ant") and source.shape == (8, 8, 3)
    assert sorted(item.source_id for item in source.splits["train"]) == [f"train/{i:08d}" for i in range(23)]
    assert sorted(item.source_id for item in source.splits["heldout"]) == [f"validation/{i:08d}" for i in range(9)]
    for item in all_items(source):
        split, index = item.source_id.split("/")
        expected = splits[split][int(index)]
        pixels, label = source.load(item)
        np.testing.assert_array_equal(pixels, decode_crop(expected["image"], 8, 3))
        assert label == expected["label"] and item.label == UNLABELLED
    assert_threads_load_what_one_does(make_tfds_source("animals", data_dir=tmp_path, image_size=8))
    assert "tensorflow" not in sys.modules


def test_test_split_or_a_share_is_held_out(tmp_path):
    write_data_set(tmp_path, {"train": make_examples(20), "test": make_examples(4)}, name="tested")
    write_data_set(tmp_path, {"train": make_examples(20)}, name="alone")
    tested = make_tfds_source("tested:1.*.*", data_dir=tmp_path)
    assert {item.source_id.split("/")[0] for item in tested.splits["heldout"]} == {"test"}
    with pytest.raises(UserError, match="its own held-out images"):
        make_tfds_source("tested", data_dir=tmp_path, heldout_share=0.1)
    alone = make_tfds_source("alone", data_dir=tmp_path)
    assert [len(alone.splits[split]) for split in ("train", "heldout")] == [18, 2]
    assert sorted(item.source_id for item in all_items(alone)) == [f"train/{index:08d}" for index in range(20)]
    half = make_tfds_source("alone", data_dir=tmp_path, heldout_share=0.5)
    assert [len(half.splits[split]) for split in ("train", "heldout")] == [10, 10]
    assert half.description != alone.description
    more = {"train": make_examples(6), "validation": make_examples(2), "test": make_examples(4), "unlabelled": []}
    write_data_set(tmp_path, more | {"extra": make_examples(3)}, name="more")
    ignored = {"split extra": "3 examples", "split test": "4 examples"}
    assert make_tfds_source("more", data_dir=tmp_path).ignored == ignored
    assert not tested.ignored and not alone.ignored


def test_description_follows_content(tmp_path):
    for place, count in (("a", 12), ("b", 12), ("c", 13)):
        write_data_set(tmp_path / place, {"train": make_examples(count)})
    first = make_tfds_source("animals", data_dir=tmp_path / "a").description
    assert make_tfds_source("animals", data_dir=tmp_path / "b").description == first
    assert make_tfds_source("animals", data_dir=tmp_path / "c").description != first
    assert first["data_set"] == "animals/1.0.0" and first["pictures"] == 12


class BirdsOfTheTest(tfds.core.GeneratorBasedBuilder):
    """A data set that exists as code: TFDS prepares it when it is asked for."""

    VERSION = tfds.core.Version("2.1.0")

    def _info(self):
        features = tfds.features.FeaturesDict(FEATURES)
        return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

    def _split_generators(self, download_manager):
        return {"train": self._generate_examples(20)}

    def _generate_examples(self, count):
        for index, example in enumerate(make_examples(count)):
            yield index, example | {"image": io.BytesIO(example["image"])}


def test_a_data_set_that_is_not_there_is_prepared(tmp_path):
    first = make_tfds_source("birds_of_the_test", data_dir=tmp_path, image_size=8)
    assert list((tmp_path / "birds_of_the_test" / "2.1.0").glob("*.array_record-*"))
    again = make_tfds_source("birds_of_the_test:2.*.*", data_dir=tmp_path, image_size=8)
    assert again.description == first.description and again.splits == first.splits
    written = sorted((example["image"], example["label"]) for example in make_examples(20))
    expected = sorted((decode_crop(data, 8, 3).tobytes(), label) for data, label in written)
    assert sorted((pixels.tobytes(), label) for pixels, label in map(first.load, all_items(first))) == expected
    assert "tensorflow" not in sys.modules


def needs(module):
    class Builder(BirdsOfTheTest):
        name = f"needs_{module}"
        MANUAL_DOWNLOAD_INSTRUCTIONS = "Fetch it." if module == "hands" else None

        def _generate_examples(self, count):
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)

        def _split_generators(self, download_manager):
            if module == "hands":
                download_manager.manual_dir  # noqa: B018
            return super()._split_generators(download_manager)

    return Builder.name


def refusal(name, data_dir, **options):
    with pytest.raises(UserError) as caught:
        make_tfds_source(name, data_dir=data_dir, **options)
    text = str(caught.value)
    assert text.splitlines() == [text]
    return text


def test_what_cannot_be_prepared_says_what_to_do(tmp_path):
    text = refusal(needs("tensorflow"), tmp_path)
    assert "cannot prepare it without tensorflow" in text and "--file_format=array_record" in text
    text = refusal(needs("hands"), tmp_path)
    assert f"Manual directory {tmp_path}/downloads/manual does not exist" in text
    assert "its files are fetched by hand, see https://" in text
    assert "no such data set" in refusal("no_such_animals", tmp_path)
    assert "no such data set" in refusal("no_such_animals/large:1.0.0", tmp_path)
    for name in ("", "two words", "huggingface:animals", "animals:1", "../animals", "animals/version=3"):
        assert "is no name of a TFDS data set" in refusal(name, tmp_path)


def test_data_sets_of_another_kind_are_refused(tmp_path):
    image, label = FEATURES["image"], FEATURES["label"]
    unlabelled = [{"image": image_bytes(index)} for index in range(4)]
    write_data_set(tmp_path, {"train": unlabelled}, "unlabelled", {"image": image})
    write_data_set(tmp_path, {"test": make_examples(4)}, "untrained")
    twice = {"image": image, "fine": label, "coarse": tfds.features.ClassLabel(num_classes=2)}
    both = [{"image": image_bytes(index), "fine": index % 3, "coarse": index % 2} for index in range(20)]
    write_data_set(tmp_path, {"train": both}, "ambiguous", twice)
    write_data_set(tmp_path, {"train": both}, "declared", twice, supervised_keys=("image", "coarse"))
    assert "has none where one class label" in refusal("unlabelled", tmp_path)
    assert "has no train split, only test" in refusal("untrained", tmp_path)
    assert "has coarse, fine where one class label" in refusal("ambiguous", tmp_path)
    assert make_tfds_source("declared", data_dir=tmp_path).class_names == ("0", "1")
    for option in ({"image_size": 0}, {"channels": 2}, {"heldout_share": 0.0}):
        assert next(iter(option)) in refusal("declared", tmp_path, **option)


def test_other_file_formats_are_refused(tmp_path):
    folder = write_data_set(tmp_path, {"train": make_examples(4)})
    info = (folder / "dataset_info.json").read_text()
    assert '"fileFormat": "array_record"' in info
    (folder / "dataset_info.json").write_text(info.replace("array_record", "tfrecord"))
    assert f"{folder} holds it as tfrecord, which cannot be read at random" in refusal("animals", tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    folder = write_data_set(tmp_path, {"train": make_examples(40)})
    (folder / "animals-train.array_record-00001-of-00002").unlink()
    assert "animals-train.array_record-00001-of-00002 cannot be read" in refusal("animals", tmp_path)


def count_readable(source):
    readable = 0
    for item in all_items(source):
        try:
            pixels, label = source.load(item)
            assert pixels.shape == (8, 8, 3) and label in range(3)
            readable += 1
        except ImageError as error:
            assert str(error).splitlines() == [str(error)]
    return readable


def test_damaged_shards_give_reasons(tmp_path):
    folder = write_data_set(tmp_path, {"train": make_examples(40)})
    path = folder / "animals-train.array_record-00000-of-00002"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[5000] ^= 1
    for data, readable in ((whole, 40), (whole[: len(whole) // 2], 20), (bytes(len(whole)), 20), (flipped, 39)):
        path.write_bytes(data)
        assert count_readable(make_tfds_source("animals", data_dir=tmp_path, image_size=8)) == readable


def test_damaged_images_and_classes_give_reasons(tmp_path):
    examples = make_examples(20)
    examples[3]["image"] = examples[3]["image"][:200]
    examples[4]["image"] = b"no image"
    examples[5]["label"] = -1  # how TFDS marks a test split whose classes are secret
    write_data_set(tmp_path, {"train": examples})
    source = make_tfds_source("animals", data_dir=tmp_path, image_size=8)
    reasons = {}
    for item in all_items(source):
        try:
            source.load(item)
        except ImageError as error:
            reasons[item.source_id] = str(error)
    assert sorted(reasons) == [f"train/{index:08d}" for index in (3, 4, 5)]
    assert "not an image in any" in reasons["train/00000004"]
    assert reasons["train/00000005"] == "its class is -1, not one of 0 to 2"
