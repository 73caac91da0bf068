"""One training step, and the loss on held-out examples.

A step ternarises once, accumulates gradients over microbatches, and updates parameters, moments and EMA: one jitted
function of (state, batch). What surrounds it, from reading data to logging, belongs to `loop` and `actions`.
"""

from collections.abc import Callable
from functools import partial

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from terdit_jax.config import RunConfig
from terdit_jax.config_sections import OptimizerConfig
from terdit_jax.diffusion.objective import Objective
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.layers import softened_linear
from terdit_jax.model.plan import PLAIN, Plan
from terdit_jax.model.transformer import forward
from terdit_jax.parallel.compiler_options import compiler_options
from terdit_jax.parallel.mesh import on_mesh
from terdit_jax.parallel.sharding import constrain, constrain_tree
from terdit_jax.ternary.linear import no_gradient
from terdit_jax.training.examples import Examples, example_keys, make_examples
from terdit_jax.training.optimizer import ema_decay, judge_loss
from terdit_jax.training.state import NUM_QUARTILES, State, quartile_sums
from terdit_jax.training.teacher import Teacher


def mean_loss(
    model: DiTConfig,
    objective: Objective,
    operands: dict,
    examples: Examples,
    plan: Plan = PLAIN,
    teacher: Teacher | None = None,
) -> tuple[Array, dict]:
    """The mean of the objective's loss over the examples, with a teacher's term, and the sums a log window takes."""
    out = forward(model, operands, examples["x_t"], examples["t"], examples["y"], plan.run_blocks)
    losses = objective.losses(out, examples["x_0"], examples["x_t"], examples["t"], examples["noise"])
    sums = {name: jnp.mean(losses[name]) for name in objective.terms}
    loss = sums["loss"]
    if teacher:
        sums["distillation"] = teacher.distance(out, examples["x_t"], examples["t"], examples["y"])
        loss += teacher.weight * sums["distillation"]
    return loss, sums | quartile_sums(losses["loss"], objective.part(examples["t"], NUM_QUARTILES))


def split_floats(operands: dict) -> tuple[list[Array], Callable[..., dict]]:
    """Splits the differentiable leaves from the integer ones, and returns a function that merges them back.

    Returns:
      The float leaves, and `with_floats(floats, others)`: the operands with these in their places, each integer leaf
      passed through `others`.
    """
    leaves, structure = jax.tree.flatten(operands)
    is_float = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def with_floats(floats: list[Array], others: Callable[[Array], Array | np.ndarray] = lambda codes: codes) -> dict:
        rest = iter(floats)
        merged = [next(rest) if f else others(leaf) for leaf, f in zip(leaves, is_float, strict=True)]
        return jax.tree.unflatten(structure, merged)

    return [leaf for leaf, f in zip(leaves, is_float, strict=True) if f], with_floats


def loss_and_grads(
    model: DiTConfig,
    objective: Objective,
    params: dict,
    examples: Examples,
    accumulation_steps: int = 1,
    plan: Plan = PLAIN,
    teacher: Teacher | None = None,
    share: Array | None = None,
) -> tuple[dict, dict]:
    """The step's loss terms and the gradient of its mean loss, with a teacher's term.

    Args:
      model: the architecture.
      objective: what is learned.
      params: float32 parameters.
      examples: B of them; B is divisible by accumulation_steps.
      accumulation_steps: microbatches, run one after the other over the same codes.
      plan: how the model is run.
      teacher: what else is learned from; no gradient is taken of its operands.
      share: () of the way to ternary weights, in a soft start; `plan` is then one of full precision.

    Returns:
      () means of the objective's terms, with a teacher of "distillation", and {"quartile_loss", "quartile_count"} (4,)
      sums; gradients shaped as params.
    """
    make_linear = None if share is None else partial(softened_linear, share)
    operands, to_params = jax.vjp(lambda p: plan.make_operands(model, p, make_linear), params)
    floats, with_floats = split_floats(operands)

    def place(floats: list[Array]) -> list[Array]:
        """Lays gradients out as their operands are: what is summed over microbatches stays cut over the mesh."""
        return split_floats(constrain_tree(with_floats(floats)))[0]

    def micro(examples: Examples) -> tuple[dict, list[Array]]:
        loss = lambda floats: mean_loss(model, objective, with_floats(floats), examples, plan, teacher)  # noqa: E731
        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(floats)
        return sums, grads

    if accumulation_steps == 1:
        sums, grads = micro(examples)
    else:
        sums, grads = _accumulate(micro, place, examples, accumulation_steps)
    # Codes are integers: their gradient comes from the sink.
    (param_grads,) = to_params(with_floats(grads, no_gradient))
    return sums, param_grads


def _accumulate(micro: Callable, place: Callable, examples: Examples, steps: int) -> tuple[dict, list[Array]]:
    """Means of the microbatches' terms and gradients, the gradients summed in float32 and rounded once at the end."""

    def split(leaf: Array) -> Array:
        # Microbatch k takes every steps-th example from k on: each device keeps a part of every microbatch.
        leaf = jnp.swapaxes(leaf.reshape(-1, steps, *leaf.shape[1:]), 0, 1)
        return constrain(leaf, None, "batch", *(None,) * (leaf.ndim - 2))

    def add(carry: tuple, examples: Examples) -> tuple[tuple, None]:
        sums, grads = jax.tree.map(lambda total, new: total + new.astype(jnp.float32), carry, micro(examples))
        return (sums, place(grads)), None

    micros = jax.tree.map(split, examples)
    shapes = jax.eval_shape(micro, jax.tree.map(lambda leaf: leaf[0], micros))
    sums, grads = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
    (sums, grads), _ = jax.lax.scan(add, (sums, place(grads)), micros)
    sums = {name: value if name.startswith("quartile") else value / steps for name, value in sums.items()}
    return sums, jax.tree.map(lambda total, leaf: (total / steps).astype(leaf.dtype), grads, shapes[1])


def apply_gradients(
    optimizer: optax.GradientTransformationExtraArgs,
    config: OptimizerConfig,
    state: State,
    sums: dict,
    grads: dict,
    grad_norm: Array,
) -> State:
    """The next state; a loss that is a spike, or a loss or gradient that is not finite, leaves parameters, moments and
    EMA as they are, and is counted.

    optax.apply_if_finite branches with lax.cond, which keeps both branches' states in memory; selecting leaf by leaf
    costs nothing beside the update.
    """
    # A loss whose square overflows would leave the running variance of `spikes` without a value.
    finite = jnp.isfinite(jnp.square(sums["loss"])) & jnp.isfinite(grad_norm)
    spike, spikes = judge_loss(config, state["spikes"], jnp.where(finite, sums["loss"], jnp.nan))
    learn = finite & ~spike
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"], grad_norm=grad_norm)
    params = optax.apply_updates(state["params"], updates)
    decay = ema_decay(config, state["step"])
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state["ema_params"], params)

    def keep(new: dict, old: dict, take: Array = learn) -> dict:
        return jax.tree.map(lambda n, o: jnp.where(take, n, o), new, old)

    seen = sums | {"grad_norm": grad_norm, "steps": jnp.float32(1)}
    window_sums = {name: total + seen.get(name, 0) for name, total in state["window"]["sums"].items()}
    return {
        "step": state["step"] + 1,
        "params": keep(params, state["params"]),
        "ema_params": keep(ema, state["ema_params"]),
        "opt_state": keep(opt_state, state["opt_state"]),
        "skipped": {
            "total": state["skipped"]["total"] + ~finite,
            "consecutive": jnp.where(finite, 0, state["skipped"]["consecutive"] + 1),
        },
        "spikes": spikes,
        "window": {"sums": keep(window_sums, state["window"]["sums"], finite), "codes": state["window"]["codes"]},
    }


def make_train_step(
    config: RunConfig,
    model: DiTConfig,
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    latent_scale: float,
    plan: Plan,
    *,
    soft: bool = False,
) -> Callable[..., State]:
    """The jitted step (state, global batch, teacher or None) -> state. The given state's memory is reused; do not read
    it again.

    Args:
      config: the run's; read are its batch size, microbatches, seed, optimizer's averages and compiler options.
      model: the architecture.
      objective: what is learned.
      optimizer: of `make_optimizer`.
      mesh: where state and batch lie.
      latent_scale: factor of stored latents.
      plan: how the model is run.
      soft: whether it is a step of the soft start, by a plan of `choose_soft_plan`.

    Raises:
      UserError: `config.train.compiler_options` is no list of --name=value; when called, a matrix too narrow for
        `mesh.gather` "codes".
    """

    def train_step(state: State, batch: dict[str, Array], teacher: Teacher | None = None) -> State:
        indices = jnp.arange(config.train.batch_size, dtype=jnp.int32)
        examples = make_examples(
            batch,
            constrain(example_keys(config.seed, state["step"], indices), "batch"),
            objective,
            latent_scale=latent_scale,
            num_classes=model.num_classes,
            class_dropout_prob=model.class_dropout_prob,
        )
        steps = config.train.accumulation_steps
        share = state["step"] / float(config.train.soft_start_steps) if soft else None
        sums, grads = loss_and_grads(model, objective, state["params"], examples, steps, plan, teacher, share)
        return apply_gradients(optimizer, config.optimizer, state, sums, grads, plan.gradient_norm(grads))

    return on_mesh(mesh, jax.jit(train_step, donate_argnums=0, compiler_options=compiler_options(config, mesh)))
