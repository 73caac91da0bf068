"""Draws images, one grid or a set of any size, over all devices and processes.

python -m terdit_jax.sample --model=runs/digits --labels=0,1,2 --output=grid.png
python -m terdit_jax.sample --model=runs/digits --num_samples=50000 --output=samples.npz

The second command, given again, goes on where it was stopped (docs/sampling.md).
"""

from absl import flags

from terdit_jax.choices import (
    ALL_METHODS,
    DRAW_BATCH_SIZE,
    DTYPES,
    LABEL_ORDERS,
    MAX_CFG_SCALE,
    MODES,
    NUM_TIMESTEPS,
    SPACINGS,
)
from terdit_jax.errors import parse_flags
from terdit_jax.options import (
    MAX_BATCH,
    MAX_IMAGES,
    define_compilation_cache,
    define_float,
    define_num_heads,
    define_objective,
)
from terdit_jax.paths import define_path

_MODEL = define_path("model", None, "A workdir, an artifact, a published checkpoint, safetensors, a name on the Hub.")
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint of a workdir; the newest sound one if left out.", 0)
_NUM_HEADS = define_num_heads()
_OBJECTIVE = define_objective()
_LABELS = flags.DEFINE_list("labels", None, "Classes to draw, by number or name; all of them if left out.")
_LABEL_ORDER = flags.DEFINE_enum("label_order", "balanced", LABEL_ORDERS, "The classes in turn, or drawn by seed.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", None, "Images; one for each label if left out.", 1, MAX_IMAGES)
_NUM_STEPS = flags.DEFINE_integer(
    "num_steps", None, "Denoising steps; the run's config.sample if left out.", 1, NUM_TIMESTEPS
)
_METHOD = flags.DEFINE_enum("method", None, ALL_METHODS, "Sampler; the run's config.sample if left out.")
_SPACING = flags.DEFINE_enum("spacing", None, ("auto", *SPACINGS), "Of the steps; as config.sample if left out.")
_CFG_SCALE = define_float(
    "cfg_scale", None, "Guidance, 1 is none; the run's config.sample if left out.", low=0, high=MAX_CFG_SCALE
)
_CFG_T_MIN = flags.DEFINE_integer(
    "cfg_t_min", None, "First timestep guided; the run's config.sample if left out.", 0, NUM_TIMESTEPS - 1
)
_CFG_T_MAX = flags.DEFINE_integer("cfg_t_max", None, "First timestep no longer guided; likewise.", 1, NUM_TIMESTEPS)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Of all noise: image i depends on (seed, i) alone.", lower_bound=0, upper_bound=2**32 - 1
)
_WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "raw"], "Which weights, where there are both.")
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Of activations; bfloat16 if left out, but float32 on CPUs.")
_MODE = flags.DEFINE_enum("mode", "auto", list(MODES), "Memory, speed and numbers of the weights (docs/deployment.md).")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", DRAW_BATCH_SIZE, "Images that a process draws at once.", 1, MAX_BATCH)
_VAE = define_path("vae", None, "Folder of the autoencoder of the latents, such as sd-vae-ft-ema.")
_CACHE = define_compilation_cache()
_OUTPUT = define_path(
    "output", None, "A .png for a grid, replaced if there, a .npz for arr_0 (uint8) and labels, else a folder of PNGs."
)

parse_flags(__name__)  # answers --help and wrong flags before the imports below, which take seconds

from collections.abc import Callable, Sequence
import dataclasses
import re
import time
from typing import Any

from etils import epath
import jax
import numpy as np

from terdit_jax.config_sections import SampleConfig
from terdit_jax.diffusion.objective import make_objective
from terdit_jax.diffusion.spacing import resolve_spacing
from terdit_jax.errors import UserError, run_command
from terdit_jax.files import check_output
from terdit_jax.inference.image_set import SHARD_SIZE, digest, draw_set, make_labels, make_plan
from terdit_jax.inference.images import class_columns, make_grid, save_png, to_uint8
from terdit_jax.inference.runtime import Denoiser, load_model
from terdit_jax.inference.sampling import check_settings
from terdit_jax.inference.shards import Shards, check_set
from terdit_jax.interop.vae_weights import load_vae
from terdit_jax.labels import check_labels, find_classes
from terdit_jax.memory import check_host
from terdit_jax.parallel.mesh import local_mesh
from terdit_jax.parallel.processes import initialize_processes
from terdit_jax.programs import keep_programs


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    if not _MODEL.value or not _OUTPUT.value:
        raise UserError("--model and --output are both needed, e.g. --model=runs/digits --output=grid.png")
    output = epath.Path(_OUTPUT.value)
    if output.suffix not in ("", ".png", ".npz"):
        raise UserError(f"--output={output}: must end in .png or .npz, or name a folder")
    if output.suffix == ".png":
        check_output(output, replace=True)
    else:
        check_set(output)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    initialize_processes()
    keep_programs(_CACHE.value, "--compilation_cache")
    vae = load_vae(_VAE.value) if _VAE.value else None
    given = {
        "num_steps": _NUM_STEPS.value, "method": _METHOD.value, "spacing": _SPACING.value,
        "cfg_scale": _CFG_SCALE.value, "cfg_t_min": _CFG_T_MIN.value, "cfg_t_max": _CFG_T_MAX.value,
    }  # fmt: skip

    def compile_ahead(model: Denoiser) -> None:
        count = len(_make_labels(model))
        model.compile_draw(count, batch_size=_batch_size(count, output), **given)

    model = load_model(
        _MODEL.value,
        mesh=local_mesh(),
        ema=_WEIGHTS.value == "ema",
        step=_STEP.value,
        dtype=_DTYPE.value,
        mode=_MODE.value,
        num_heads=_NUM_HEADS.value,
        objective=_OBJECTIVE.value,
        check=_make_labels,
        meanwhile=compile_ahead,
    )
    pixels = model.description.codec == "none" and model.config.in_channels in (1, 3)
    if output.suffix != ".png" and not (pixels or vae):
        raise UserError(f"--output={output}: this model draws latents: give --vae, or .png for a preview")
    labels = _make_labels(model)
    settings = model.settings_with(**given)
    check_settings(settings, make_objective(model.description.diffusion, model.config.learn_sigma))
    settings = dataclasses.replace(settings, spacing=resolve_spacing(settings.spacing, settings.method))
    options = {"seed": _SEED.value, "vae": vae, **given}
    how = f"{settings.method}, {settings.num_steps} steps, guidance {settings.cfg_scale:g}"
    _say(f"drawing {len(labels):,} images by {how}")
    if output.suffix == ".png":
        size = (vae[0].downsampling if vae else 1) * model.config.input_size
        check_host(20 * len(labels) * size**2, f"--num_samples={len(labels)}", "write a .npz, which is drawn in parts")
        _draw_grid(model, output, labels, options)
    else:
        _draw_set(model, output, labels, settings, options)


def _draw_grid(model: Denoiser, output: epath.Path, labels: np.ndarray, options: dict[str, Any]) -> None:
    if jax.process_index():
        return
    begin = time.perf_counter()
    images = model.draw(
        labels, batch_size=_BATCH_SIZE.value, report=lambda done: _say(f"{done}/{len(labels)} images"), **options
    )
    names = model.class_names
    columns = class_columns(len(labels), len(_parse_classes(model))) if names else 0
    save_png(output, make_grid(to_uint8(images), columns, [names[label] for label in labels] if names else ()))
    _say_done(model, len(labels), begin, output)


def _draw_set(
    model: Denoiser,
    output: epath.Path,
    labels: np.ndarray,
    settings: SampleConfig,
    options: dict[str, Any],
) -> None:
    description, vae = model.description, options["vae"]
    plan = make_plan(
        model={
            "name": description.name, "step": description.step, "ema": description.ema, "dtype": model.config.dtype,
            "numerics": str(model.numerics), "diffusion": vars(description.diffusion),
            "weights": digest(model.operands), "vae": digest(vae[1]) if vae else None,
        },
        settings=vars(settings),
        labels={"order": _LABEL_ORDER.value, "classes": _parse_classes(model)},
        num_samples=len(labels),
        seed=_SEED.value,
    )  # fmt: skip
    shards = Shards(output, plan)
    if shards.is_complete():
        _say(f"{output} is complete: it holds the {len(labels):,} images of these settings")
        return
    begin = time.perf_counter()
    batch_size = _batch_size(len(labels), output)

    def draw(of_shard: np.ndarray, first: int, report: Callable[[int], None]) -> np.ndarray:
        # The last shard may be smaller than a batch.
        return model.draw(of_shard, first=first, batch_size=batch_size, whole_batches=True, report=report, **options)

    draw_set(shards, labels, draw, _say)
    _say_done(model, len(labels), begin, output)


def _parse_classes(model: Denoiser) -> list[int]:
    """The classes of --labels, or all if it is left out."""
    if _LABELS.value is None:
        return list(range(model.config.num_classes))
    prefix, classes = f"--labels={','.join(_LABELS.value)}: ", []
    for label in _LABELS.value or [""]:
        is_number = re.fullmatch(r"-?[0-9]{1,10}", label)
        classes += [int(label)] if is_number else find_classes([label], model.class_names, prefix=prefix)
    return classes


def _make_labels(model: Denoiser) -> np.ndarray:
    """The labels to draw."""
    classes = _parse_classes(model)
    check_labels(classes, model.config.num_classes)
    return make_labels(classes, _NUM_SAMPLES.value or len(classes), _LABEL_ORDER.value, _SEED.value)


def _batch_size(count: int, output: epath.Path) -> int:
    """Images at once. Batches of a set have one size that fills a shard as evenly as can be: what is drawn beyond it is
    thrown away."""
    shard = min(SHARD_SIZE, count)
    return _BATCH_SIZE.value if output.suffix == ".png" else -(-shard // -(-shard // _BATCH_SIZE.value))


def _say_done(model: Denoiser, count: int, begin: float, output: epath.Path) -> None:
    description, seconds = model.description, time.perf_counter() - begin
    which = description.name if description.step is None else f"{description.name} (step {description.step:,})"
    _say(f"{output}: {count:,} images of {which}, in {seconds:.1f} s")


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    run_command(main)
