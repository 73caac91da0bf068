"""Every fast function has the values, and where it has any the gradients, of the plain function that it names."""

import contextlib
import dataclasses
from functools import partial
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from terdit_jax.config_sections import MeshConfig
import terdit_jax.fast
from terdit_jax.fast import cpu_attention, eight_bit, inference_pass, xla_passes
from terdit_jax.fast.expand import expand
from terdit_jax.fast.hopper import backward, biased
from terdit_jax.fast.hopper import forward as hopper_passes
from terdit_jax.fast.hopper.swiglu_matmul import swiglu_matmul
from terdit_jax.fast.linear import FastLinear, make_fast, ternarize_by_layer
from terdit_jax.fast.modes import Numerics
from terdit_jax.fast.plan import FastPlan
from terdit_jax.fast.unrolled import gradient_norm_by_layer
from terdit_jax.model.feed_forward import swiglu as plain_swiglu
from terdit_jax.model.layers import rms_norm
from terdit_jax.model.plan import PLAIN
from terdit_jax.model.transformer import forward, packed_operands
from terdit_jax.parallel.mesh import make_mesh
from terdit_jax.ternary.linear import FullLinear, TernaryLinear, code_product, input_gradient
from terdit_jax.ternary.packing import pack, unpack
from terdit_jax.ternary.quantize import absmean_codes, ternarize
from tests.golden_models import BY_CHANNEL, DIT, random_params, tiny_config
from tests.interpreted import ON_HOPPER, interpreted_kernels

CONFIG = tiny_config(depth=2)
WIDE = tiny_config(hidden_size=256, num_heads=4, depth=1, input_size=4, dtype="bfloat16", grad_dtype="bfloat16")


def draws(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def inputs(config):
    return draws(2, *config.sample_shape), jnp.array([20, 700]), jnp.array([1, config.num_classes])


CODES, ALPHA, X = absmean_codes(draws(3, 8, 16, seed=1)), jnp.array([0.5, -2.0, 3.0]), draws(8, 5, 16, seed=2)
SINK, DY = jnp.zeros(CODES.shape), draws(8, 5, 3, 8, seed=3)
LAYERS = draws(4, 8, 16, seed=4), jnp.array([0.5, -2.0, 3.0, 1.0])


def network(plan, config):
    """A function of parameters."""
    return lambda params: forward(config, plan.make_operands(config, params), *inputs(config), plan.run_blocks)


def cut_linear(x, sink):
    """One layer of a map that the devices of the mesh in context hold in parts."""
    linear = TernaryLinear(CODES[None], ALPHA[None], sink[None])
    made = make_fast({"blocks": {"attention": {"qkv": linear}}}, eight_bit.SAME, "codes", ())
    return jax.tree.map(lambda leaf: leaf[0], made["blocks"]["attention"]["qkv"])(x)


def inference(config, x_t, t, y):
    numerics = Numerics("float32", "float32", "float32")
    operands = inference_pass.make_inference_operands(config, numerics, packed_operands(config, random_params(config)))
    return inference_pass.inference_forward(config, numerics, operands, x_t, t, y)


def plain_norm_modulate(x, gain, shift):
    return rms_norm(x, 1.0) * gain[:, None] + shift[:, None]


def backward_norm_modulate(x, gain, shift):
    dx, dh = (draws(*x.shape, seed=seed, dtype=jnp.bfloat16) for seed in (1, 2))
    made = backward.add_norm_modulate(x.astype(jnp.bfloat16), None, None, None, gain, dx, dh, None)
    return made[0], made[4][:, 1], made[4][:, 0]


def gradient_of_norm_modulate(x, gain, shift):
    _, pullback = jax.vjp(lambda x, *rest: (x, plain_norm_modulate(x, *rest)), x, gain, shift)
    return pullback(tuple(draws(*x.shape, seed=seed, dtype=jnp.bfloat16).astype(jnp.float32) for seed in (1, 2)))


def gradient_of_gelu(y, bias):
    """The gradient of the sum of all that `mlp` makes of products with a bias."""
    return jax.grad(lambda y: jnp.sum(jax.nn.gelu(y + bias, approximate=True)))(y)


def backward_gelu(y, bias):
    y = y.astype(jnp.bfloat16)
    return biased.gelu(y, None, jnp.ones(1), bias, jnp.ones_like(y), None)[0]


def swiglu(x, weight):
    return plain_swiglu({"w13": FullLinear(weight.reshape(2, -1, x.shape[-1])), "down": lambda h: h[..., None, :]}, x)


WIDE_X = jnp.round(4 * draws(1, 128, 128, seed=5)).astype(jnp.bfloat16)
WIDE_CODES = absmean_codes(draws(256, 128, seed=6)).astype(jnp.bfloat16)
IN_BFLOAT16 = hopper_passes.Stored(True, None)
ROWS = draws(2, 4, 256), draws(2, 256, seed=1), draws(2, 256, seed=2)

# module: (plain, fast, arguments, relative error in norm, whether gradients are compared too)
PAIRS = {
    "linear": [
        (TernaryLinear(CODES, ALPHA, SINK), FastLinear(CODES, ALPHA, SINK), (X,), 1e-6, True),
        (ternarize, ternarize_by_layer, LAYERS, 1e-6, False),
        (
            lambda weight, alpha: TernaryLinear(*ternarize(weight, alpha))(X),
            lambda weight, alpha: TernaryLinear(*ternarize_by_layer(weight, alpha))(X),
            LAYERS, 1e-6, True,
        ),
    ],
    "gather": [(lambda x, sink: TernaryLinear(CODES, ALPHA, sink)(x), cut_linear, (X, SINK), 1e-6, True)],
    "eight_bit": [
        (code_product, lambda x, codes: eight_bit.rounded_product(x, codes, "int8"), (X, CODES), 0.01, False),
        (
            input_gradient,
            lambda dy, codes: eight_bit.rounded_input_gradient(dy, codes, "int8"),
            (DY, CODES), 0.01, False,
        ),
    ],
    "cpu_attention": [
        (jax.nn.dot_product_attention, cpu_attention.attention, tuple(draws(2, 5, n, 6, seed=n) for n in heads), 1e-6,
         False)
        for heads in ((4, 4, 4), (4, 2, 2))
    ],
    "expand": [(unpack, lambda packed: expand(packed, "bfloat16"), (pack(CODES),), 0, False)],
    "unrolled": [
        (network(PLAIN, CONFIG), network(FastPlan(layers="unrolled"), CONFIG), (random_params(CONFIG),), 1e-5, True),
        (optax.tree.norm, gradient_norm_by_layer, ({"blocks": {"a": X}, "b": DY},), 1e-6, False),
    ],
    "fused_block": [(network(PLAIN, WIDE), network(FastPlan(fused=True), WIDE), (random_params(WIDE),), 0.02, True)],
    "inference_pass": [
        (
            lambda *given, config=config: network(PLAIN, config)(random_params(config)),
            partial(inference, config),
            inputs(config), 1e-5, False,
        )
        for config in (CONFIG, dataclasses.replace(CONFIG, **DIT), dataclasses.replace(CONFIG, **BY_CHANNEL))
    ],
    "xla_passes": [(plain_norm_modulate, xla_passes.norm_modulate, ROWS, 1e-6, True)],
    "hopper.forward": [
        (
            plain_norm_modulate,
            lambda x, *rest: hopper_passes.norm_modulate(x.astype(jnp.bfloat16), *rest, IN_BFLOAT16)[0],
            ROWS, 0.01, False,
        )
    ],
    "hopper.backward": [(gradient_of_norm_modulate, backward_norm_modulate, ROWS, 0.01, False)],
    "hopper.biased": [(gradient_of_gelu, backward_gelu, (draws(2, 8, 256), draws(256, seed=1)), 0.01, False)],
    "hopper.swiglu_matmul": [
        (
            swiglu,
            lambda x, weight: swiglu_matmul(x[0], None, weight, jnp.ones(2))[None],
            (WIDE_X, WIDE_CODES), 0.01, False,
        )
    ],
}  # fmt: skip
CHOOSERS = {"plan", "modes", "fused_passes", "hopper", "hopper.warpgroup"}  # which compute nothing themselves


def assert_near(actual, expected, bound):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape and np.linalg.norm(a - e) <= bound * np.linalg.norm(e)


def compare(plain, fast, arguments, bound, with_gradients):
    if not with_gradients:
        return assert_near(fast(*arguments), plain(*arguments), bound)
    made, pullback = jax.vjp(jax.jit(fast) if not hasattr(fast, "alpha") else fast, *arguments)
    expected, plain_pullback = jax.vjp(plain, *arguments)
    assert_near(made, expected, bound)
    cotangent = jax.tree.map(lambda leaf: draws(*leaf.shape, seed=9, dtype=leaf.dtype), expected)
    gradients = [jax.tree.leaves(pull(cotangent)) for pull in (pullback, plain_pullback)]
    large = max(float(jnp.abs(leaf).max()) for leaf in gradients[1])
    assert large > 0
    for ours, exact in zip(*gradients, strict=True):  # those that are zero but for rounding have no relative error
        assert jnp.linalg.norm((ours - exact).ravel()) <= 2 * bound * max(jnp.linalg.norm(exact.ravel()), large)


@pytest.mark.parametrize(("module", "number"), [(name, i) for name, pairs in PAIRS.items() for i in range(len(pairs))])
def test_a_fast_function_equals_its_plain_one(monkeypatch, module, number):
    if module == "hopper.swiglu_matmul" and not ON_HOPPER:
        pytest.skip("no machine but a Hopper GPU runs it")
    context: contextlib.AbstractContextManager = contextlib.nullcontext()
    if module == "fused_block" or module.startswith("hopper."):
        context = interpreted_kernels(monkeypatch)
    elif module == "gather":
        context = jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=8)))
    with context:
        compare(*PAIRS[module][number])


def test_every_fast_module_is_compared_and_names_its_plain_function():
    prefix = f"{terdit_jax.fast.__name__}."
    found = {info.name.removeprefix(prefix) for info in pkgutil.walk_packages(terdit_jax.fast.__path__, prefix)}
    assert found == PAIRS.keys() | CHOOSERS
    for name in PAIRS:
        first = importlib.import_module(prefix + name).__doc__.split("\n\n")[0].split("\n")[0]
        assert "equal" in first and "`" in first, f"{name}: {first}"
