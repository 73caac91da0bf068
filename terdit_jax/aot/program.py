"""The programs that runs consist of, a training step or a drawing of images, lowered for devices that may be absent.

Nothing is allocated: state, batch and weights are shapes with shardings. `report` compiles them.
"""

import dataclasses
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from terdit_jax.aot.topology import Topology
from terdit_jax.config import RunConfig
from terdit_jax.config_sections import DiffusionConfig
from terdit_jax.diffusion.objective import Objective, make_objective
from terdit_jax.errors import UserError
from terdit_jax.fast.inference_pass import bind_schedule
from terdit_jax.fast.modes import choose_numerics
from terdit_jax.fast.plan import choose_plan
from terdit_jax.inference.runtime import abstract_operands
from terdit_jax.inference.sampling import make_draw
from terdit_jax.inference.teacher import abstract_teacher
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.plan import PLAIN, Plan
from terdit_jax.model.transformer import abstract_params
from terdit_jax.parallel.compiler_options import Options, check_options, compiler_options
from terdit_jax.parallel.mesh import make_mesh
from terdit_jax.parallel.sharding import batch_sharding, batch_shards, check_heads
from terdit_jax.reproducible import key_bits
from terdit_jax.training.examples import example_keys
from terdit_jax.training.optimizer import make_optimizer
from terdit_jax.training.setup import check_run
from terdit_jax.training.state import abstract_state
from terdit_jax.training.step import make_train_step, mean_loss, split_floats

_DDPM = DiffusionConfig()
# Scales of latents are constants of the program: any will do. This is the Stable Diffusion autoencoder's.
_LATENT_SCALE = 0.18215


@dataclasses.dataclass(frozen=True)
class Program:
    """A program ready to be compiled. Attributes:

    what: "train" or "sample".
    config: the run's, as compiled for this machine.
    model: the architecture.
    mesh: the devices.
    plan: how the model is run.
    lowered: the program.
    held: what its arguments hold, by kind, as trees of shapes with shardings.
    images: how many one run of it learns from or draws.
    steps: denoising steps of a drawing; 1 for a training step.
    model_flops: of all chips, what the model's arithmetic asks for: without rematerialisation, work done twice or a
      teacher.
    mode: of inference, where it draws.
    compiler_options: those of the lowered program, beside XLA's own.
    """

    what: str
    config: RunConfig
    model: DiTConfig
    mesh: Mesh
    plan: Plan
    lowered: jax.stages.Lowered
    held: dict
    images: int
    steps: int
    model_flops: float
    mode: str | None = None
    compiler_options: Options = dataclasses.field(default_factory=dict)


def lower_train(config: RunConfig, topology: Topology, devices: list[jax.Device]) -> Program:
    """The training step of a run on the machine.

    Raises:
      UserError: a configuration that is not sound, or that the machine does not divide.
    """
    config, model, mesh = _prepare(config, topology, devices)
    check_run(config, model, mesh)
    options = compiler_options(config, mesh)
    check_options(options, devices[0])
    optimizer = make_optimizer(config.optimizer)
    objective = make_objective(config.diffusion, model.learn_sigma)
    state = abstract_state(model, optimizer, mesh, taught=bool(config.train.teacher))
    teacher = abstract_teacher(config, mesh)
    batch_size, sharding = config.train.batch_size, batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding)
        for name, shape, dtype in (
            ("mean", model.sample_shape, jnp.float16),
            ("std", model.sample_shape, jnp.float16),
            ("label", (), jnp.int32),
        )
    }
    plan = choose_plan(model, mesh)
    step: Any = make_train_step(config, model, objective, optimizer, mesh, _LATENT_SCALE, plan)
    with jax.set_mesh(mesh):
        lowered = step.__wrapped__.lower(state, batch, teacher)
    # Large leaves of the optimizer's state are the moments; counters beside them have no size to speak of.
    held = {
        "parameters": state["params"],
        "moments": state["opt_state"],
        "EMA": state["ema_params"],
        "codes of the last log": state["window"],
        "batch": batch,
    }
    held |= {"teacher": teacher.operands} if teacher else {}
    flops = 3 * model.flops_per_image() * batch_size
    return Program("train", config, model, mesh, plan, lowered, held, batch_size, 1, flops, compiler_options=options)


def lower_sample(
    config: RunConfig, topology: Topology, devices: list[jax.Device], mode: str, batch_size: int
) -> Program:
    """The drawing of `batch_size` images a chip with the run's `config.sample`, every chip with the whole model.

    `mode` is one of `choices.MODES`.

    Raises:
      UserError: a configuration that is not sound, or a mode that the model cannot have.
    """
    config = config.with_fields({"mesh.data": len(devices), "mesh.fsdp": 1, "mesh.tensor": 1})
    config, model, mesh = _prepare(config, topology, devices)
    model = dataclasses.replace(model, remat="none", layers="scanned")
    numerics = choose_numerics(mode, model, mesh)
    operands = abstract_operands(model, numerics, mesh)
    images = batch_size * len(devices)
    labels = jax.ShapeDtypeStruct((images,), jnp.int32, sharding=batch_sharding(mesh))
    bind, plan = partial(bind_schedule, model, numerics) if numerics else None, choose_plan(model, mesh)
    objective = make_objective(config.diffusion, model.learn_sigma)
    draw = make_draw(model, objective, config.sample, bind, run_blocks=plan.run_blocks)
    with jax.set_mesh(mesh):
        lowered = draw.lower(operands, labels, labels, key_bits(0))
    held = {"weights": operands, "batch": [labels, labels]}
    steps = config.sample.num_steps
    passes = (1 if config.sample.cfg_scale == 1.0 else 2) * (2 if config.sample.method == "heun" else 1)
    flops = passes * steps * images * model.flops_per_image()
    return Program("sample", config, model, mesh, plan, lowered, held, images, steps, flops, mode)


def _prepare(config: RunConfig, topology: Topology, devices: list[jax.Device]) -> tuple[RunConfig, DiTConfig, Mesh]:
    if config.compute.attention == "auto":
        # cuDNN's attention can only be compiled where cuDNN and a GPU are.
        config = config.with_fields({"compute.attention": "xla"})
    config = config.with_fields({"compute.passes": "xla"})  # kernels are compiled on the GPU itself
    model = DiTConfig.from_config(config)
    mesh = make_mesh(config.mesh, devices)
    check_heads(model.num_kv_heads, mesh)
    if topology.is_gpu and config.compute.attention == "cudnn":
        raise UserError("config.compute.attention='cudnn' cannot be compiled without a GPU: give auto or xla")
    return config, model, mesh


def saved_activations(program: Program) -> int:
    """Bytes that one chip keeps of a microbatch's forward pass for its backward pass, as `activation_bytes` counts."""
    images = program.images // (program.config.train.accumulation_steps * batch_shards(program.mesh))
    return images * activation_bytes(program.model, program.mesh, program.plan, program.config.diffusion)


@lru_cache
def activation_bytes(
    model: DiTConfig, mesh: Mesh | None = None, plan: Plan = PLAIN, diffusion: DiffusionConfig = _DDPM
) -> int:
    """Bytes that the forward pass of one image keeps for its backward pass, by the remat policy.

    They are counted in the program traced on the mesh (on one device if left out), of whole tokens: what the compiler
    recomputes, or `tensor` cuts, is less.
    """
    objective = make_objective(diffusion, model.learn_sigma)
    if mesh is None:
        return _activation_bytes(model, objective, 1, plan)
    with jax.set_mesh(mesh):
        return _activation_bytes(model, objective, batch_shards(mesh), plan)


def _activation_bytes(model: DiTConfig, objective: Objective, batch_size: int, plan: Plan) -> int:
    operands = jax.eval_shape(lambda params: plan.make_operands(model, params), abstract_params(model))

    def residual_bytes(batch_size: int) -> int:
        latents = jax.ShapeDtypeStruct((batch_size, *model.sample_shape), jnp.float32)
        numbers = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
        t = jax.eval_shape(jax.vmap(objective.draw_t), jax.eval_shape(partial(example_keys, 0, 0), numbers))
        examples = {"x_0": latents, "noise": latents, "x_t": latents, "t": t, "y": numbers}

        def backward(operands: dict, examples: dict):
            floats, with_floats = split_floats(operands)
            loss = lambda floats: mean_loss(model, objective, with_floats(floats), examples, plan)[0]  # noqa: E731
            return jax.vjp(loss, floats)[1]

        residuals = jax.tree.leaves(jax.eval_shape(backward, operands, examples))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in residuals)

    # What grows with the batch: codes and other operands are residuals too, but they are there anyway.
    return (residual_bytes(2 * batch_size) - residual_bytes(batch_size)) // batch_size
