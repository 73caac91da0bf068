"""The forward pass rearranged for inference equals the trained model, in every mode, on one device and on eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.config_sections import MeshConfig
from terdit_jax.fast import inference_pass
from terdit_jax.fast.modes import Numerics
from terdit_jax.inference.runtime import load_model
from terdit_jax.interop.exports import export
from terdit_jax.model.transformer import forward, packed_operands
from terdit_jax.parallel.mesh import make_mesh
from tests.deployed import golden_weights, random_params, small_config, weights_of
from tests.golden_models import BY_CHANNEL, DIT, assert_close, golden_arrays, nhwc
from tests.interpreted import interpreted_kernels

FLOAT32 = Numerics("float32", "float32", "float32")
# Relative error of what a network of two layers predicts, root mean square: 8-bit numbers have steps of 2^-4 to 2^-7.
EIGHT_BITS = {
    "float8_e4m3fn": (Numerics("float8_e4m3fn", "float8_e4m3fn", "float32"), 0.05),
    "int8": (Numerics("int8", "int8", "int32"), 0.02),
}
VARIANTS = {
    "published": {},
    "grouped heads": {"num_kv_heads": 1},
    "sincos positions": {"positions": "rope_1d_sincos_2d"},
    "no norms": {"qk_norm": False, "adaln_rms_norm": False},
    "Large-DiT": {"ternary": False},
    "ternary DiT": DIT,
    "DiT": {**DIT, "ternary": False},
    "by channel": {**BY_CHANNEL, "num_heads": 4, "num_kv_heads": 2},
    "ternary DiT by channel": {**DIT, **BY_CHANNEL},
}


def inputs(config, batch=8):
    x_t = np.random.default_rng(3).standard_normal((batch, *config.sample_shape), np.float32)
    return x_t, jnp.arange(batch) * 130, jnp.arange(batch) % (config.num_classes + 1)


def both(config, numerics, batch=8):
    """Outputs of the forward pass of training, in float32, and of that of inference."""
    operands = packed_operands(config, random_params(config))
    exact = dataclasses.replace(config, dtype="float32")
    expected = jax.jit(forward, static_argnums=0)(exact, operands, *inputs(config, batch))
    operands = inference_pass.make_inference_operands(config, numerics, operands)
    compute = jax.jit(inference_pass.inference_forward, static_argnums=(0, 1))
    return expected, compute(config, numerics, operands, *inputs(config, batch))


def error(actual, expected):
    actual, expected = (np.asarray(array, np.float64) for array in (actual, expected))
    return np.sqrt(np.mean(np.square(actual - expected)) / np.mean(np.square(expected)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("weights", ["float32", "packed"])
def test_it_is_the_same_function(variant, weights):
    config = small_config(**VARIANTS[variant])
    attention = "cpu" if weights == "packed" else "xla"
    expected, actual = both(config, Numerics(weights, "float32", "float32", attention=attention))
    assert actual.dtype == jnp.float32 and np.abs(expected).max() > 0.1
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("family", [{}, DIT], ids=["large_dit", "dit"])
def test_eight_bits_err_by_their_rounding(family, dtype):
    numerics, bound = EIGHT_BITS[dtype]
    expected, actual = both(small_config(**family), numerics)
    assert 1e-4 < error(actual, expected) < bound


@pytest.mark.parametrize(("weights", "operand"), [("packed", "bfloat16"), ("float8_e4m3fn", "float8_e4m3fn")])
@pytest.mark.parametrize(
    "family",
    [
        {"hidden_size": 256},
        {**DIT, "hidden_size": 384},
        {**BY_CHANNEL, "hidden_size": 512, "num_kv_heads": 2},
        pytest.param({**DIT, **BY_CHANNEL, "hidden_size": 384}, marks=pytest.mark.slow),
    ],
    ids=["large_dit", "dit", "large_dit by channel", "dit by channel"],
)
def test_kernels_make_the_same_function(monkeypatch, family, weights, operand):
    """Hardly further from float32 than without them: few numbers, rounded elsewhere."""
    config = small_config(
        **family, num_heads=4, ffn_multiple_of=256, depth=1, input_size=4, dtype="bfloat16", attention="xla"
    )
    numerics = Numerics(weights, operand, "bfloat16")
    plain = error(*both(config, numerics, batch=2)[::-1])
    with interpreted_kernels(monkeypatch):
        expected, actual = both(config, dataclasses.replace(numerics, kernels=True), batch=2)
    assert 1e-4 < error(actual, expected) < 1.2 * plain


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_where_weights_lie_changes_no_bit(dtype):
    numerics, _ = EIGHT_BITS[dtype]
    packed = Numerics("packed", numerics.matmul_dtype, numerics.product_dtype)
    np.testing.assert_array_equal(both(small_config(), packed)[1], both(small_config(), numerics)[1])


def test_what_is_held():
    config = small_config()
    operands = packed_operands(config, random_params(config))
    for weights, bits in (("packed", 2), ("float8_e4m3fn", 8), ("bfloat16", 16)):
        numerics = Numerics(weights, "bfloat16" if weights == "bfloat16" else "float8_e4m3fn", "float32")
        layers = inference_pass.make_inference_operands(config, numerics, operands)["layers"]
        matrices = [layer[name] for layer in layers for name in ("qkv", "out", "hidden", "down")]
        rows = 3 * config.hidden_size + config.hidden_size + 2 * config.mlp_width
        codes = config.depth * (rows * config.hidden_size + config.hidden_size * config.mlp_width)
        assert sum(matrix.nbytes for matrix in matrices) * 8 == bits * codes


@pytest.mark.parametrize("labels", [[3, 1, 3], [7]])
def test_modulations_worked_out_before_the_loop(labels, monkeypatch):
    """For guided calls, whose rows are a picture and its unconditional twin, and for unguided ones."""
    config, timesteps = small_config(), np.array([900, 500, 3])
    operands = packed_operands(config, random_params(config))
    operands = inference_pass.make_inference_operands(config, FLOAT32, operands)
    labels = jnp.array(labels)
    bound = jax.jit(inference_pass.bind_schedule(config, FLOAT32, operands, timesteps, labels))
    monkeypatch.setattr(inference_pass, "SCHEDULE_BYTES", 0)
    plain = jax.jit(inference_pass.bind_schedule(config, FLOAT32, operands, timesteps, labels))
    twins = jnp.stack([labels, jnp.full_like(labels, config.num_classes)], axis=1).ravel()
    for y in (labels, twins):
        x_t = np.random.default_rng(0).standard_normal((len(y), *config.sample_shape), np.float32)
        for t in timesteps:
            t = jnp.full(len(y), t)
            assert_close(bound(x_t, t, y), plain(x_t, t, y), 1e-5)
    assert error(bound(x_t, t, twins), bound(x_t, t + (500 - 3), twins)) > 1e-3


@pytest.mark.parametrize(
    ("mode", "dtype", "tolerance"),
    [("exact", "float32", 1e-5), ("exact", "bfloat16", 0.03), ("small_exact", "float32", 1e-5)],
)
def test_golden_outputs_of_the_public_code(tmp_path, mode, dtype, tolerance):
    export(golden_weights("terdit_tiny"), tmp_path / "model.safetensors", "packed")
    model, io = load_model(tmp_path / "model.safetensors", dtype=dtype, mode=mode), golden_arrays("terdit_tiny_io")
    assert model.numerics.matmul_dtype == dtype
    assert_close(model(nhwc(io["x"]), io["t"], io["y"]), nhwc(io["out"]), tolerance)
    if mode == "small_exact":  # within a program of the caller's, which has options of its own
        assert_close(jax.jit(lambda x_t: model(x_t, io["t"], io["y"]))(nhwc(io["x"])), nhwc(io["out"]), tolerance)


@pytest.fixture
def artifact(tmp_path):
    def write(config):
        weights = weights_of(config, random_params(config))
        export(weights, tmp_path / "model.safetensors", "packed")
        return tmp_path / "model.safetensors"

    return write


def test_eight_devices_compute_what_one_does(artifact):
    path = artifact(small_config(depth=1))
    one = load_model(path, mode="exact")
    eight = load_model(path, mode="exact", mesh=make_mesh(MeshConfig(data=8, fsdp=1, tensor=1)))
    assert all(len(leaf.devices()) == 8 for leaf in jax.tree.leaves(eight.operands))
    assert_close(eight(*inputs(one.config)), one(*inputs(one.config)), 1e-5)
    labels = np.arange(8)
    pictures = one.draw(labels, num_steps=3, method="ddim")
    assert_close(eight.draw(labels, num_steps=3, method="ddim"), pictures, 1e-4)
    assert_close(load_model(path).draw(labels, num_steps=3, method="ddim"), pictures, 1e-4)
    assert np.abs(pictures[0] - pictures[1]).max() > 0.1
