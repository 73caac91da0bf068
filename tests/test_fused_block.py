"""A network of fused blocks has the values and gradients of plain ones, up to the rounding of bfloat16 or 8 bits."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.config_sections import MeshConfig
from terdit_jax.fast import fused_block
from terdit_jax.fast.hopper import backward, biased, forward, warpgroup
from terdit_jax.fast.plan import FastPlan, choose_plan
from terdit_jax.model.layers import softened_linear
from terdit_jax.model.plan import PLAIN
from terdit_jax.model.transformer import abstract_params, activation_rms
from terdit_jax.model.transformer import forward as run_model
from terdit_jax.parallel.mesh import make_mesh
from tests.golden_models import BY_CHANNEL, DIT, random_params, tiny_config
from tests.interpreted import interpreted_kernels

B, T, D, HEADS = 2, 4, 256, 4
EIGHT_BIT = fused_block.EIGHT_BIT
SMALL = {"depth": 2, "num_heads": HEADS, "input_size": 4, "dtype": "bfloat16", "grad_dtype": "bfloat16"}
CONFIG = tiny_config(hidden_size=D, **SMALL)
CONFIGS = {"TerDiT": CONFIG, "DiT": tiny_config(hidden_size=384, **DIT, **SMALL)}
OTHERS = {f"{name} by channel": dataclasses.replace(config, **BY_CHANNEL) for name, config in CONFIGS.items()}
FUSED, UNFUSED = FastPlan(layers="unrolled", fused=True), FastPlan(layers="unrolled")


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(forward, "ENOUGH_BLOCKS", B * T // 2)
    with interpreted_kernels(monkeypatch):
        yield


def draws(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


INPUTS = draws(B, 4, 4, 4, seed=51), jnp.array([20, 700]), jnp.array([1, 10])
TARGET = draws(B, 4, 4, 8, seed=6)


def run(plan, config, params, make_linear=None):
    return run_model(config, plan.make_operands(config, params, make_linear), *INPUTS, plan.run_blocks)


def gradients(plan, config=CONFIG, make_linear=None):
    """Every leaf but those that are zero but for rounding: of queries' and keys' alphas, for norms undo what they do,
    and of keys' biases, which move all of a query's scores alike."""
    loss = lambda params: jnp.mean((run(plan, config, params, make_linear) - TARGET) ** 2)  # noqa: E731
    params = random_params(config)
    # DiT, without norms of queries and keys, would have each token attend to one other.
    if not config.ternary or config.family == "dit" and config.alpha_per == "channel":
        params = jax.tree.map(lambda leaf: 0.3 * leaf, params)
    leaves = jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params))
    return [
        leaf for path, leaf in leaves if leaf.size > 8 and not jax.tree_util.keystr(path).endswith("['wk']['bias']")
    ]


def errors(made, exact):
    """Each leaf's relative distance from the float32 gradient."""
    return np.array([np.linalg.norm(a - e) / np.linalg.norm(e) for a, e in zip(made, exact, strict=True)])


@pytest.fixture(scope="module", params=[*CONFIGS, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def config(request):
    return (CONFIGS | OTHERS)[request.param]


@pytest.fixture(scope="module")
def exact(config):
    """Gradients of plain blocks in float32."""
    return gradients(PLAIN, dataclasses.replace(config, dtype="float32", grad_dtype="float32"))


@pytest.fixture(scope="module")
def rounded(exact, config):
    """Errors of plain blocks that round to 8 bits at their matmuls."""
    return errors(gradients(dataclasses.replace(UNFUSED, matmul_dtype=EIGHT_BIT), config), exact)


def assert_rounded_alike(errors, plain):
    """No leaf is further from float32 than rounding takes it in plain blocks, give or take what one draw of rounding
    errors differs from another. Where rounding hides nothing, a wrong factor of 1.2 in one pass shows."""
    assert 0.01 < errors.mean() < 1.1 * plain.mean()
    assert (errors < 1.3 * plain + 0.01).all(), np.round(errors / plain, 2)


@pytest.mark.parametrize("ternary", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradients_in_bfloat16_are_no_further_from_float32_than_plain_ones(exact, config, ternary):
    config = dataclasses.replace(config, ternary=ternary)
    if not ternary:
        exact = gradients(PLAIN, dataclasses.replace(config, dtype="float32", grad_dtype="float32"))
    plain, ours = (errors(gradients(plan, config), exact) for plan in (UNFUSED, FUSED))
    assert ours.max() < 0.2 and ours.mean() < 1.2 * plain.mean()


@pytest.mark.slow
def test_a_soft_start_in_bfloat16_is_no_further_from_float32_than_in_plain_blocks(config):
    make_linear = partial(softened_linear, jnp.float32(0.4))
    exact = gradients(PLAIN, dataclasses.replace(config, dtype="float32", grad_dtype="float32"), make_linear)
    plain, ours = (errors(gradients(plan, config, make_linear), exact) for plan in (UNFUSED, FUSED))
    assert ours.max() < 0.2 and ours.mean() < 1.2 * plain.mean()


@pytest.mark.parametrize(
    ("remat", "layers"),
    [
        ("dots", "unrolled"),
        pytest.param("none", "unrolled", marks=pytest.mark.slow),
        pytest.param("block", "unrolled", marks=pytest.mark.slow),
        pytest.param("dots", "scanned", marks=pytest.mark.slow),
    ],
)
def test_gradients_in_8_bits_are_those_of_a_network_that_rounds_at_its_matmuls(exact, rounded, config, remat, layers):
    """On a GPU they are not equal: programs that differ in the last bit of a bfloat16 before a rounding to 8 bits
    differ by a step of 8 bits after it, and two draws of such errors are further apart than each is from float32."""
    plan = dataclasses.replace(FUSED, matmul_dtype=EIGHT_BIT, layers=layers)
    made = gradients(plan, dataclasses.replace(config, remat=remat))
    assert_rounded_alike(errors(made, exact), rounded)


@pytest.mark.parametrize("axis", [pytest.param("data", marks=pytest.mark.slow), "fsdp"])
def test_gradients_in_8_bits_are_the_same_on_a_mesh(exact, rounded, config, axis):
    plan = dataclasses.replace(FUSED, matmul_dtype=EIGHT_BIT, gather="codes" if axis == "fsdp" else None)
    shape = MeshConfig(**{"data": 1, axis: 2})
    with jax.set_mesh(make_mesh(shape, jax.devices()[:2])):
        made = gradients(plan, dataclasses.replace(config, remat="dots"))
    assert_rounded_alike(errors(made, exact), rounded)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["activation", "add_gated", "add_norm_modulate"])
def test_a_pass_that_is_a_fifth_too_large_does_not_pass_for_rounding(monkeypatch, exact, rounded, config, wrong):
    module = backward
    if wrong == "activation":
        module, wrong = (biased, "gelu") if config.family == "dit" else (backward, "swiglu")
    original = getattr(module, wrong)

    def amplified(*arguments, **options):
        enlarge = lambda a: a * 1.2 if a is not None and a.dtype == jnp.bfloat16 else a  # noqa: E731
        return tuple(enlarge(a) for a in original(*arguments, **options))

    monkeypatch.setattr(module, wrong, amplified)
    made = gradients(dataclasses.replace(FUSED, matmul_dtype=EIGHT_BIT), config)
    with pytest.raises(AssertionError):
        assert_rounded_alike(errors(made, exact), rounded)


def test_blocks_that_fit(monkeypatch):
    monkeypatch.setattr(warpgroup, "run_on", lambda device: True)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    fits = lambda **fields: choose_plan(tiny_config(dtype="bfloat16", **fields), mesh).fused  # noqa: E731
    assert (
        fits(hidden_size=1536, num_heads=32, **BY_CHANNEL)
        and fits(hidden_size=1536, num_heads=32)
        and not fits(hidden_size=1152, num_heads=16)
    )
    assert fits(hidden_size=1152, num_heads=16, **DIT) and not fits(hidden_size=1152 + 64, num_heads=16, **DIT)


def test_watched_activations_are_those_of_plain_blocks(config):
    params = random_params(config)
    ours, plain = (
        activation_rms(config, plan.make_operands(config, params), *INPUTS, plan.run_blocks) for plan in (FUSED, PLAIN)
    )
    assert ours.keys() == plain.keys()
    for name, values in plain.items():
        np.testing.assert_allclose(ours[name], values, rtol=0.01)


@pytest.mark.parametrize("matmul_dtype", ["same", EIGHT_BIT])
def test_recomputation_keeps_products_alone(matmul_dtype):
    """With remat "dots", neither rows in 8 bits nor what kernels make: little more than half of what "none" keeps."""
    plan = dataclasses.replace(FUSED, matmul_dtype=matmul_dtype)

    def kept(remat):
        config = dataclasses.replace(CONFIG, remat=remat)
        _, pullback = jax.eval_shape(
            lambda params: jax.vjp(lambda params: run(plan, config, params), params), abstract_params(config)
        )
        return [leaf for leaf in jax.tree.leaves(pullback) if leaf.shape[:2] == (B, T)]

    none, dots = (kept(remat) for remat in ("none", "dots"))
    assert jnp.float8_e4m3fn not in {leaf.dtype for leaf in none + dots}
    size = lambda leaves: sum(leaf.size for leaf in leaves)  # noqa: E731
    assert size(dots) < 0.7 * size(none)
