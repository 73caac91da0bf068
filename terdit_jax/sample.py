"""Draws pictures: `python -m terdit_jax.sample --model=runs/digits --labels=0,1,2 --output=grid.png`."""

from collections.abc import Sequence
import time

from absl import flags
from etils import epath
import jax
import numpy as np

from terdit_jax.config import base_config
from terdit_jax.errors import UserError, run_command
from terdit_jax.inference.pictures import make_grid, save_npz, save_png, to_uint8
from terdit_jax.inference.runtime import DTYPES, load_model
from terdit_jax.interop.vae_weights import load_vae
from terdit_jax.parallel.mesh import initialize_processes, make_mesh

_MODEL = flags.DEFINE_string("model", None, "A workdir, an artifact, a published checkpoint, or safetensors.")
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint of a workdir; the newest sound one if left out.")
_LABELS = flags.DEFINE_list("labels", None, "Classes, given to the pictures in turn; all of them if left out.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", None, "Pictures; one for each label if left out.")
_NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Denoising steps; the run's config.sample if left out.")
_METHOD = flags.DEFINE_string("method", None, "ddpm or ddim; the run's config.sample if left out.")
_CFG_SCALE = flags.DEFINE_float("cfg_scale", None, "Guidance, 1 is none; the run's config.sample if left out.")
_SEED = flags.DEFINE_integer("seed", 0, "Of all noise: picture i depends on (seed, i) alone.")
_WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "raw"], "Which weights, where there are both.")
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Of activations; bfloat16 if left out, but float32 on CPUs.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Pictures drawn at once.")
_VAE = flags.DEFINE_string("vae", None, "Folder of the autoencoder of the latents, such as sd-vae-ft-ema.")
_OUTPUT = flags.DEFINE_string("output", None, "A .png for a grid, a .npz for arr_0 (uint8) and labels.")


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    if not _MODEL.value or not _OUTPUT.value:
        raise UserError("--model and --output are both needed, e.g. --model=runs/digits --output=grid.png")
    if not _OUTPUT.value.endswith((".png", ".npz")):
        raise UserError(f"--output={_OUTPUT.value}: must end in .png or .npz")
    for flag in (_NUM_SAMPLES, _NUM_STEPS, _BATCH_SIZE):
        if flag.value is not None and flag.value < 1:
            raise UserError(f"--{flag.name}={flag.value}: must be positive")
    if _CFG_SCALE.value is not None and _CFG_SCALE.value < 0:
        raise UserError(f"--cfg_scale={_CFG_SCALE.value}: must not be negative")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    initialize_processes()
    vae = load_vae(_VAE.value) if _VAE.value else None
    model = load_model(
        _MODEL.value,
        mesh=make_mesh(base_config().mesh),
        ema=_WEIGHTS.value == "ema",
        step=_STEP.value,
        dtype=_DTYPE.value,
    )
    description = model.description
    pixels = description.codec == "none" and model.config.in_channels in (1, 3)
    if _OUTPUT.value.endswith(".npz") and not (pixels or vae):
        raise UserError(f"--output={_OUTPUT.value}: this model draws latents: give --vae, or .png for a preview")
    labels = _parse_labels(model.config.num_classes)
    begin = time.perf_counter()
    images = model.draw(
        labels,
        seed=_SEED.value,
        num_steps=_NUM_STEPS.value,
        cfg_scale=_CFG_SCALE.value,
        method=_METHOD.value,
        vae=vae,
        batch_size=_BATCH_SIZE.value,
        report=lambda done: print(f"{done}/{len(labels)} pictures", flush=True),
    )
    if jax.process_index() == 0:
        pictures, path = to_uint8(images), epath.Path(_OUTPUT.value)
        save_png(path, make_grid(pictures)) if path.suffix == ".png" else save_npz(path, pictures, labels)
        seconds = time.perf_counter() - begin
        which = description.name if description.step is None else f"{description.name}, step {description.step:,}"
        print(f"{len(labels)} pictures of {which} in {seconds:.1f} s: {path}", flush=True)


def _parse_labels(num_classes: int) -> np.ndarray:
    """(N,) int labels in turn."""
    try:
        labels = np.array([int(label) for label in _LABELS.value or range(num_classes)])
    except ValueError:
        raise UserError(f"--labels={','.join(_LABELS.value)}: give whole numbers, as 0,1,2") from None
    return np.resize(labels, _NUM_SAMPLES.value or len(labels))


if __name__ == "__main__":
    run_command(main)
