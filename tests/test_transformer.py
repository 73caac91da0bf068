"""The whole network against the public PyTorch code, its parameter counts, and its equivalent forms."""

import dataclasses
from functools import partial

from flax import nnx
import jax
from jax.interpreters.partial_eval import dce_jaxpr
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.diffusion.guidance import guided
from terdit_jax.fast.plan import FastPlan
from terdit_jax.model.plan import PLAIN
from terdit_jax.model.transformer import (
    DiT,
    abstract_params,
    activation_rms,
    count_params,
    forward,
    make_operands,
    packed_bytes,
    packed_operands,
)
from tests.golden_models import (
    BY_CHANNEL,
    DIT,
    assert_close,
    assert_trees_close,
    golden_arrays,
    golden_config,
    golden_params,
    nhwc,
    random_params,
    tiny_config,
)
from tests.traced import products

MODELS = ("terdit_tiny", "terdit_tiny_noqk", "largedit_tiny", "dit_tiny", "sit_tiny")
DIT_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
SIZES = {"600m": (1536, 16, 32), "4b": (3072, 32, 32), "7b": (4096, 32, 32)}


UNROLLED = FastPlan(layers="unrolled")
both_plans = pytest.mark.parametrize("plan", [PLAIN, UNROLLED], ids=["plain", "fast"])


@partial(jax.jit, static_argnums=(0,), static_argnames=("packed",))
def output(config, params, x_t, t, y, packed=False):
    return forward(config, (packed_operands if packed else make_operands)(config, params), x_t, t, y)


def run_plan(plan, config, params, x_t, t, y):
    return forward(config, plan.make_operands(config, params), x_t, t, y, plan.run_blocks)


def inputs(config, batch=4, seed=3):
    x_t = jax.random.normal(jax.random.key(seed), (batch, *config.sample_shape))
    return x_t, jnp.arange(batch) * 300 % 1000, jnp.arange(batch) % (config.num_classes + 1)


def loss_and_grads(config, params, plan=PLAIN):
    x_t, t, y = inputs(config)
    target = jax.random.normal(jax.random.key(9), (*x_t.shape[:-1], 2 * config.in_channels))

    @jax.jit
    def run(params):
        loss = lambda p: jnp.mean((run_plan(plan, config, p, x_t, t, y) - target) ** 2)  # noqa: E731
        return jax.value_and_grad(loss)(params)

    return run(params)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("packed", [False, True])
@both_plans
def test_golden_forward_and_guidance(plan, name, packed):
    config = golden_config(name)
    if packed and not config.ternary:
        pytest.skip("a full-precision model has nothing to pack")
    operands = (packed_operands if packed else plan.make_operands)(config, golden_params(config, name))
    io = golden_arrays(f"{name}_io")

    channels = nhwc(io["out"]).shape[-1]  # SiT returns the first half

    def denoise(x_t, t, y):
        out = jax.jit(forward, static_argnums=(0, 5))(config, operands, x_t, t, y, plan.run_blocks)
        return out[..., :channels]

    assert_close(denoise(nhwc(io["x"]), io["t"], io["y"]), nhwc(io["out"]))
    x, t, y = nhwc(io["cfg_x"])[:2], io["cfg_t"][:2], io["cfg_y"][:2]
    out = guided(denoise, y, config.num_classes, float(io["cfg_scale"]), 3)(x, t)
    expected = nhwc(io["cfg_out"])
    assert_close(out, expected[:2])
    # The public code also returns the unconditional half: the same guided channels, its own rest.
    rest = denoise(x, t, np.full(2, config.num_classes))[..., 3:]
    assert_close(jnp.concatenate([out[..., :3], rest], -1), expected[2:])


def test_calling_the_module_is_the_forward_pass():
    config = tiny_config(depth=2)
    model, params = DiT(config, rngs=nnx.Rngs(params=0)), random_params(config)
    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, params)
    nnx.update(model, state)
    expected = output(config, params, *inputs(config))
    assert_close(model(*inputs(config)), np.asarray(expected))


@pytest.mark.parametrize(
    ("size", "ternary", "total"),
    [
        ("600m", True, 609_984_160),
        ("600m", False, 609_836_576),
        ("4b", True, 4_238_414_112),
        ("4b", False, 4_237_824_032),
        ("7b", True, 7_294_606_624),
        ("7b", False, 7_293_819_936),
    ],
)
def test_published_parameter_counts(size, ternary, total):
    hidden_size, depth, heads = SIZES[size]
    config = tiny_config(
        ternary=ternary, hidden_size=hidden_size, depth=depth, num_heads=heads, num_classes=1000, input_size=32
    )
    assert count_params(config)["total"] == total
    if ternary:
        assert count_params(config)["ternary"] == {"600m": 603_979_776, "4b": 4_227_858_432, "7b": 7_281_311_744}[size]
        assert packed_bytes(config) == pytest.approx({"600m": 175.0e6, "4b": 1099e6, "7b": 1874e6}[size], rel=5e-3)


@pytest.mark.parametrize(
    ("size", "total"), [("S", 32_963_360), ("B", 130_512_416), ("L", 458_102_816), ("XL", 675_129_632)]
)
def test_published_parameter_counts_of_dit(size, total):
    hidden_size, depth, heads = DIT_SIZES[size]
    sizes = {"hidden_size": hidden_size, "depth": depth, "num_heads": heads, "num_classes": 1000, "input_size": 32}
    counts = count_params(tiny_config(ternary=False, **DIT, **sizes))
    assert counts == {"total": total - 256 * hidden_size, "ternary": 0}  # without the fixed table of positions
    ternary = count_params(tiny_config(**DIT, **sizes))
    assert ternary["ternary"] == depth * 18 * hidden_size**2  # attention 4, feed-forward 8, adaLN 6
    assert ternary["total"] == counts["total"] + depth * (6 * hidden_size + 7)  # RMSNorm after adaLN, alphas


@pytest.mark.parametrize(
    "fields", [{"positions": "rope_1d_sincos_2d"}, {"ternary": False}, DIT, {**DIT, "ternary": False}, BY_CHANNEL]
)
def test_scan_equals_loop_and_remat_changes_nothing(fields):
    config = tiny_config(**{"hidden_size": 32, "depth": 2, **fields})
    params = random_params(config)
    loss, grads = loss_and_grads(config, params)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    for remat, plan in (("none", UNROLLED), ("block", PLAIN), ("dots", PLAIN), ("dots", UNROLLED)):
        other_loss, other_grads = loss_and_grads(dataclasses.replace(config, remat=remat), params, plan)
        assert_close(other_loss, np.asarray(loss))
        assert_trees_close(other_grads, grads)


def test_unrolled_layers_get_the_gradients_of_their_modulation_one_by_one():
    """A gradient that one product makes of all layers' waits for the whole backward pass, and with it its sum over a
    mesh."""
    config = tiny_config()
    params = abstract_params(config)
    weight = params["blocks"]["adaLN_modulation"]["weight"].shape[1:]
    x_t, t, y = inputs(config)
    loss = lambda p: jnp.mean(run_plan(UNROLLED, config, p, x_t, t, y))  # noqa: E731
    traced = jax.make_jaxpr(jax.grad(loss))(params).jaxpr
    needed, _ = dce_jaxpr(traced, [True] * len(traced.outvars))
    shapes = [product.outvars[0].aval.shape for product, _ in products(needed)]
    assert shapes.count((1, *weight)) == config.depth and (config.depth, 1, *weight) not in shapes
    # Forward, and back to the condition, it is one product of all.
    assert shapes.count((len(y), config.depth, 1, weight[0])) == 1
    assert shapes.count((config.depth, len(y), weight[1])) == 1


def test_remat_policies_rematerialise():
    """The flag must reach the compiled program: checkpointed blocks hold fewer residuals."""
    params = abstract_params(tiny_config())
    x_t, t, y = inputs(tiny_config())

    def residual_bytes(remat):
        config = tiny_config(remat=remat)
        _, pullback = jax.eval_shape(
            lambda p: jax.vjp(lambda q: forward(config, make_operands(config, q), x_t, t, y), p), params
        )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))

    none, dots, block = (residual_bytes(remat) for remat in ("none", "dots", "block"))
    assert block < dots < none


@pytest.mark.parametrize(
    ("heads", "kv_heads", "fields"),
    [(8, 8, {"ternary": False}), (8, 2, {"ternary": False}), (8, 2, BY_CHANNEL)],
    ids=str,
)
def test_grouped_kv_heads_match_repeated_heads(heads, kv_heads, fields):
    """wk and wv of a grouped model, repeated for each query head, give the ungrouped model's output."""
    config = tiny_config(num_heads=heads, num_kv_heads=kv_heads, qk_norm=False, **fields)
    full = dataclasses.replace(config, num_kv_heads=heads)
    params = random_params(config)
    repeated = jax.tree.map(lambda leaf: leaf, params)
    for name in ("wk", "wv"):
        for key, leaf in params["blocks"]["attention"][name].items():
            per_head = leaf.reshape(config.depth, kv_heads, config.head_dim, *leaf.shape[2:])
            repeated["blocks"]["attention"][name][key] = jnp.repeat(per_head, heads // kv_heads, 1).reshape(
                config.depth, config.hidden_size, *leaf.shape[2:]
            )
    expected = output(full, repeated, *inputs(config))
    assert_close(output(config, params, *inputs(config)), np.asarray(expected))


@pytest.mark.usefixtures("optimised")
def test_grouped_kv_heads_with_qk_norm_are_packed_as_trained():
    config = tiny_config(num_heads=8, num_kv_heads=2)
    params = random_params(config)
    trained = output(config, params, *inputs(config))
    assert_close(output(config, params, *inputs(config), packed=True), np.asarray(trained), 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [{}, DIT, {**BY_CHANNEL, "num_kv_heads": 2}], ids=["large_dit", "dit", "by channel"])
def test_packed_model_equals_trained_model_bit_for_bit(family, dtype):
    config = tiny_config(dtype=dtype, **family)
    params = random_params(config)
    run = jax.jit(forward, static_argnums=0)
    trained = run(config, make_operands(config, params), *inputs(config))
    packed = run(config, packed_operands(config, params), *inputs(config))
    assert_close(packed, np.asarray(trained), 0 if dtype == "float32" else 2e-2)


def test_bfloat16_follows_float32():
    params = random_params(tiny_config())
    expected = output(tiny_config(), params, *inputs(tiny_config()))
    config = tiny_config(dtype="bfloat16")
    error = output(config, params, *inputs(config)) - expected
    assert 0 < jnp.linalg.norm(error) < 2e-2 * jnp.linalg.norm(expected)


def test_absolute_positions_tell_places_apart():
    """On a constant picture equal values give attention equal outputs, so only absolute positions vary a patch."""
    x_t, t, y = inputs(tiny_config())
    x_t = jnp.broadcast_to(x_t[:, :1, :1], x_t.shape)
    for positions, varies in (("rope_1d", False), ("rope_1d_sincos_2d", True)):
        config = tiny_config(positions=positions)
        out = output(config, random_params(config), x_t, t, y)
        assert bool(jnp.abs(out[:, :2, :2] - out[:, 2:4, 2:4]).max() > 1e-2) == varies


def test_activation_rms_has_a_value_a_layer():
    config = tiny_config()
    seen = activation_rms(config, make_operands(config, random_params(config)), *inputs(config))
    assert set(seen) == {"attention", "feed_forward", "adaLN_modulation", "residual"}
    assert all(rms.shape == (config.depth,) and bool((rms > 0).all()) for rms in seen.values())
