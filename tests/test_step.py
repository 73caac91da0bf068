"""The training step against three real steps of the public code, and the equality of its many forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.config_sections import DiffusionConfig, OptimizerConfig
from terdit_jax.diffusion.objective import Ddpm, make_objective
from terdit_jax.fast.plan import FastPlan
from terdit_jax.interop.published import params_leaves, params_tree
from terdit_jax.model.plan import PLAIN
from terdit_jax.parallel.sharding import path_name
from terdit_jax.ternary.quantize import absmean_codes
from terdit_jax.training.optimizer import make_optimizer
from terdit_jax.training.state import init_state
from terdit_jax.training.step import apply_gradients, loss_and_grads
from tests.golden_models import (
    BY_CHANNEL,
    DIT,
    assert_trees_close,
    golden_arrays,
    golden_config,
    golden_params,
    nhwc,
    random_params,
    tiny_config,
)

DDPM = Ddpm()


def optimizer_config(**overrides):
    return OptimizerConfig(**overrides)


def jitted(model, accumulation_steps=1, plan=PLAIN, objective=DDPM):
    steps = accumulation_steps
    return jax.jit(lambda params, examples: loss_and_grads(model, objective, params, examples, steps, plan))


def golden_examples(io, step):
    x_0, noise = nhwc(io[f"x0_{step}"]), nhwc(io[f"noise_{step}"])
    t, y = jnp.asarray(io[f"t_{step}"]), jnp.asarray(io[f"y_{step}"])
    return {"x_0": x_0, "noise": noise, "t": t, "y": y, "x_t": DDPM.noised(x_0, t, noise)}


@pytest.mark.parametrize("plan", [PLAIN, FastPlan(layers="unrolled")], ids=["plain", "fast"])
def test_three_golden_training_steps(optimised, plan):
    model, io = golden_config("train"), golden_arrays("train_io")
    config = optimizer_config(learning_rate=5e-4, clip_norm=2.0, ema_decay=0.99)
    optimizer = make_optimizer(config)
    state = init_state(model, optimizer, 0, golden_params(model, "train_init"))
    run = jitted(model, plan=plan)
    update = jax.jit(
        lambda state, sums, grads: apply_gradients(optimizer, config, state, sums, grads, plan.gradient_norm(grads))
    )
    seen = 0.0
    for step in range(3):
        sums, grads = run(state["params"], golden_examples(io, step))
        if step == 0:
            assert_grads_close(grads, golden_params(model, "train_grads_step0"))
        state = update(state, sums, grads)
        np.testing.assert_allclose(sums["loss"], io[f"loss_{step}"], rtol=1e-5)
        np.testing.assert_allclose(sums["vb"], io[f"vb_{step}"].mean(), rtol=1e-5)
        norm = float(state["window"]["sums"]["grad_norm"]) - seen
        seen += norm
        np.testing.assert_allclose(norm, io[f"grad_norm_{step}"], rtol=1e-5)
    for name, ours in (("train_params_after3", state["params"]), ("train_ema_after3", state["ema_params"])):
        expected = golden_params(model, name)
        error = np.concatenate(
            [np.abs(a - b).ravel() for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True)]
        )
        # Adam divides by the root of a gradient's square: where the gradient is rounding noise, so is the step's sign.
        assert (error < 1e-6).mean() > 0.999 and error.max() < 1.5e-3, name


def assert_grads_close(actual, expected):
    """Every leaf within 1e-5 of the largest gradient and within 2e-5 of its own; qk-norm makes the alphas of q and k
    scale-free, so that their gradients are rounding noise around zero and only the first bound applies."""
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        own = np.abs(e).max()
        assert own > 0
        scale_free = path_name(path) in ("blocks/attention/wq/alpha", "blocks/attention/wk/alpha")
        bound = 1e-5 * largest if scale_free else min(1e-5 * largest, 2e-5 * own)
        assert np.abs(a - e).max() < bound, path_name(path)


def test_accumulation_changes_nothing():
    model = tiny_config(depth=2, hidden_size=32)
    params, examples = random_params(model), random_examples(model, 8)
    whole, parts = jitted(model)(params, examples), jitted(model, 4)(params, examples)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(whole[1]))
    assert_trees_close(parts, whole)


def test_accumulation_changes_nothing_in_flow_matching():
    model, objective = tiny_config(depth=2, hidden_size=32), make_objective(DiffusionConfig("flow"), True)
    params, examples = random_params(model), random_examples(model, 8)
    t = np.random.default_rng(1).random(8, np.float32)
    examples |= {"t": t, "x_t": objective.noised(examples["x_0"], t, examples["noise"])}
    whole = jitted(model, objective=objective)(params, examples)
    parts = jitted(model, 2, objective=objective)(params, examples)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(whole[1]))
    assert whole[0].keys() == {"loss", "quartile_loss", "quartile_count"}
    assert_trees_close(parts, whole)


@pytest.mark.parametrize("fields", [BY_CHANNEL, DIT], ids=["TerDiT by channel", "DiT"])
@pytest.mark.parametrize("plan", [PLAIN, FastPlan(layers="unrolled")], ids=["plain", "fast"])
def test_a_soft_start_ends_at_the_ternary_step(fields, plan):
    """To float32's rounding: the last blend is alpha T, its gradient that of the ternary step."""
    model = tiny_config(depth=2, hidden_size=32, **fields)
    params, examples = random_params(model), random_examples(model, 4)
    soft = jax.jit(lambda share: loss_and_grads(model, DDPM, params, examples, plan=plan, share=share))
    expected, end = jitted(model, plan=plan)(params, examples), soft(jnp.float32(1))
    np.testing.assert_allclose(end[0]["loss"], expected[0]["loss"], rtol=1e-6)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected[1]))
    assert_trees_close(end, expected, 2e-5)
    near = soft(jnp.float32(1 - 1e-3))
    assert 0 < abs(near[0]["loss"] - end[0]["loss"]) < 0.02 * end[0]["loss"]


def test_a_soft_start_begins_at_the_full_precision_step():
    """Each matrix's gradient, times its alpha; that of alpha is zero."""
    model = tiny_config(depth=2, hidden_size=32, adaln_rms_norm=False)
    params, examples = random_params(model), random_examples(model, 4)
    sums, grads = jax.jit(lambda: loss_and_grads(model, DDPM, params, examples, share=jnp.float32(0)))()
    full = dataclasses.replace(model, ternary=False)
    masters = params_tree((path, leaf) for path, leaf in params_leaves(params) if not path.endswith("/alpha"))
    expected_sums, expected = jitted(full)(masters, examples)
    np.testing.assert_allclose(sums["loss"], expected_sums["loss"], rtol=1e-6)
    wanted, scales = dict(params_leaves(expected)), dict(params_leaves(params))
    for path, leaf in params_leaves(grads):
        if path.endswith("/alpha"):
            assert not np.asarray(leaf).any()
            continue
        alpha = scales.get(path.removesuffix("weight") + "alpha", jnp.ones(1))
        factor = np.abs(alpha).reshape(-1, *(1,) * (leaf.ndim - 1))
        largest = np.abs(wanted[path]).max()
        np.testing.assert_allclose(leaf, factor * wanted[path], rtol=1e-5, atol=1e-6 * largest, err_msg=path)


def test_non_finite_update_is_skipped_and_counted():
    model = tiny_config(depth=1, hidden_size=32)
    config = optimizer_config()
    optimizer = make_optimizer(config)
    state = init_state(model, optimizer, 0, random_params(model))
    sums, grads = jitted(model)(state["params"], random_examples(model, 4))
    bad = jax.tree.map(lambda g: g * jnp.nan, grads)
    update = jax.jit(lambda *args: apply_gradients(optimizer, config, *args, PLAIN.gradient_norm(args[-1])))
    after = update(state, sums, bad)
    for name in ("params", "ema_params", "opt_state", "window"):
        jax.tree.map(np.testing.assert_array_equal, after[name], state[name])
    assert (int(after["step"]), int(after["skipped"]["total"]), int(after["skipped"]["consecutive"])) == (1, 1, 1)
    after = update(after, sums, grads)
    assert (int(after["step"]), int(after["skipped"]["total"]), int(after["skipped"]["consecutive"])) == (2, 1, 0)
    assert float(after["window"]["sums"]["steps"]) == 1


@pytest.fixture(scope="module")
def in_float32():
    model = tiny_config(depth=2, hidden_size=32)
    params, examples = random_params(model), random_examples(model, 8)
    return model, params, examples, jitted(model)(params, examples)


@pytest.mark.parametrize(("matmul_dtype", "bound"), [("same", 0.05), ("float8_e4m3fn", 0.25), ("int8", 0.1)])
def test_gradients_in_fewer_bits_follow_float32(in_float32, matmul_dtype, bound):
    model, params, examples, (expected_sums, expected) = in_float32
    low = dataclasses.replace(model, dtype="bfloat16", grad_dtype="bfloat16", matmul_dtype=matmul_dtype)
    sums, actual = jitted(low)(params, examples)
    np.testing.assert_allclose(sums["loss"], expected_sums["loss"], rtol=0.02)
    flat = lambda tree: jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])  # noqa: E731
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(actual))
    assert 0 < jnp.linalg.norm(flat(actual) - flat(expected)) < bound * jnp.linalg.norm(flat(expected))


@pytest.mark.parametrize(
    "fields", [{}, {"alpha_init": "least_squares"}, {"alpha_init": "least_squares", **BY_CHANNEL}], ids=str
)
def test_every_ternary_weight_and_alpha_moves_within_ten_steps(fields):
    """From the default start: the block's adaLN weight is zero and must still leave it."""
    model = tiny_config(depth=2, hidden_size=32, **fields)
    config = optimizer_config(learning_rate=1e-3)
    optimizer = make_optimizer(config)
    start = state = jax.jit(lambda: init_state(model, optimizer, 0))()

    @jax.jit
    def step(state, examples):
        sums, grads = loss_and_grads(model, DDPM, state["params"], examples)
        return apply_gradients(optimizer, config, state, sums, grads, PLAIN.gradient_norm(grads))

    for i in range(10):
        state = step(state, random_examples(model, 8, seed=i))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state["params"], start["params"])
    assert all(jax.tree.leaves(moved)), moved
    codes = absmean_codes(state["params"]["blocks"]["adaLN_modulation"]["weight"])
    assert set(np.unique(codes)) == {-1, 0, 1}, "the zero adaLN matrix never got its codes"


def random_examples(model, batch, seed=0):
    random = np.random.default_rng(seed)
    x_0, noise = random.standard_normal((2, batch, *model.sample_shape), np.float32)
    t, y = random.integers(0, 1000, batch), random.integers(0, model.num_classes + 1, batch)
    return {"x_0": x_0, "noise": noise, "t": t, "y": y, "x_t": DDPM.noised(x_0, t, noise)}
