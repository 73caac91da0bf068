"""Every leaf lies by exactly one rule, and no mesh changes a training step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from terdit_jax.config_sections import DiffusionConfig, MeshConfig
from terdit_jax.diffusion.objective import Ddpm, make_objective
from terdit_jax.errors import UserError
from terdit_jax.fast.plan import choose_plan, choose_soft_plan
from terdit_jax.model.plan import PLAIN
from terdit_jax.model.transformer import abstract_params, make_operands, packed_operands
from terdit_jax.parallel.mesh import make_mesh, mesh_shape
from terdit_jax.parallel.sharding import RULES, batch_sharding, logical_axes, partition_spec, path_name, tree_shardings
from terdit_jax.training.examples import example_keys, make_examples
from terdit_jax.training.state import abstract_state, init_state
from terdit_jax.training.step import loss_and_grads
from tests.golden_models import BY_CHANNEL, DIT, assert_trees_close, random_params, tiny_config

DDPM = Ddpm()
# Eight heads and every width a multiple of eight, so that each axis can take all devices; scales near the weights' own,
# so that gradients are well conditioned and 1e-5 is a statement about sharding, not about cancellation.
MODEL = tiny_config(num_heads=8, depth=2, alpha_init="least_squares")
BATCH = 16


def mesh_of(data, fsdp, tensor):
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))


def stored_batch(step):
    keys = jax.random.split(jax.random.key(50 + step), 3)
    shape = (BATCH, *MODEL.sample_shape)
    return {
        "mean": np.asarray(jax.random.normal(keys[0], shape), np.float16),
        "std": np.asarray(0.1 * jnp.abs(jax.random.normal(keys[1], shape)), np.float16),
        "label": np.asarray(jax.random.randint(keys[2], (BATCH,), 0, MODEL.num_classes), np.int32),
    }


def three_steps(mesh, accumulation_steps=1, plan=PLAIN, objective=DDPM, model=MODEL, share=None):
    """Losses and gradients of three steps of plain gradient descent, which hides no gradient's size as Adam does."""

    @jax.jit
    def step(params, batch, number):
        examples = make_examples(
            batch,
            example_keys(0, number, jnp.arange(BATCH)),
            objective,
            latent_scale=1.0,
            num_classes=MODEL.num_classes,
            class_dropout_prob=0.1,
        )
        sums, grads = loss_and_grads(model, objective, params, examples, accumulation_steps, plan, share=share)
        scale = 1e-3 / plan.gradient_norm(grads)
        return jax.tree.map(lambda p, g: p - scale * g, params, grads), sums, grads

    params = random_params(model)
    if mesh is not None:
        params = jax.device_put(params, tree_shardings(params, mesh))
    seen = []
    for number in range(3):
        batch = stored_batch(number)
        if mesh is not None:
            batch = jax.device_put(batch, batch_sharding(mesh))
        params, sums, grads = step(params, batch, jnp.int32(number))
        seen.append(jax.tree.map(np.asarray, (sums, grads)))
    return seen


@pytest.fixture(scope="module")
def one_device():
    with jax.default_device(jax.devices()[0]):
        seen = three_steps(None)
    assert all(np.abs(leaf).max() > 0 for _, grads in seen for leaf in jax.tree.leaves(grads))
    return seen


@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 8)])
@pytest.mark.parametrize("plan", ["auto", "plain"])
def test_any_mesh_equals_one_device(one_device, shape, plan):
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        seen = three_steps(mesh, plan=choose_plan(dataclasses.replace(MODEL, plan=plan), mesh))
    for ours, expected in zip(seen, one_device, strict=True):
        assert_trees_close(ours[0], expected[0])
        assert_trees_close(ours[1], expected[1])


def test_accumulation_on_a_mesh_equals_one_device(one_device):
    mesh = mesh_of(2, 2, 2)
    with jax.set_mesh(mesh):
        seen = three_steps(mesh, accumulation_steps=4, plan=choose_plan(MODEL, mesh))
    for ours, expected in zip(seen, one_device, strict=True):
        assert_trees_close(ours, expected)


def test_flow_matching_on_a_mesh_equals_one_device():
    objective, mesh = (
        make_objective(DiffusionConfig("flow", path="gvp", timesteps="logit_normal"), True),
        mesh_of(2, 2, 2),
    )
    with jax.default_device(jax.devices()[0]):
        expected = three_steps(None, objective=objective)
    assert all(np.abs(leaf).max() > 0 for _, grads in expected for leaf in jax.tree.leaves(grads))
    with jax.set_mesh(mesh):
        seen = three_steps(mesh, accumulation_steps=2, plan=choose_plan(MODEL, mesh), objective=objective)
    for ours, one in zip(seen, expected, strict=True):
        assert_trees_close(ours, one)


def test_unrolled_layers_on_a_mesh_equal_one_device(one_device):
    """Modulations of all layers at once, and layers' gradients stacked, where codes are gathered."""
    mesh = mesh_of(2, 2, 2)
    with jax.set_mesh(mesh):
        seen = three_steps(mesh, plan=choose_plan(dataclasses.replace(MODEL, layers="unrolled"), mesh))
    for ours, expected in zip(seen, one_device, strict=True):
        assert_trees_close(ours, expected)


@pytest.mark.parametrize("layers", ["scanned", pytest.param("unrolled", marks=pytest.mark.slow)])
def test_a_soft_start_on_a_mesh_equals_one_device(layers):
    model, mesh, share = dataclasses.replace(MODEL, layers=layers), mesh_of(2, 2, 2), jnp.float32(0.4)
    with jax.default_device(jax.devices()[0]):
        expected = three_steps(None, model=model, share=share)
    assert all(np.abs(leaf).max() > 0 for _, grads in expected for leaf in jax.tree.leaves(grads))
    with jax.set_mesh(mesh):
        seen = three_steps(mesh, 4, choose_soft_plan(model, mesh), model=model, share=share)
    for ours, theirs in zip(seen, expected, strict=True):
        assert_trees_close(ours, theirs)


@pytest.mark.parametrize(
    "fields",
    [
        DIT,
        {**DIT, "ternary": False},
        {**DIT, "layers": "unrolled"},
        {**BY_CHANNEL, "num_kv_heads": 4},
        pytest.param({**BY_CHANNEL, "layers": "unrolled"}, marks=pytest.mark.slow),
        pytest.param({**DIT, **BY_CHANNEL}, marks=pytest.mark.slow),
        pytest.param({"alpha_per": "channel"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_other_models_on_a_mesh_equal_one_device(fields):
    model = dataclasses.replace(MODEL, **fields)
    with jax.default_device(jax.devices()[0]):
        expected = three_steps(None, model=model)
    assert all(np.abs(leaf).max() > 0 for _, grads in expected for leaf in jax.tree.leaves(grads))
    mesh = mesh_of(2, 2, 2)
    with jax.set_mesh(mesh):
        seen = three_steps(mesh, accumulation_steps=4, plan=choose_plan(model, mesh), model=model)
    for ours, theirs in zip(seen, expected, strict=True):
        assert_trees_close(ours, theirs)


def every_tree():
    """All trees that lie on a mesh: the state of every kind of model, and its operands in every form."""
    for options in (
        {},
        {"ternary": False},
        {"qk_norm": False, "adaln_rms_norm": False},
        {"num_kv_heads": 4, "positions": "rope_1d_sincos_2d"},
        DIT,
        BY_CHANNEL,
        {**DIT, **BY_CHANNEL},
    ):
        model = tiny_config(**{"num_heads": 8, **options})
        yield jax.eval_shape(lambda m=model: init_state(m, optax.adamw(1e-3), 0))
        for make in (make_operands, packed_operands) if model.ternary else (make_operands,):
            yield jax.eval_shape(lambda p, m=model, make=make: make(m, p), abstract_params(model))


def test_every_leaf_matches_exactly_one_rule_and_every_rule_is_used():
    axes_seen = set()
    for tree in every_tree():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if leaf.shape:
                axes = logical_axes(path_name(path), leaf.ndim)
                assert len(axes) == len(leaf.shape), path_name(path)
                axes_seen.add(axes)
    one_a_matrix = {("layers",), ("layers", "group")}  # alphas that have no outputs
    assert axes_seen == {axes for _, axes in RULES} | one_a_matrix


def test_moments_and_averages_lie_as_their_parameters():
    state = abstract_state(MODEL, optax.adamw(1e-3), mesh_of(2, 2, 2))
    expected = jax.tree.map(lambda leaf: leaf.sharding.spec, state["params"])
    moments = state["opt_state"][0]
    for tree in (state["ema_params"], moments.mu, moments.nu):
        assert jax.tree.map(lambda leaf: leaf.sharding.spec, tree) == expected
    sharded = [leaf for leaf in jax.tree.leaves(state["params"]) if any(leaf.sharding.spec)]
    total = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    assert sum(leaf.size for leaf in sharded) > 0.95 * total


def test_unknown_and_ambiguous_paths_are_refused():
    with pytest.raises(ValueError, match="matches 0 sharding rules"):
        logical_axes("blocks/attention/wq/gate", 1)


def test_the_scales_of_outputs_are_cut_as_the_rows_of_their_matrices():
    blocks = tree_shardings(abstract_params(tiny_config(num_heads=8, **BY_CHANNEL)), mesh_of(2, 2, 2))["blocks"]
    maps = {"attention": "wq wk wv wo".split(), "feed_forward": "w1 w2 w3".split()}
    found = [blocks[part][name] for part, names in maps.items() for name in names] + [blocks["adaLN_modulation"]]
    for leaves in found:
        assert tuple(leaves["alpha"].spec) == tuple(leaves["weight"].spec)[:2]
    assert {leaves["alpha"].spec[1] for leaves in found} == {"fsdp", "tensor"}


def test_a_width_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="fsdp=8 does not divide dimension 12"):
        partition_spec("params/blocks/attention/wq/weight", (2, 16, 12), mesh_of(1, 8, 1))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), "data=3, fsdp=1, tensor=1.*8 devices"),
        ((-1, -1, 1), "at most one"),
        ((0, 8, 1), "positive"),
        ((-1, 3, 1), "8 devices"),
    ],
)
def test_meshes_that_do_not_multiply_out_are_refused(sizes, message):
    config = MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    with pytest.raises(UserError, match=message):
        mesh_shape(config, 8)


def test_minus_one_takes_the_rest():
    assert mesh_shape(MeshConfig(data=2, fsdp=-1, tensor=2), 8) == (2, 2, 2)
