"""The command that scores a run by a classifier trained on its data set's pictures; flags and the report only.

python -m terdit_jax.evaluate --workdir=runs/digits
python -m terdit_jax.evaluate --workdir=runs/digits --num_samples=2000 --cfg_scale=2 --output=guided.json
"""

from collections.abc import Sequence
import json

from absl import flags
from etils import epath
import jax
import numpy as np

from terdit_jax.config import base_config
from terdit_jax.data.reader import Dataset, open_dataset
from terdit_jax.errors import UserError, run_command
from terdit_jax.evaluation.proxy import Pictures, proxy_metrics, sample_labels
from terdit_jax.inference.runtime import load_model
from terdit_jax.parallel.mesh import make_mesh
from terdit_jax.training.checkpoint import Checkpoints

DEFAULT_OUTPUT = "proxy_metrics.json"

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 500, "Pictures to draw.", lower_bound=2)
_CFG_SCALE = flags.DEFINE_float("cfg_scale", None, "Guidance; the run's own if not given.")
_NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Denoising steps; the run's own if not given.", lower_bound=1)
_METHOD = flags.DEFINE_enum("method", None, ["ddpm", "ddim"], "Sampler; the run's own if not given.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the samples and of the classifier.", lower_bound=0, upper_bound=2**32 - 1)
_WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "raw"], "Which of the run's weights draw.")
_SAMPLES = flags.DEFINE_string(
    "samples", None, "Judge these instead of drawing: npz with arr_0 uint8 (N, H, W, C) and labels (N,)."
)
_OUTPUT = flags.DEFINE_string("output", None, f"JSON file to write; WORKDIR/{DEFAULT_OUTPUT} if not given.")


def main(argv: Sequence[str]) -> None:
    """Draws samples or reads them, judges them, prints the scores and writes them."""
    del argv
    if not _WORKDIR.value:
        raise UserError("--workdir is missing: name the directory of a run, such as --workdir=runs/digits")
    output = epath.Path(_OUTPUT.value or epath.Path(_WORKDIR.value) / DEFAULT_OUTPUT)
    if _OUTPUT.value and output.exists():
        raise UserError(f"--output={output}: exists already, name another file")
    # Many small steps: on CPUs, queueing them makes the threads of one step fight those of the next.
    jax.config.update("jax_cpu_enable_async_dispatch", False)

    model = load_model(_WORKDIR.value, mesh=make_mesh(base_config().mesh), ema=_WEIGHTS.value == "ema")
    dataset = _open_pictures(Checkpoints(_WORKDIR.value).newest_run()["config"]["data"]["dir"])
    train, heldout = (_read_pictures(dataset, split) for split in ("train", "heldout"))
    if _SAMPLES.value:
        samples = _load_samples(_SAMPLES.value, dataset.metadata.shape[-1])
    else:
        labels = sample_labels(heldout.labels, _NUM_SAMPLES.value)
        images = model.draw(
            labels, seed=_SEED.value, num_steps=_NUM_STEPS.value, cfg_scale=_CFG_SCALE.value, method=_METHOD.value
        )
        samples = Pictures(images, labels)
    metrics = proxy_metrics(train, heldout, samples, dataset.metadata.num_classes, _SEED.value)

    for name, value in metrics.items():
        print(f"{name:36} {value:9.4f}")
    flag_values = (_WORKDIR, _CFG_SCALE, _NUM_STEPS, _METHOD, _SEED, _WEIGHTS, _SAMPLES)
    counts = {"num_samples": len(samples.labels), "num_train": len(train.labels), "num_heldout": len(heldout.labels)}
    _write_json(output, {**metrics, **counts, "flags": {flag.name: flag.value for flag in flag_values}})
    print(f"written to {output}; judged by a classifier of this data set, so not an FID")


def _open_pictures(path: str) -> Dataset:
    dataset = open_dataset(path)
    if dataset.metadata.codec != "none":
        raise UserError(f"{path} holds latents ({dataset.metadata.codec}): the classifier judges data sets of pictures")
    return dataset


def _read_pictures(dataset: Dataset, split: str) -> Pictures:
    records = dataset.records(split, in_memory=True)
    batch = records.read(np.arange(len(records)))
    return Pictures(batch["mean"].astype(np.float32), batch["label"])


def _load_samples(path: str, channels: int) -> Pictures:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["arr_0"], arrays["labels"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"--samples={path}: not an npz with arr_0 and labels ({error})") from error
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(f"--samples={path}: arr_0 is {images.dtype} {images.shape}, expected uint8 (N, H, W, C)")
    if channels == 1 and images.shape[-1] == 3 and (images == images[..., :1]).all():
        images = images[..., :1]  # terdit_jax.sample writes grey pictures as evaluators want them, in three channels
    return Pictures(images.astype(np.float32) / 127.5 - 1, labels)


def _write_json(path: epath.Path, content: dict) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=2) + "\n")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error})") from error


if __name__ == "__main__":
    run_command(main)
