"""Images of any TFDS data set that has one image and one class an example, such as imagenet2012 or cifar10.

TFDS finds the data set, or fetches and prepares it; the images leave it as the files that they were and are decoded
like those of every other source, without TensorFlow.
"""

from collections.abc import Iterator
import contextlib
import os
import re
from typing import Any

from etils import epath
import numpy as np
import tensorflow_datasets as tfds

from terdit_jax.data.crop import check_crop
from terdit_jax.data.image_file import ImageError
from terdit_jax.data.schema import MAX_CLASSES
from terdit_jax.data.sources import UNLABELLED, Item, Source, make_crop_source
from terdit_jax.errors import UserError
from terdit_jax.files import check_folder
from terdit_jax.untrusted import brief, is_count, reading, short

HELDOUT_SPLITS = ("validation", "test")  # the first that the data set has is held out
# NAME, NAME/CONFIG, NAME:VERSION or both; not TFDS's namespaces, which run code from elsewhere.
NAME = re.compile(r"[A-Za-z]\w*(/\w[\w.+-]*)?(:(\d+|\*)\.(\d+|\*)\.(\d+|\*))?")
PAGES = "https://www.tensorflow.org/datasets/catalog"


def make_tfds_source(
    name: str,
    *,
    data_dir: str | None = None,
    image_size: int = 256,
    channels: int = 3,
    heldout_share: float | None = None,
) -> Source:
    """The TFDS data set `name`, cropped to (image_size, image_size, channels); a data set's own classes in its order.

    `name` may carry a configuration and a version, as in `cifar10:3.*.*`; `data_dir` is where TFDS keeps its data
    sets, by default its usual place. A data set that is not there yet is prepared there, as ArrayRecord.
    Its train split is trained on, its validation split held out, or its test split, or else `heldout_share` (default
    0.1) of the train split. Items are called after split and index and have no label: only `load` reads the records.

    Raises:
      UserError: no such data set, one that cannot be prepared or read at random, one without a train split, a single
        image or a single class label, or an option that cannot be used.
    """
    check_crop(image_size, channels)
    if data_dir is not None:
        check_folder(data_dir, "--data_dir")
    with _own_features_only():
        builder = _open_builder(name, data_dir)
    with reading(f"--input={name}: {builder.data_path} holds no data set that TFDS can read"):
        info = builder.info
        image_key, label_key = _find_keys(name, info)
        features = tfds.features.FeaturesDict({key: info.features[key] for key in (image_key, label_key)})
        class_names = _class_names(name, features[label_key])
        sizes = {split: split_info.num_examples for split, split_info in info.splits.items()}
        if not sizes.get("train"):
            raise UserError(f"--input={name}: has no train split, only {', '.join(sizes)[:80] or 'none at all'}")
        held = next((split for split in HELDOUT_SPLITS if sizes.get(split)), None)
        splits = ("train", held) if held else ("train",)
        listing = "".join(_list_files(name, builder.data_path, info.splits[split]) for split in splits)
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        records = {s: builder.as_data_source(s, deserialize_method=raw, file_format="array_record") for s in splits}
    decoders = {image_key: tfds.decode.SkipDecoding()}

    def read(item: Item) -> tuple[bytes, int]:
        split, _, index = item.source_id.rpartition("/")
        try:
            record = records[split][int(index)]
            if not record:  # what ArrayRecord returns beyond the end of a file that was cut short
                raise ValueError("an empty record")
            example = features.deserialize_example_np(record, decoders=decoders)
            data, label = example[image_key], int(example[label_key])
        except Exception as error:  # of ArrayRecord, protobuf and TFDS, each with its own for a damaged file
            raise ImageError(f"cannot be read: {' '.join(str(error).split())}") from error
        if not 0 <= label < len(class_names):
            raise ImageError(f"its class is {label}, not one of 0 to {len(class_names) - 1}")
        return data, label

    return make_crop_source(
        "tfds",
        _list_items("train", sizes["train"]),
        _list_items(held, sizes[held]) if held else None,
        read,
        image_size=image_size,
        channels=channels,
        heldout_share=heldout_share,
        class_names=class_names,
        listing=listing,
        ignored={f"split {s}": f"{n:,} examples" for s, n in sizes.items() if n and s not in splits},
        data_set=info.full_name,
    )


def _open_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """The builder of a data set that is prepared and can be read at random."""
    if not NAME.fullmatch(name):
        raise UserError(f"--input={name}: is no name of a TFDS data set, such as imagenet2012 or cifar10:3.*.*")
    builder = None
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        assert builder.info is not None  # read here, where errors are caught and nothing is imported
        if not builder.is_prepared():
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
            builder.download_and_prepare()
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(f"--input={name}: TFDS has no such data set, configuration or version, see {PAGES}") from error
    except ImportError as error:
        raise UserError(
            f"--input={name}: TFDS cannot prepare it without {error.name}: `pip install tensorflow` or run"
            f" `tfds build {name} --file_format=array_record --data_dir=DIR` elsewhere and name that --data_dir"
        ) from error
    except Exception as error:  # of a builder, which is code of its own: downloads, checksums, versions, full disks
        hint = ""
        if builder is not None and builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
            hint = f"; its files are fetched by hand, see {PAGES}/{builder.name}"
        raise UserError(f"--input={name}: TFDS cannot prepare it ({_line(error)}){hint}") from error
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise UserError(
            f"--input={name}: {builder.data_path} holds it as {', '.join(sorted(formats))}, which cannot be read at "
            "random; give another --data_dir, where it is prepared anew, or convert it with `tfds convert_format`"
        )
    return builder


@contextlib.contextmanager
def _own_features_only() -> Iterator[None]:
    """Keeps TFDS from importing a module because the files of a data set say so, which would run its code.

    features.json and dataset_info.json name a class for every feature, at any depth; TFDS imports the modules of those
    that it does not know, from the current directory too. All of them pass through this one function of TFDS.
    """
    connector: Any = tfds.features.FeatureConnector  # an attribute of it is replaced below
    own: list[Any] = [f for f in vars(tfds.features).values() if isinstance(f, type) and issubclass(f, connector)]
    known = {name for feature in own for name in (f"{feature.__module__}.{feature.__name__}", *feature.ALIASES)}
    theirs = connector.__dict__["cls_from_name"]

    def cls_from_name(cls: type, python_class_name: str) -> type:
        if python_class_name not in known:
            raise ValueError(f"it names the feature class {short(python_class_name)}, which is none of TFDS's own")
        return theirs.__get__(None, cls)(python_class_name)

    connector.cls_from_name = classmethod(cls_from_name)
    try:
        yield
    finally:
        connector.cls_from_name = theirs


def _find_keys(name: str, info: tfds.core.DatasetInfo) -> tuple[str, str]:
    """The keys of the image and of its class: those declared for supervised training, else the only ones."""
    features = info.features

    def is_image(key: str) -> bool:
        feature = features[key]
        return isinstance(feature, tfds.features.Image) and not isinstance(feature, tfds.features.LabeledImage)

    def is_label(key: str) -> bool:
        return isinstance(features[key], tfds.features.ClassLabel)

    keys = sorted(features) if isinstance(features, tfds.features.FeaturesDict) else []
    images, labels = ([key for key in keys if test(key)] for test in (is_image, is_label))
    declared = info.supervised_keys
    if declared and len(declared) == 2 and declared[0] in images and declared[1] in labels:
        images, labels = [declared[0]], [declared[1]]
    if odd := [key for key in (*images, *labels) if not key.isprintable() or "/" in key or key.startswith(".")]:
        raise UserError(f"--input={name}: has a feature called {short(odd[0])}, which names a file elsewhere")
    for found, what in ((images, "image"), (labels, "class label")):
        if len(found) != 1:
            raise UserError(f"--input={name}: has {', '.join(found) or 'none'} where one {what} an example is needed")
    if features[images[0]].np_dtype == np.float32:
        raise UserError(f"--input={name}: its images are float32, only 8 and 16 bits can be used")
    return images[0], labels[0]


def _list_items(split: str, count: int) -> list[Item]:
    """The items of a split, whose `count` the sizes of its files have been found to allow."""
    return [Item(f"{split}/{index:08d}", UNLABELLED) for index in range(count)]


def _class_names(name: str, feature: tfds.features.ClassLabel) -> tuple[str, ...]:
    if not is_count(feature.num_classes, 1, MAX_CLASSES):
        raise UserError(f"--input={name}: its label has {short(feature.num_classes)} classes")
    return tuple(feature.names)


def _list_files(name: str, folder: epath.Path, split: tfds.core.SplitInfo) -> str:
    """A line for each file of a split: its name, its records, its size.

    Raises:
      UserError: a file that is not there, not in the data set's folder, or too small for its records.
    """
    lines = []
    for path, records in zip(split.filepaths, split.shard_lengths, strict=True):
        if not epath.Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder)):
            raise UserError(f"--input={name}: names the file {brief(str(path))}, which is not in {folder}")
        shown = f"--input={name}: {folder / brief(path.name)}"
        try:
            size = path.stat().length
        except OSError as error:
            raise UserError(f"{shown} cannot be read ({error.strerror or error})") from error
        if not 0 <= records <= size:  # each takes a byte and more
            raise UserError(f"{shown} has {size} bytes, which cannot be {records} records")
        lines.append(f"{path.name}\t{records}\t{size}\n")
    return "".join(lines)


def _line(error: Exception) -> str:
    """The first line of an error that may go on for pages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
