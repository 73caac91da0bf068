"""A run's configuration, devices and data, checked against each other before anything is written."""

import dataclasses
from functools import partial
import math

from etils import epath
import jax
from jax.sharding import Mesh
import optax

from terdit_jax.config import RunConfig
from terdit_jax.data.reader import AnyDataset, open_dataset
from terdit_jax.data.synthetic import make_synthetic
from terdit_jax.diffusion.objective import Objective, make_objective
from terdit_jax.errors import UserError
from terdit_jax.fast.plan import choose_plan
from terdit_jax.files import check_folder
from terdit_jax.memory import check_host, host_memory
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.plan import Plan
from terdit_jax.model.transformer import abstract_params
from terdit_jax.parallel.compiler_options import check_options, compiler_options
from terdit_jax.parallel.mesh import make_mesh, on_mesh
from terdit_jax.parallel.sharding import AnyMesh, abstract_sharded, batch_shards, check_heads
from terdit_jax.paths import as_path
from terdit_jax.training.optimizer import make_optimizer
from terdit_jax.training.teacher import Teacher
from terdit_jax.training.trackers import check_writers

_STATE_COPIES = 4  # of every parameter in float32: itself, two moments, EMA


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts of a run whose configuration has been found sound."""

    config: RunConfig
    workdir: epath.Path
    model: DiTConfig
    mesh: Mesh
    dataset: AnyDataset
    objective: Objective
    optimizer: optax.GradientTransformationExtraArgs
    plan: Plan
    teacher: Teacher | None = None  # of `inference.teacher`


def set_up(config: RunConfig, workdir: epath.PathLike) -> Setup:
    """Checks configuration, devices, data and workdir against each other; writes nothing.

    Raises:
      UserError: with the first thing that does not fit.
    """
    model, objective = DiTConfig.from_config(config), make_objective(config.diffusion, config.model.learn_sigma)
    mesh = make_mesh(config.mesh)
    check_run(config, model, mesh)
    check_writers(config.log)
    if model.attention == "cudnn" and mesh.devices.flat[0].platform != "gpu":
        raise UserError("config.compute.attention='cudnn' runs on GPUs, and there is none: give 'auto'")
    plan = choose_plan(model, mesh)
    if config.train.soft_start_steps:  # what the ternary step would refuse only when it is reached
        on_mesh(mesh, partial(jax.eval_shape, partial(plan.make_operands, model)))(abstract_params(model))
    check_memory(config, model, mesh, plan)
    check_arrays(model, mesh, plan)
    check_options(compiler_options(config, mesh), jax.local_devices()[0])
    dataset = _open_data(config, model)
    workdir = as_path(workdir, "--workdir")
    check_folder(workdir, "--workdir")
    return Setup(config, workdir, model, mesh, dataset, objective, make_optimizer(config.optimizer), plan)


def check_run(config: RunConfig, model: DiTConfig, mesh: AnyMesh) -> None:
    """Raises UserError for fields that no run can have together, on this mesh."""
    check_division(config, model, mesh)
    if not (config.train.init_labels or config.train.init_from):
        raise UserError("config.train.init_labels=False: is about config.train.init_from, which is empty; give True")
    _check_soft_start(config)


def check_division(config: RunConfig, model: DiTConfig, mesh: AnyMesh) -> None:
    """Raises UserError if batch or heads do not divide over the mesh."""
    batch_size, accumulation = config.train.batch_size, config.train.accumulation_steps
    if batch_size % (accumulation * batch_shards(mesh)):
        raise UserError(
            f"config.train.batch_size={batch_size} is not divisible by accumulation_steps={accumulation} times the "
            f"{batch_shards(mesh)} devices of mesh axes data and fsdp"
        )
    check_heads(model.num_kv_heads, mesh)


def _check_soft_start(config: RunConfig) -> None:
    """Raises UserError for a soft start that has nowhere to go: to no ternary weights, to scales that have nothing to
    do with the weights, or past the end."""
    steps, model = config.train.soft_start_steps, config.model
    if not steps:
        return
    if not model.ternary:
        advice = "ends at ternary weights, and config.model.ternary=False; give 0"
    elif model.alpha_init != "least_squares" and not config.train.init_from:
        advice = f"ends at alpha T, and config.model.alpha_init={model.alpha_init!r}; give 'least_squares'"
    elif steps >= config.train.num_steps:
        advice = f"is not over before config.train.num_steps={config.train.num_steps}; give fewer, or more of those"
    else:
        return
    raise UserError(f"config.train.soft_start_steps={steps}: {advice}")


def check_memory(config: RunConfig, model: DiTConfig, mesh: Mesh, plan: Plan, teacher: int = 0) -> None:
    """Raises UserError for what no device or host here can hold: by the least that a run needs, so it misses some.

    `teacher`: bytes that a device holds of one.
    """
    local, shards = mesh.local_devices, mesh.shape["fsdp"] * mesh.shape["tensor"]
    state = _STATE_COPIES * 4 * model.num_params // shards + teacher
    examples = max(1, config.train.batch_size // (config.train.accumulation_steps * batch_shards(mesh)))
    tokens = model.num_tokens // mesh.shape["tensor"]
    numbers = examples * tokens * model.hidden_size * model.depth
    if plan.attention == "xla":  # which makes the scores of all pairs of tokens
        numbers += examples * model.num_heads // mesh.shape["tensor"] * model.num_tokens**2
    kept = numbers * model.activation_dtype.itemsize
    limit = (local[0].memory_stats() or {}).get("bytes_limit") or host_memory() // len(local)
    if state + kept > limit:
        raise UserError(
            f"config.model of {model.num_params:,} parameters, config.train.batch_size={config.train.batch_size}: a "
            f"device would hold at least {state + kept:,} bytes of its {limit:,}; give a smaller model, smaller "
            "microbatches (train.accumulation_steps) or more devices"
        )
    example = 4 * math.prod(model.sample_shape)  # bytes of a record, and of a drawn image
    prefetched = config.train.batch_size // jax.process_count() * example * (config.data.prefetch + 2)
    what = f"config.train.batch_size={config.train.batch_size}, config.data.prefetch={config.data.prefetch}"
    check_host(prefetched, what, "give fewer of either")
    for field, every, count in (
        ("sample.num_images", config.log.samples_every, config.sample.num_images),
        ("log.score_samples", config.log.score_every, config.log.score_samples),
    ):
        if every:
            check_host(5 * count * example, f"config.{field}={count}", "give fewer")


def check_arrays(model: DiTConfig, mesh: Mesh, plan: Plan) -> None:
    """Raises UserError if a parameter, or what the forward pass makes of it, cannot be cut as the mesh asks for."""
    params = abstract_sharded(abstract_params(model), mesh)
    with jax.set_mesh(mesh):
        jax.eval_shape(partial(plan.make_operands, model), params)


def _open_data(config: RunConfig, model: DiTConfig) -> AnyDataset:
    if config.data.synthetic:
        return make_synthetic(model.sample_shape, model.num_classes)
    if not config.data.dir:
        raise UserError("config.data.dir is empty: name a prepared data set, or set config.data.synthetic=True")
    dataset = open_dataset(config.data.dir)
    metadata = dataset.metadata
    if tuple(metadata.shape) != model.sample_shape:
        raise UserError(
            f"{config.data.dir} holds records of shape {tuple(metadata.shape)}, the model takes {model.sample_shape} "
            "(config.model.input_size and in_channels)"
        )
    if metadata.num_classes != model.num_classes:
        raise UserError(
            f"{config.data.dir} has {metadata.num_classes} classes, config.model.num_classes={model.num_classes}"
        )
    if config.data.horizontal_flip and metadata.codec != "none" and not metadata.has_mirror:
        raise UserError(f"{config.data.dir} has no mirrored latents: set config.data.horizontal_flip=False")
    return dataset
