"""The command that turns a source of pictures into a data set for training; flags and closing lines only.

python -m terdit_jax.prepare --source=digits --output=data/digits
python -m terdit_jax.prepare --source=folder --input=pictures --output=data/pictures --image_size=32
"""

from collections.abc import Sequence
import shlex

from absl import flags

from terdit_jax.data import builder, schema, sources
from terdit_jax.data.codec import PixelCodec
from terdit_jax.errors import UserError, run_command

_SOURCE = flags.DEFINE_enum("source", None, ["digits", "folder"], "digits: embedded; folder: one folder a class.")
_INPUT = flags.DEFINE_string("input", None, "The folder of class folders.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory of the data set; new or empty.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", None, "Height and width of the centre crop; 32 if not given.")
_CHANNELS = flags.DEFINE_integer("channels", None, "3 (RGB) or 1 (grey); 3 if not given.")
_HELDOUT_SHARE = flags.DEFINE_float("heldout_share", None, "Share held out; digits 0.2, folder 0.1 if not given.")
_MIRROR = flags.DEFINE_bool("mirror", False, "Also store each mirrored picture; pixels can do without.")
_MAX_BAD_SHARE = flags.DEFINE_float("max_bad_share", 0.01, "Abort when more than this share cannot be decoded.")


def main(argv: Sequence[str]) -> None:
    """Prepares the data set that the flags describe, or says that it is already there."""
    del argv
    if not _OUTPUT.value:
        raise UserError("--output is missing: name the directory of the data set, such as --output=data/digits")
    source, codec, mirror = _make_source(), PixelCodec(), _MIRROR.value
    metadata = builder.find_prepared(source, _OUTPUT.value, codec=codec, mirror=mirror)
    if metadata is not None:
        print(f"{_OUTPUT.value} already holds this data set, nothing to do")
    else:
        metadata = builder.build(
            source, _OUTPUT.value, codec=codec, mirror=mirror, max_bad_share=_MAX_BAD_SHARE.value, report=print
        )
    _print_summary(metadata)


def _make_source() -> sources.Source:
    if _SOURCE.value is None:
        raise UserError("--source is missing: digits or folder")
    if _SOURCE.value == "digits":
        for flag in (_INPUT, _IMAGE_SIZE, _CHANNELS):
            if flag.value is not None:
                raise UserError(f"--{flag.name}={flag.value}: the digits are embedded, 8x8 and grey; leave it out")
        return sources.make_digits_source(_HELDOUT_SHARE.value)
    if not _INPUT.value:
        raise UserError("--input is missing: name the folder of class folders")
    return sources.make_folder_source(
        _INPUT.value,
        image_size=32 if _IMAGE_SIZE.value is None else _IMAGE_SIZE.value,
        channels=3 if _CHANNELS.value is None else _CHANNELS.value,
        heldout_share=_HELDOUT_SHARE.value,
    )


def _print_summary(metadata: schema.Metadata) -> None:
    train, heldout = (metadata.splits[split] for split in schema.SPLITS)
    shards = (*train.shards, *heldout.shards)
    height, width, channels = metadata.shape
    print(
        f"{train.records:,} training and {heldout.records:,} held-out records of {height}x{width}x{channels}, "
        f"{metadata.num_classes} classes"
    )
    print(f"{sum(shard.bytes for shard in shards):,} bytes in {len(shards)} shards, fingerprint {metadata.fingerprint}")
    command = ["python", "-m", "terdit_jax.main"]
    if metadata.source["kind"] == "digits":
        command += ["--config=configs/digits.py", "--workdir=runs/digits"]
    else:
        command += ["--config=configs/cifar10.py", "--workdir=runs/cifar10"]
        command += [f"--config.model.input_size={height}", f"--config.model.in_channels={channels}"]
        command += [f"--config.model.num_classes={metadata.num_classes}"]
    print("next: " + shlex.join([*command, f"--config.data.dir={_OUTPUT.value}"]))


if __name__ == "__main__":
    run_command(main)
