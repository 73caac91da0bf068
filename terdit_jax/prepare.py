"""Turns images into a data set for training, and shows what is in one.

python -m terdit_jax.prepare --source=digits --output=data/digits
python -m terdit_jax.prepare --source=folder --input=pictures --output=data/pictures --image_size=32
python -m terdit_jax.prepare --source=tar --input=ILSVRC2012_img_train.tar --vae=sd-vae-ft-ema --output=data/imagenet256
python -m terdit_jax.prepare --inspect=data/imagenet256 --vae=sd-vae-ft-ema --output=sheet.png
"""

from absl import flags

from terdit_jax.data.crop import MAX_SIZE
from terdit_jax.errors import parse_flags
from terdit_jax.options import define_compilation_cache, define_float
from terdit_jax.paths import define_path

_SOURCE = flags.DEFINE_enum(
    "source", None, ["digits", "folder", "tar", "tfds"],
    "digits: embedded; folder: one folder a class; tar: ImageNet's train archive, or a folder of tars, one a class; "
    "tfds: a TFDS data set of images with classes.",
)  # fmt: skip
_INPUT = define_path("input", None, "The folder, the archive, or the name of the TFDS data set.")
_DATA_DIR = define_path("data_dir", None, "Where TFDS keeps its data sets; its own default if left out.")
_OUTPUT = define_path("output", None, "Directory of the data set, new or unfinished; with --inspect a .png.")
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", None, "Height and width of the centre crop; 32, or 256 with --vae.", 1, MAX_SIZE
)
_CHANNELS = flags.DEFINE_integer("channels", None, "3 (RGB) or 1 (grey); 3 if not given.")
_HELDOUT_SHARE = define_float(
    "heldout_share", None, "Share held out where the source has no such split.", low=1e-6, high=1 - 1e-6
)
_VAE = define_path(
    "vae", None, "Stores latents of this autoencoder: a folder, or a name such as stabilityai/sd-vae-ft-ema."
)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["bfloat16", "float32"], "Of the autoencoder; float32 on CPUs, else bfloat16."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images that a device encodes at once.", 1, 4096)
_MIRROR = flags.DEFINE_bool("mirror", None, "Also store each mirrored image; by default with --vae only.")
_MAX_BAD_SHARE = define_float(
    "max_bad_share", 0.01, "Abort when more than this share cannot be decoded.", low=0, high=1 - 1e-6
)
_SHARD_MB = define_float("shard_mb", 256, "Size of a shard in MiB, before compression.", low=1e-3, high=1e6)
_WORKER = flags.DEFINE_string("worker", None, "K/N: make every N-th shard from the K-th on, K from 0.")
_CACHE = define_compilation_cache()
_INSPECT = define_path("inspect", None, "A data set to look at instead: a contact sheet and statistics.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 48, "Records that --inspect looks at.", 1, 4096)

_ONLY_BUILD = (
    _SOURCE, _INPUT, _DATA_DIR, _IMAGE_SIZE, _CHANNELS, _HELDOUT_SHARE, _DTYPE, _BATCH_SIZE, _MIRROR, _MAX_BAD_SHARE,
    _SHARD_MB, _WORKER,
)  # fmt: skip

parse_flags(__name__)  # answers --help and wrong flags before the imports below, which take seconds

from collections.abc import Callable, Sequence
from functools import partial
import re
import shlex

from etils import epath
import jax

from terdit_jax.data import builder, schema, sources
from terdit_jax.data.codec import Codec, PixelCodec, VAECodec
from terdit_jax.data.inspection import format_report, inspect
from terdit_jax.data.reader import open_dataset
from terdit_jax.data.suggestion import remark, training_command
from terdit_jax.data.tar_source import make_tar_source
from terdit_jax.data.tfds_source import make_tfds_source
from terdit_jax.errors import UserError, run_command
from terdit_jax.files import check_output
from terdit_jax.inference.contact_sheet import make_contact_sheet
from terdit_jax.inference.decoding import to_images
from terdit_jax.inference.images import save_png, to_uint8
from terdit_jax.interop.vae_weights import load_vae, vae_identity
from terdit_jax.memory import check_host
from terdit_jax.options import refuse_unused
from terdit_jax.parallel.processes import check_devices, initialize_processes
from terdit_jax.programs import keep_programs


def main(argv: Sequence[str]) -> None:
    """Prepares the data set that the flags describe, says that it is already there, or shows one."""
    del argv
    if _INSPECT.value is not None:
        refuse_unused(_ONLY_BUILD, "with --inspect")
        return _inspect(_INSPECT.value)
    refuse_unused([_NUM_SAMPLES], "without --inspect")
    output = _OUTPUT.value
    if not output:
        raise UserError("--output is missing: name the directory of the data set, such as --output=data/digits")
    if _SOURCE.value is None:
        raise UserError("--source is missing: digits, folder, tar or tfds")
    if _SOURCE.value != "tfds":
        refuse_unused([_DATA_DIR], f"with --source={_SOURCE.value}")
    if _VAE.value is None:
        refuse_unused([_DTYPE, _BATCH_SIZE, _CACHE], "without --vae")
    worker, wait = _find_worker()
    source, codec = _make_source(_SOURCE.value), _make_codec()
    mirror = _VAE.value is not None if _MIRROR.value is None else _MIRROR.value
    metadata = builder.find_prepared(source, output, codec=codec, mirror=mirror)
    if metadata is not None:
        print(f"{output} already holds this data set, nothing to do")
    else:
        metadata = builder.build(
            source,
            output,
            codec=codec,
            mirror=mirror,
            max_bad_share=_MAX_BAD_SHARE.value,
            shard_bytes=int(_SHARD_MB.value * 2**20),
            worker=worker,
            wait=wait,
            report=lambda line: print(line, flush=True),
        )
    if metadata is None:
        print(f"worker {_WORKER.value} is done; the last one to be completes {output}")
    else:
        _print_summary(output, metadata)


def _find_worker() -> tuple[tuple[int, int], bool]:
    """This worker's number and how many there are, and whether they end together."""
    if _WORKER.value is None:
        initialize_processes()
        together = jax.distributed.is_initialized()
        return (jax.process_index(), jax.process_count()) if together else (0, 1), together
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", _WORKER.value)
    worker, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if worker >= count:
        raise UserError(f"--worker={_WORKER.value}: write K/N with K from 0 to N - 1, such as 0/4")
    return (worker, count), False


def _make_source(kind: str) -> sources.Source:
    if kind == "digits":
        for flag in (_INPUT, _IMAGE_SIZE, _CHANNELS, _VAE):
            if flag.value is not None:
                raise UserError(f"--{flag.name}={flag.value}: the digits are embedded, 8x8 and grey; leave it out")
        return sources.make_digits_source(_HELDOUT_SHARE.value)
    if not _INPUT.value:
        raise UserError("--input is missing: name the folder, the archive or the TFDS data set")
    makers: dict[str, Callable[..., sources.Source]] = {
        "folder": sources.make_folder_source,
        "tar": make_tar_source,
        "tfds": partial(make_tfds_source, data_dir=_DATA_DIR.value),
    }
    return makers[kind](
        _INPUT.value,
        image_size=_IMAGE_SIZE.value if _IMAGE_SIZE.value is not None else 256 if _VAE.value else 32,
        channels=3 if _CHANNELS.value is None else _CHANNELS.value,
        heldout_share=_HELDOUT_SHARE.value,
    )


def _make_codec() -> Codec:
    if _VAE.value is None:
        return PixelCodec()
    keep_programs(_CACHE.value, "--compilation_cache")
    config, params = load_vae(_VAE.value)
    side = _IMAGE_SIZE.value or 256
    # One batch is encoded, one written, and two are decoded.
    check_host(4 * _BATCH_SIZE.value * side**2 * 3 * 4, f"--batch_size={_BATCH_SIZE.value}", "encode fewer at once")
    check_devices()
    dtype = _DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return VAECodec(config, params, vae_identity(config, params), dtype, _BATCH_SIZE.value)


def _inspect(path: str) -> None:
    output = _OUTPUT.value or f"{path.rstrip('/')}.png"
    if not output.endswith(".png"):
        raise UserError(f"--output={output}: must end in .png")
    check_output(output)
    dataset = open_dataset(path)
    keep_programs(_CACHE.value, "--compilation_cache")
    vae = load_vae(_VAE.value) if _VAE.value else None
    inspected = inspect(dataset, _NUM_SAMPLES.value)
    scale = dataset.metadata.latent_scale
    rows = [to_uint8(to_images(view * scale, scale, vae)) for view in inspected.views]
    save_png(output, make_contact_sheet(rows, inspected.captions))
    print(format_report(dataset.metadata, inspected))
    print(f"contact sheet: {output}" + ("" if vae or dataset.metadata.codec == "none" else " (latents: --vae decodes)"))


def _print_summary(output: str, metadata: schema.Metadata) -> None:
    train, heldout = (metadata.splits[split] for split in schema.SPLITS)
    shards = (*train.shards, *heldout.shards)
    shape = "x".join(map(str, metadata.shape))
    print(
        f"{train.records:,} training and {heldout.records:,} held-out records of {shape}, "
        f"{metadata.num_classes} classes"
    )
    if (epath.Path(output) / builder.SKIPPED_FILE).exists():
        print(f"what was left out, and why: {output}/{builder.SKIPPED_FILE}")
    print(f"{sum(shard.bytes for shard in shards):,} bytes in {len(shards)} shards, fingerprint {metadata.fingerprint}")
    if note := remark(metadata):
        print(note)
    print("next: " + shlex.join(training_command(metadata, output)))


if __name__ == "__main__":
    run_command(main)
