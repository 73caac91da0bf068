"""A run described before it starts: its configuration, devices, parameters and the memory that its arrays will take.

Everything follows from shapes; nothing is allocated, written or compiled. `aot` says what the compiler adds.
"""

from collections.abc import Callable
from functools import partial

from clu import parameter_overview
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from terdit_jax.config import RunConfig
from terdit_jax.diffusion.objective import make_objective
from terdit_jax.fast.plan import choose_plan, choose_soft_plan
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.plan import Plan
from terdit_jax.model.transformer import abstract_params, count_params, packed_bytes
from terdit_jax.parallel.mesh import make_mesh
from terdit_jax.parallel.sharding import abstract_sharded, chip_bytes
from terdit_jax.training.optimizer import make_optimizer
from terdit_jax.training.setup import check_run
from terdit_jax.training.state import abstract_state
from terdit_jax.training.teacher import Teacher


def make_overview(config: RunConfig, find_teacher: Callable[[RunConfig, Mesh], Teacher | None]) -> str:
    """Describes in lines for people the run that the command `main` would start here.

    Args:
      config: of the run.
      find_teacher: finds its teacher, with shapes in place of weights.

    Raises:
      UserError: fields that make no model, a model, batch or mesh that the devices here do not divide, or a teacher
        that does not fit the run.
    """
    model, mesh = DiTConfig.from_config(config), make_mesh(config.mesh)
    make_objective(config.diffusion, model.learn_sigma)
    check_run(config, model, mesh)
    plan = choose_plan(model, mesh)
    teacher = find_teacher(config, mesh)
    sizes = state_bytes(config, model, mesh, plan) | ({"teacher": chip_bytes(teacher.operands)} if teacher else {})
    sizes["together"] = sum(sizes.values())
    return "\n".join(
        [
            str(config),
            "",
            parameter_overview.get_parameter_overview(abstract_params(model), include_stats=False),
            *introduction(config, model, mesh, plan, teacher),
            "bytes a device holds, without activations and what the compiler adds:",
            *(f"  {kind:<11} {size:>19,}" for kind, size in sizes.items()),
        ]
    )


def introduction(
    config: RunConfig, model: DiTConfig, mesh: Mesh, plan: Plan, teacher: Teacher | None = None
) -> list[str]:
    """A line each for the model, the training, the devices, the plan, and the soft start and the teacher if there are
    any."""
    train, data = config.train, "synthetic data" if config.data.synthetic else config.data.dir
    training = f"{train.num_steps:,} steps of {train.batch_size:,} images from {data}"
    training += f", learning rate {config.optimizer.learning_rate:g}, seed {config.seed}"
    lines = [f"{config.name}: {_describe_model(model)}", training, _describe_devices(mesh), f"plan: {plan}"]
    if steps := config.train.soft_start_steps:
        lines.append(f"soft start, before step {steps:,}: {choose_soft_plan(model, mesh)}")
    return [*lines, f"teacher: {teacher}"] if teacher else lines


def _describe_model(model: DiTConfig) -> str:
    """The number of its parameters, of which kind."""
    counts = count_params(model)
    if not model.ternary:
        return f"{counts['total']:,} parameters (full precision)"
    packed = f"{packed_bytes(model) / 1e6:,.1f} MB packed"
    return f"{counts['total']:,} parameters ({counts['ternary']:,} ternary, {packed})"


def _describe_devices(mesh: Mesh) -> str:
    """How many devices of which kind there are, and how the mesh arranges them."""
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} process(es), mesh {axes}"


def state_bytes(config: RunConfig, model: DiTConfig, mesh: Mesh, plan: Plan) -> dict[str, int]:
    """Bytes of one device by kind: what the state holds, and what a step makes beside it of the parameters' size."""
    state = abstract_state(model, make_optimizer(config.optimizer), mesh, taught=bool(config.train.teacher))
    with jax.set_mesh(mesh):
        operands = jax.eval_shape(partial(plan.make_operands, model), abstract_params(model))
    codes: list[jax.ShapeDtypeStruct] = []
    gradients: list[jax.ShapeDtypeStruct] = []
    for leaf in jax.tree.leaves(abstract_sharded(operands, mesh)):
        (gradients if jnp.issubdtype(leaf.dtype, jnp.floating) else codes).append(leaf)
    if config.train.accumulation_steps > 1:  # their sums over microbatches are float32
        gradients = [jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding) for leaf in gradients]
    return {
        "parameters": chip_bytes(state["params"]),
        "moments": chip_bytes(state["opt_state"]),
        "EMA": chip_bytes(state["ema_params"]),
        "gradients": chip_bytes(gradients),
        "codes": chip_bytes([codes, state["window"]["codes"]]),
    }
