"""The cost of 8-bit activations in a trained model: errors of its predictions, and of pictures by the proxy's judge.

python -m benchmarks.mode_error --workdir=runs/digits --output=docs/benchmarks/mode_error_digits.json

Predictions are of held-out pictures noised to ten timesteps, their error the root mean square of eps against float32's
over that of eps. Pictures are drawn with the run's own settings from the same noise in every mode, and judged as
`terdit_jax.evaluate` does, in several sets. Every mode runs on any device, which computes 8-bit numbers or imitates
them: the numbers are those of the mode, the speed is not.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import datetime
import functools
import json
import pathlib
import platform
import sys

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from terdit_jax.checkpoints.reader import Checkpoints
from terdit_jax.data.reader import open_dataset
from terdit_jax.diffusion.schedule import linear_schedule
from terdit_jax.errors import UserError, run_command
from terdit_jax.evaluation.classifier import train_classifier
from terdit_jax.evaluation.judge import read_images
from terdit_jax.evaluation.proxy import LabelledImages, classifier_steps, proxy_metrics, sample_labels
from terdit_jax.fast.inference_pass import inference_forward, make_inference_operands
from terdit_jax.fast.modes import Numerics
from terdit_jax.inference.runtime import Denoiser, place_operands
from terdit_jax.interop.weights import open_weights
from terdit_jax.parallel.mesh import single_device_mesh
from terdit_jax.paths import define_path
from terdit_jax.versions import versions

_WORKDIR = define_path("workdir", None, "Run of a ternary model on a data set of pictures.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 2000, "Pictures of a set.", lower_bound=2)
_NUM_SETS = flags.DEFINE_integer("num_sets", 3, "Sets that are drawn in each mode and judged.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 500, "Pictures drawn at once.", lower_bound=1)
_NUM_NOISED = flags.DEFINE_integer("num_noised", 200, "Held-out pictures noised to each timestep.", lower_bound=1)
_OUTPUT = define_path("output", "mode_error.json", "JSON file.")

TIMESTEPS = tuple(range(50, 1000, 100))
NUMERICS = {
    "float32": Numerics("packed", "float32", "float32"),
    "exact": Numerics("packed", "bfloat16", "bfloat16"),
    "fast, fp8": Numerics("packed", "float8_e4m3fn", "bfloat16"),
    "fast, int8": Numerics("packed", "int8", "int32"),
}


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    if not _WORKDIR.value:
        raise UserError("--workdir is missing: name the directory of a run, such as --workdir=runs/digits")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    packed = load_packed(_WORKDIR.value)
    dataset = open_dataset(Checkpoints(_WORKDIR.value).newest_run()["config"]["data"]["dir"])
    train, heldout = (read_images(dataset, split) for split in ("train", "heldout"))
    classifier = train_classifier(
        train.images, train.labels, dataset.metadata.num_classes, 0, classifier_steps(len(train.images))
    )
    judge = functools.partial(
        proxy_metrics, train, heldout, num_classes=dataset.metadata.num_classes, classifier=classifier
    )
    reference = predictions(in_numbers(packed, NUMERICS["float32"]), heldout)
    rows = []
    for name, numerics in NUMERICS.items():
        model = in_numbers(packed, numerics)
        errors = relative_errors(predictions(model, heldout), reference)
        scores = [judge(pictures) for pictures in draw_sets(model, sample_labels(heldout.labels, _NUM_SAMPLES.value))]
        ratios, agreements = (
            [score[f"classifier_{key}"] for score in scores] for key in ("frechet_ratio", "agreement")
        )
        rows.append(
            {
                "mode": name,
                "eps_error_by_timestep": dict(zip(map(str, TIMESTEPS), errors, strict=True)),
                "eps_error": float(np.sqrt(np.mean(np.square(errors)))),
                "frechet_ratio": float(np.mean(ratios)),
                "frechet_ratio_std": float(np.std(ratios, ddof=1)) if len(ratios) > 1 else None,
                "agreement": float(np.mean(agreements)),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    content = {
        "command": " ".join(["python -m benchmarks.mode_error", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}",
        "python": sys.version.split()[0],
        "versions": versions("jax", "jaxlib", "flax", "numpy"),
        "num_samples": _NUM_SAMPLES.value,
        "num_sets": _NUM_SETS.value,
        "rows": rows,
    }
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(content, indent=1) + "\n")
    print(table(rows))


def load_packed(workdir: str) -> Denoiser:
    """The run's model for the forward pass of training over packed codes, whatever the device.

    Raises:
      UserError: a full-precision model.
    """
    weights = open_weights(workdir)
    if not weights.model.ternary:
        raise UserError(f"--workdir={workdir}: modes are of ternary models, and this one is full precision")
    config = dataclasses.replace(weights.model, dtype="float32")
    mesh = single_device_mesh()
    return Denoiser(config, weights.description, mesh, None, place_operands(config, weights.leaves(), mesh))


def in_numbers(packed: Denoiser, numerics: Numerics) -> Denoiser:
    """The same model in other numbers."""
    dtype = "float32" if numerics.matmul_dtype == "float32" else "bfloat16"
    config = dataclasses.replace(packed.config, dtype=dtype)
    operands = make_inference_operands(config, numerics, packed.operands)
    return dataclasses.replace(packed, config=config, numerics=numerics, operands=operands)


def predictions(model: Denoiser, heldout: LabelledImages) -> np.ndarray:
    """(timesteps, B, H, W, C) eps of held-out pictures, from the same noise for every model."""
    images, labels = (jnp.asarray(array[: _NUM_NOISED.value]) for array in heldout)
    schedule, made = linear_schedule(), []
    network = jax.jit(functools.partial(inference_forward, model.config, model.numerics))
    for t in TIMESTEPS:
        noise = jax.random.normal(jax.random.key(t), images.shape)
        x_t = schedule.sqrt_alphas_cumprod[t] * images + schedule.sqrt_one_minus_alphas_cumprod[t] * noise
        with matmul_precision(model.numerics):
            out = network(model.operands, x_t.astype(jnp.float32), jnp.full(len(labels), t), labels)
        made.append(np.split(np.asarray(out, np.float64), 2, axis=-1)[0])
    return np.stack(made)


def draw_sets(model: Denoiser, labels: np.ndarray) -> Iterator[LabelledImages]:
    """The same sets for every model: further pictures of one seed, independent and compiled for once."""
    for first in range(0, _NUM_SETS.value * len(labels), len(labels)):
        with matmul_precision(model.numerics):
            images = model.draw(labels, seed=0, first=first, batch_size=_BATCH_SIZE.value)
        yield LabelledImages(np.clip(images, -1, 1), labels)


def matmul_precision(numerics: Numerics) -> contextlib.AbstractContextManager:
    """GPUs and TPUs round float32 operands unless told not to."""
    return jax.default_matmul_precision("highest" if numerics.matmul_dtype == "float32" else "default")


def relative_errors(eps: np.ndarray, reference: np.ndarray) -> list[float]:
    """The relative error at each timestep."""
    norm = lambda array: np.linalg.norm(array.reshape(len(array), -1), axis=1)  # noqa: E731
    return (norm(eps - reference) / norm(reference)).tolist()


def table(rows: list[dict]) -> str:
    """The Markdown table of docs/deployment.md."""
    lines = ["| Mode | error of eps | Frechet ratio | read as the label asked for |", "|---|---|---|---|"]
    for row in rows:
        spread = f" ± {row['frechet_ratio_std']:.3f}" if row["frechet_ratio_std"] is not None else ""
        cells = [
            row["mode"],
            f"{row['eps_error']:.2%}",
            f"{row['frechet_ratio']:.3f}{spread}",
            f"{row['agreement']:.2%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
