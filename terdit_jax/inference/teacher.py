"""Opens the teacher that `config.train.teacher` names, checks that the run can learn from it, and loads it.

What a step makes of its predictions belongs to `training.teacher`.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import math

from jax.sharding import Mesh
import numpy as np

from terdit_jax.config import RunConfig
from terdit_jax.errors import UserError
from terdit_jax.inference.runtime import Denoiser, abstract_operands, describe_denoiser, load_denoiser
from terdit_jax.interop.description import Description
from terdit_jax.interop.published import Leaves
from terdit_jax.interop.safetensors import as_bytes
from terdit_jax.interop.weights import Weights, open_weights
from terdit_jax.parallel.sharding import chip_bytes
from terdit_jax.reproducible import pinned
from terdit_jax.training.setup import Setup, check_memory
from terdit_jax.training.teacher import Teacher


@pinned()
def load_teacher(setup: Setup) -> Teacher | None:
    """The teacher of a run on its mesh, averaged weights where there are both; None for a run without one.

    Its weights pass through host memory leaf by leaf, as `load_model` has them, and are hashed on the way. Where the
    mesh cuts matrices they lie as the student's do, and a scan over the layers gathers one at a time.

    Raises:
      UserError: naming the field, for what cannot be read, predicts something else than the run learns, or fits neither
        the mesh nor the memory beside the run.
    """
    opened = _open(setup.config, setup.mesh, setup.dataset.metadata.latent_scale)
    if opened is None:
        return None
    weights, model = opened
    digest = hashlib.sha256()
    with _named(setup.config):
        check_memory(setup.config, setup.model, setup.mesh, setup.plan, chip_bytes(model.operands))
        model = load_denoiser(model, _hashed(weights.leaves(), digest))
    return _make_teacher(setup.config, model, digest.hexdigest())


def abstract_teacher(config: RunConfig, mesh: Mesh) -> Teacher | None:
    """Like `load_teacher`, with shapes in place of operands: little is read, and the mesh's devices may be absent."""
    opened = _open(config, mesh)
    return _make_teacher(config, opened[1], "") if opened else None


def _open(config: RunConfig, mesh: Mesh, latent_scale: float | None = None) -> tuple[Weights, Denoiser] | None:
    train, compute = config.train, config.compute
    if not (train.teacher and train.teacher_weight):
        return None
    mode = "plain" if (train.teacher_mode, compute.plan) == ("auto", "plain") else train.teacher_mode
    with _named(config):
        weights = open_weights(train.teacher)
        check_teacher(config, weights.description, latent_scale)
        # Of the student's computing, what its devices can be without.
        attention = "xla" if compute.attention == "xla" else "auto"
        as_run = dataclasses.replace(weights.model, attention=attention, passes=compute.passes)
        description = dataclasses.replace(weights.description, model=as_run)
        model = describe_denoiser(description, mesh, compute.dtype, mode)
        return weights, dataclasses.replace(model, operands=abstract_operands(model.config, model.numerics, mesh))


def check_teacher(config: RunConfig, teacher: Description, latent_scale: float | None = None) -> None:
    """Raises UserError unless a teacher predicts what the run learns, from the same inputs.

    Family, size, precision, the variance and how t was drawn may differ.

    Args:
      config: of the run.
      teacher: what it says of itself.
      latent_scale: of the run's data set, if known.
    """
    student = config.model
    pairs = {
        "diffusion.objective": (teacher.diffusion.objective, config.diffusion.objective),
        "diffusion.path": (teacher.diffusion.path, config.diffusion.path),
        "model.input_size": (teacher.model.input_size, student.input_size),
        "model.in_channels": (teacher.model.in_channels, student.in_channels),
        "model.num_classes": (teacher.model.num_classes, student.num_classes),
    }
    for field, (given, wanted) in pairs.items():
        if given != wanted:
            raise UserError(f"has {field}={given}, the run has {wanted}: give a teacher of the same")
    if latent_scale is not None and not math.isclose(teacher.latent_scale, latent_scale, rel_tol=1e-6):
        raise UserError(
            f"was trained on latents scaled by {teacher.latent_scale}, config.data.dir has {latent_scale}: give a "
            "teacher of the same data"
        )
    if student.class_dropout_prob and not teacher.model.class_dropout_prob:
        raise UserError(
            f"was trained with model.class_dropout_prob=0 and knows no null class, the run has "
            f"{student.class_dropout_prob}: give 0, or another teacher"
        )


def _make_teacher(config: RunConfig, model: Denoiser, fingerprint: str) -> Teacher:
    described = model.description
    step = "" if described.step is None else f" after {described.step:,} steps"
    kind = "ternary" if model.config.ternary else "full precision"
    title = f"{config.train.teacher}, {described.name}{step}, {model.config.num_params:,} parameters ({kind})"
    return Teacher(model.operands, model.predict, config.train.teacher_weight, fingerprint, title)


def _hashed(leaves: Leaves, digest: "hashlib._Hash") -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in leaves:
        digest.update(path.encode())
        digest.update(as_bytes(leaf))
        yield path, leaf


@contextlib.contextmanager
def _named(config: RunConfig) -> Iterator[None]:
    """Has errors begin with the field."""
    try:
        yield
    except UserError as error:
        raise UserError(f"config.train.teacher={config.train.teacher}: {error}") from error
