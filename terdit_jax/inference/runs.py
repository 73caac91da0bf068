"""A trained run as something that draws pictures: its newest checkpoint, on all devices, ternary weights at 2 bits."""

import dataclasses

from etils import epath
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from terdit_jax.config import base_config
from terdit_jax.errors import UserError
from terdit_jax.inference.decoding import to_pictures
from terdit_jax.inference.sampling import draw_all, make_draw
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.transformer import abstract_params, make_operands
from terdit_jax.parallel.mesh import make_mesh
from terdit_jax.parallel.sharding import abstract_sharded
from terdit_jax.training.checkpoint import Checkpoints

WEIGHTS = ("ema", "raw")


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A model ready to draw. `config` is its run's; `step` the step it has reached."""

    config: ConfigDict
    step: int
    model: DiTConfig
    mesh: Mesh
    operands: dict
    latent_scale: float
    codec: str  # "none" where the model draws pixels

    def draw(
        self,
        labels: np.ndarray,
        *,
        seed: int = 0,
        num_steps: int | None = None,
        cfg_scale: float | None = None,
        method: str | None = None,
        batch_size: int = 256,
        report=lambda done: None,
    ) -> np.ndarray:
        """Draws a picture for each label; what is left out is as `config.sample` has it.

        Returns:
          (N, H, W, C) float32, in [-1, 1] up to what sampling overshoots.

        Raises:
          UserError: labels the model does not have, or settings the sampler does not know.
        """
        check_labels(labels, self.model.num_classes)
        settings = self.config.sample.copy_and_resolve_references()
        given = {"num_steps": num_steps, "cfg_scale": cfg_scale, "method": method}
        settings.update({name: value for name, value in given.items() if value is not None})
        draw = make_draw(self.model, settings, seed)
        latents = draw_all(draw, self.operands, labels, self.mesh, batch_size=batch_size, report=report)
        return to_pictures(latents, self.latent_scale)


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raises UserError naming the first label that the model does not have."""
    bad = [int(label) for label in labels if not 0 <= label < num_classes]
    if bad:
        raise UserError(f"label {bad[0]} is out of range: the model has classes 0 to {num_classes - 1}")


def load_sampler(workdir: epath.PathLike, weights: str = "ema") -> Sampler:
    """The newest sound checkpoint of a run, its EMA (`ema`) or raw weights (`raw`), on every device there is.

    Raises:
      UserError: no such run, no sound checkpoint, or unknown `weights`.
    """
    if weights not in WEIGHTS:
        raise UserError(f"weights {weights!r}: choose one of {', '.join(WEIGHTS)}")
    if not (epath.Path(workdir) / "checkpoints").exists():
        raise UserError(f"{workdir} holds no run: give the --workdir of a training run that has saved a checkpoint")
    checkpoints = Checkpoints(workdir)
    run = checkpoints.newest_run()
    if run is None:
        raise UserError(f"{workdir} holds no checkpoint yet: train until the first one is saved")
    config = base_config()
    config.update(run["config"])
    config.mesh.update({"data": -1, "fsdp": 1, "tensor": 1})
    model, mesh = DiTConfig.from_config(config), make_mesh(config.mesh)
    name = {"ema": "ema_params", "raw": "params"}[weights]
    state, run = checkpoints.restore(abstract_sharded({name: abstract_params(model)}, mesh))
    with jax.set_mesh(mesh):
        operands = jax.jit(lambda params: make_operands(model, params, packed=model.ternary))(state[name])
    return Sampler(config, run["step"], model, mesh, operands, run["latent_scale"], run["codec"])
