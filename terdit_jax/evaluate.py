"""Scores images, against a reference by the ADM suite, or by a classifier trained on a run's data.

python -m terdit_jax.evaluate --samples=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz --output=metrics.json
python -m terdit_jax.evaluate --reference=data/cifar10 --save_reference=cifar10.npz
python -m terdit_jax.evaluate --workdir=runs/digits --num_samples=2000 --cfg_scale=2 --output=guided.json

The last one, without a reference, gives no FID (docs/evaluation.md).
"""

from absl import flags

from terdit_jax.choices import ALL_METHODS, DRAW_BATCH_SIZE, FEATURE_BATCH_SIZE, MAX_CFG_SCALE, NUM_TIMESTEPS
from terdit_jax.errors import parse_flags
from terdit_jax.options import MAX_BATCH, MAX_IMAGES, define_compilation_cache, define_float
from terdit_jax.paths import define_path

_WORKDIR = define_path("workdir", None, "Directory of the run that a classifier of its data judges.")
_SAMPLES = define_path(
    "samples", None, "npz with arr_0 uint8 (N, H, W, C), folder of images, or a model that draws them."
)
_REFERENCE = define_path("reference", None, "npz of statistics or images, folder of images, or data set.")
_SAVE_REFERENCE = define_path("save_reference", None, "npz to write of the reference's statistics.")
_INCEPTION = define_path("inception", None, "Weights of Inception, a .pth; fetched if not given.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", FEATURE_BATCH_SIZE, "Images a device looks at at once.", 1, MAX_BATCH)
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 500, "Images to draw.", 2, MAX_IMAGES)
_CFG_SCALE = define_float("cfg_scale", None, "Guidance; the run's own if not given.", low=0, high=MAX_CFG_SCALE)
_NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Denoising steps; the run's own if not given.", 1, NUM_TIMESTEPS)
_METHOD = flags.DEFINE_enum("method", None, ALL_METHODS, "Sampler; the run's own if not given.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the samples and of the classifier.", lower_bound=0, upper_bound=2**32 - 1)
_WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "raw"], "Which of the run's weights draw.")
_VAE = define_path("vae", None, "Folder of the autoencoder, for a model that draws latents.")
_CACHE = define_compilation_cache()
_OUTPUT = define_path("output", None, "JSON file to write; a new one.")

_HOW_TO_DRAW = (_NUM_SAMPLES, _CFG_SCALE, _NUM_STEPS, _METHOD, _SEED, _WEIGHTS, _VAE)

parse_flags(__name__)  # answers --help and wrong flags before the imports below, which take seconds

from collections.abc import Iterable, Iterator, Mapping, Sequence
import time
from typing import Any

from etils import epath
import jax
import numpy as np

from terdit_jax.checkpoints.reader import Checkpoints
from terdit_jax.config_sections import MeshConfig
from terdit_jax.data.reader import Dataset, open_dataset
from terdit_jax.errors import UserError, run_command
from terdit_jax.evaluation.features import collect_features
from terdit_jax.evaluation.image_source import ImageSource, open_images
from terdit_jax.evaluation.judge import read_images
from terdit_jax.evaluation.proxy import LabelledImages, check_samples, proxy_metrics, sample_labels
from terdit_jax.evaluation.reference import save_reference, stored_indices
from terdit_jax.evaluation.suite import (
    PUBLISHED_COUNT,
    check_count,
    find_reference,
    inception_network,
    look_at,
    suite_metrics,
)
from terdit_jax.files import check_output, refusing, write_json
from terdit_jax.inference.image_set import make_labels
from terdit_jax.inference.images import in_color, to_uint8
from terdit_jax.inference.runtime import Denoiser, load_model
from terdit_jax.interop.vae_weights import load_vae
from terdit_jax.interop.weights import is_model
from terdit_jax.memory import check_host
from terdit_jax.options import refuse_unused
from terdit_jax.parallel.mesh import local_mesh, make_mesh
from terdit_jax.parallel.processes import initialize_processes
from terdit_jax.programs import keep_programs
from terdit_jax.training.resume import data_dir
from terdit_jax.untrusted import load_arrays
from terdit_jax.versions import versions

DEFAULT_OUTPUT = "proxy_metrics.json"


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    for flag in (_OUTPUT, _SAVE_REFERENCE):
        if flag.value:
            check_output(flag.value, f"--{flag.name}")
    # Many small steps: on CPUs, queueing them makes the threads of one step fight those of the next.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if _REFERENCE.value:
        _judge_by_suite(_REFERENCE.value)
    elif _WORKDIR.value:
        _judge_by_classifier(_WORKDIR.value)
    elif _SAMPLES.value or _SAVE_REFERENCE.value:
        raise UserError("--reference is missing: name an npz of statistics, a folder of images, or a data set")
    else:
        raise UserError("--workdir is missing: name the directory of a run, such as --workdir=runs/digits")


def _judge_by_suite(reference_path: str) -> None:
    """Compares samples with the reference, or writes its statistics, or both."""
    samples_path, saved_path = _SAMPLES.value or _WORKDIR.value, _SAVE_REFERENCE.value
    if bool(samples_path) != bool(_OUTPUT.value) or not (samples_path or saved_path):
        raise UserError(
            "--reference takes --samples and --output=metrics.json, or --save_reference=REFERENCE.npz, or all of them"
        )
    if _SAMPLES.value:
        refuse_unused([_WORKDIR], "beside --samples, which --reference judges")
    if not samples_path or not is_model(samples_path):
        refuse_unused(_HOW_TO_DRAW, "where no model draws the samples")
    initialize_processes()
    keep_programs(_CACHE.value, "--compilation_cache")
    begin, mesh = time.perf_counter(), local_mesh()
    stored = find_reference(reference_path)
    if saved_path and stored.images is None:
        raise UserError(f"--save_reference needs images, and {stored.name} holds statistics alone")
    samples = check_count(_open_samples(samples_path)) if samples_path else None
    network = inception_network(_INCEPTION.value)
    reference = look_at(stored, network, mesh, _BATCH_SIZE.value, _say)
    if saved_path and stored.images and jax.process_index() == 0:
        save_reference(saved_path, reference.statistics, stored.images.take(stored_indices(stored.images.count)))
        print(f"reference of {stored.images.count:,} images written to {saved_path}")
    if samples is None:
        return
    features = collect_features(network, samples, mesh, _BATCH_SIZE.value, _say)
    metrics = suite_metrics(network, features, reference)
    if jax.process_index():
        return
    facts = {
        "num_samples": samples.count, "num_reference_pictures": 0 if reference.pool is None else len(reference.pool),
        "network": {"name": "inception", "file": network.source, "sha256": network.sha256},
        "versions": versions("terdit-jax", "jax", "numpy"),
        "device": jax.devices()[0].device_kind, "seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip
    _report(epath.Path(_OUTPUT.value), metrics, facts, (_SAMPLES, _WORKDIR, _REFERENCE))
    if reference.pool is None:
        print(f"{reference.name} holds no images, so there is no precision and no recall")
    if samples.count != PUBLISHED_COUNT:
        print(f"of {samples.count:,} images: compare with figures of as many only, published ones are of 50,000")
    print(f"written to {_OUTPUT.value}")


def _open_samples(path: str) -> ImageSource:
    if not is_model(path):
        return open_images(path)
    vae = load_vae(_VAE.value) if _VAE.value else None
    model = load_model(path, mesh=local_mesh(), ema=_WEIGHTS.value == "ema", meanwhile=_compile_ahead)
    pixels = model.description.codec == "none" and model.config.in_channels in (1, 3)
    if not (pixels or vae):
        raise UserError(f"--samples={path}: this model draws latents: give --vae")
    labels = make_labels(range(model.config.num_classes), _NUM_SAMPLES.value, "balanced", _SEED.value)

    def stream(first: int, stop: int, size: int) -> Iterator[np.ndarray]:
        for start in range(first, stop, size):
            of_portion, at_once = labels[start : min(start + size, stop)], min(size, len(labels), _drawn_at_once())
            images = _draw(model, of_portion, first=start, batch_size=at_once, whole_batches=True, vae=vae)
            yield in_color(to_uint8(images))

    side = model.config.input_size * (vae[0].downsampling if vae else 1)
    return ImageSource(path, len(labels), (side, side, 3), stream)


def _draw(model: Denoiser, labels: np.ndarray, **options: Any) -> np.ndarray:
    """Images (N, H, W, C) in [-1, 1] as the flags ask for them; `options` are those of `Denoiser.draw`."""
    return model.draw(labels, seed=_SEED.value, **_settings(), **options)


def _settings() -> dict[str, Any]:
    return {"num_steps": _NUM_STEPS.value, "cfg_scale": _CFG_SCALE.value, "method": _METHOD.value}


def _compile_ahead(model: Denoiser) -> None:
    """Compiles what draws at once: as many images as the network looks at, where there is one."""
    looked_at = _BATCH_SIZE.value * model.mesh.size if _REFERENCE.value else _drawn_at_once()
    model.compile_draw(_NUM_SAMPLES.value, batch_size=min(looked_at, _drawn_at_once()), **_settings())


def _drawn_at_once() -> int:
    """Images: on CPUs as many as `sample` draws at once, so that the two run one program."""
    return DRAW_BATCH_SIZE if jax.default_backend() == "cpu" else 256


def _judge_by_classifier(workdir: str) -> None:
    """Draws samples or reads them, judges them, prints the scores and writes them."""
    refuse_unused((_SAVE_REFERENCE, _INCEPTION, _BATCH_SIZE, _VAE), "without --reference")
    if _SAMPLES.value:
        refuse_unused([flag for flag in _HOW_TO_DRAW if flag is not _SEED], "beside --samples: those are judged")
    keep_programs(_CACHE.value, "--compilation_cache")
    output = epath.Path(_OUTPUT.value or epath.Path(workdir) / DEFAULT_OUTPUT)
    check_output(output, replace=not _OUTPUT.value)
    dataset = _open_images(_find_data(workdir))
    samples = _load_samples(_SAMPLES.value, dataset) if _SAMPLES.value else None
    train, heldout = (read_images(dataset, split) for split in ("train", "heldout"))
    if samples is None:
        size = 8 * int(np.prod(dataset.metadata.shape))  # bytes of an image, and of what is computed of it
        check_host(size * _NUM_SAMPLES.value, f"--num_samples={_NUM_SAMPLES.value}", "draw fewer")
        ema, mesh = _WEIGHTS.value == "ema", make_mesh(MeshConfig())
        model = load_model(workdir, mesh=mesh, ema=ema, meanwhile=_compile_ahead)
        labels = sample_labels(heldout.labels, _NUM_SAMPLES.value)
        print(f"drawing {len(labels):,} images", flush=True)
        report = lambda done: print(f"{done:,}/{len(labels):,} images", flush=True)  # noqa: E731
        samples = LabelledImages(_draw(model, labels, batch_size=_drawn_at_once(), report=report), labels)
    # Minutes on a CPU where images are many.
    print(f"training a classifier of {len(train.labels):,} images to judge {len(samples.labels):,} by", flush=True)
    metrics = proxy_metrics(train, heldout, samples, dataset.metadata.num_classes, _SEED.value)
    counts = {"num_samples": len(samples.labels), "num_train": len(train.labels), "num_heldout": len(heldout.labels)}
    _report(output, metrics, counts, (_WORKDIR, _CFG_SCALE, _NUM_STEPS, _METHOD, _SEED, _WEIGHTS, _SAMPLES))
    print(f"written to {output}; judged by a classifier of this data set, so not an FID")


def _find_data(workdir: str) -> str:
    """The data set of a run."""
    run = Checkpoints(workdir).newest_run() if (epath.Path(workdir) / "checkpoints").is_dir() else None
    if run is None:
        raise UserError(f"--workdir={workdir}: holds no checkpoint of a run that can be read")
    return data_dir(run, workdir)


def _open_images(path: str) -> Dataset:
    dataset = open_dataset(path)
    if dataset.metadata.codec != "none":
        raise UserError(f"{path} holds latents ({dataset.metadata.codec}): the classifier judges data sets of images")
    return dataset


def _load_samples(path: str, dataset: Dataset) -> LabelledImages:
    shape, prefix = dataset.metadata.shape, f"--samples={path}: "
    arrays = load_arrays(path, ("arr_0", "labels"), f"{prefix}not an npz with arr_0 and labels")
    images, labels = arrays.values()
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(f"{prefix}arr_0 is {str(images.dtype)[:60]} {images.shape}, expected uint8 (N, H, W, C)")
    if shape[-1] == 1 and images.shape[-1] == 3 and (images == images[..., :1]).all():
        images = images[..., :1]  # terdit_jax.sample writes grey images as evaluators want them, in three channels
    samples = LabelledImages(images.astype(np.float32) / 127.5 - 1, labels)
    check_samples(samples, shape, dataset.metadata.num_classes, prefix)
    return samples


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


def _report(
    path: epath.Path, metrics: Mapping[str, float], facts: Mapping[str, Any], asked: Iterable[flags.FlagHolder]
) -> None:
    """Prints the metrics, and writes them with the facts and the values of the flags `asked`."""
    for name, value in metrics.items():
        print(f"{name:36} {value:9.4f}")
    content = {**metrics, **facts, "flags": {flag.name: flag.value for flag in asked}}
    with refusing(path):
        write_json(path, content, indent=2, replace=_OUTPUT.value is None)


if __name__ == "__main__":
    run_command(main)
