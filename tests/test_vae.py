"""The autoencoder against diffusers' own outputs, and what it promises beside them: dtypes, batches, sizes."""

import dataclasses
from functools import partial
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.interop.vae_weights import load_vae
from terdit_jax.model import vae
from terdit_jax.model.vae import (
    VAEConfig,
    abstract_params,
    count_params,
    decode,
    decode_all,
    decoder_params,
    encode,
    encode_flops,
    encoder_params,
)
from terdit_jax.model.vae_layers import downsample, group_norm, upsample
from tests.golden_models import GOLDEN, assert_close, golden_arrays, nhwc

SMALL = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
jit_encode = jax.jit(encode, static_argnums=(0, 3))
jit_decode = jax.jit(decode, static_argnums=(0, 3))


def random_params(config):
    """Weights that keep the size of activations, biases and norms off their usual start."""
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        noise = generator.standard_normal(leaf.shape, np.float32)
        if leaf.ndim == 1:
            return 0.1 * noise + np.float32("norm" in path[-2].key and path[-1].key == "weight")
        return noise / np.float32(np.sqrt(leaf.size / leaf.shape[0]))

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def uniform(*shape):
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


@pytest.fixture(scope="module")
def golden():
    """(config, params, recorded arrays) of diffusers' autoencoder with narrow layers."""
    arrays = {name: nhwc(array) for name, array in golden_arrays("vae_tiny/vae_tiny_io").items()}
    return *load_vae(GOLDEN / "vae_tiny"), arrays


def test_encoder_matches_diffusers(golden):
    config, params, arrays = golden
    mean, std = jit_encode(config, params, arrays["x"], jnp.float32)
    assert_close(mean, arrays["mean"])
    assert_close(std, np.exp(0.5 * arrays["logvar"]))
    assert mean.dtype == std.dtype == jnp.float32


def test_decoder_matches_diffusers(golden):
    config, params, arrays = golden
    decoded = jit_decode(config, params, arrays["mean"], jnp.float32)
    assert_close(decoded, arrays["decoded"])
    assert decoded.dtype == jnp.float32


def test_the_published_model_has_its_number_of_parameters():
    assert count_params(VAEConfig()) == 83_653_863
    assert len(jax.tree.leaves(abstract_params(VAEConfig()))) == 248
    assert VAEConfig().downsampling == 8


def test_encoding_in_bfloat16_follows_float32():
    params, pictures = random_params(SMALL), uniform(1, 8, 8, 3)
    exact, rounded = (jit_encode(SMALL, params, pictures, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    for ours, expected in zip(rounded, exact, strict=True):
        assert ours.dtype == jnp.float32
        assert_close(ours, np.asarray(expected), tolerance=0.05)
        assert np.abs(ours - expected).max() > 1e-4, "nothing was computed in bfloat16"


def test_cast_once_or_in_each_call_is_the_same():
    params, pictures = random_params(SMALL), uniform(1, 8, 8, 3)
    cast = encoder_params(params, jnp.bfloat16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(cast | decoder_params(params, jnp.bfloat16)):
        assert leaf.dtype == (jnp.float32 if "norm" in path[-2].key else jnp.bfloat16)
    expected = jit_encode(SMALL, params, pictures, jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, jit_encode(SMALL, cast, pictures, jnp.bfloat16), expected)
    jax.tree.map(np.testing.assert_array_equal, encoder_params(params) | decoder_params(params), params)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (256, 128)])
def test_the_work_of_encoding_is_what_xla_counts(height, width):
    """XLA adds norms and activations, and leaves out what convolutions read beyond the edges."""
    arguments = abstract_params(VAEConfig()), jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    counted = jit_encode.lower(VAEConfig(), *arguments, jnp.float32).cost_analysis()["flops"]
    assert encode_flops(VAEConfig(), height, width) == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_float32_is_asked_of_every_multiplication(dtype):
    """Accelerators round float32 operands otherwise; a CPU cannot show it."""

    def round_trip(params, pictures):
        return decode(SMALL, params, encode(SMALL, params, pictures, dtype)[0], dtype)

    arguments = abstract_params(SMALL), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    program = jax.jit(round_trip).lower(*arguments).as_text().splitlines()
    for operation in ("stablehlo.convolution", "stablehlo.dot_general"):
        lines = [line for line in program if operation in line]
        assert lines
        assert all(("HIGHEST" in line) == (dtype == jnp.float32) for line in lines)


def test_group_norm_is_taken_over_pixels_and_channels_of_a_group():
    x, params = 5 + uniform(2, 4, 6, 12), {"weight": uniform(12) + 2, "bias": uniform(12)}
    grouped = x.astype(np.float64).reshape(2, 24, 3, 4)
    centred = grouped - grouped.mean((1, 3), keepdims=True)
    normal = centred / np.sqrt(grouped.var((1, 3), keepdims=True) + 1e-6)
    expected = normal.reshape(x.shape) * params["weight"] + params["bias"]
    norm = jax.jit(group_norm, static_argnums=2)
    assert_close(norm(params, x, 3), expected)
    # Squares of the values themselves would leave nothing of the variance.
    normal = norm({"weight": np.ones(12, np.float32), "bias": np.zeros(12, np.float32)}, 1e4 + x, 3)
    shifted = (1e4 + x).astype(np.float64).reshape(2, 24, 3, 4)
    spread = np.sqrt(shifted.var((1, 3), keepdims=True))
    assert_close(normal, ((shifted - shifted.mean((1, 3), keepdims=True)) / spread).reshape(x.shape), tolerance=2e-3)
    # In bfloat16 there is nothing between 100 and 100.5 for the mean to be.
    wide = np.full((1, 8, 8, 2), 100, jnp.bfloat16)
    wide[:, ::4] = 101
    normal = norm({"weight": np.ones(2, np.float32), "bias": np.zeros(2, np.float32)}, wide, 1)
    assert normal.dtype == jnp.bfloat16
    assert_close(np.float32(normal), np.where(wide == 101, np.sqrt(3), -np.sqrt(1 / 3)), tolerance=0.01)


def test_resolution_changes_where_diffusers_changes_it():
    """One pixel in, a kernel that only copies: where it goes shows the padding."""
    copy = {"conv": {"weight": np.zeros((1, 3, 3, 1), np.float32), "bias": np.zeros(1, np.float32)}}
    copy["conv"]["weight"][0, 0, 0] = 1
    picture = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(downsample(copy, jnp.asarray(picture)), picture[:, ::2, ::2])
    copy["conv"]["weight"][...] = 0
    copy["conv"]["weight"][0, 2, 2] = 1
    expected = np.pad(picture[:, 2::2, 2::2], ((0, 0), (0, 1), (0, 1), (0, 0)))
    np.testing.assert_array_equal(downsample(copy, jnp.asarray(picture)), expected)
    copy["conv"]["weight"][...] = 0
    copy["conv"]["weight"][0, 1, 1] = 1
    np.testing.assert_array_equal(upsample(copy, jnp.asarray(picture)), picture.repeat(2, axis=1).repeat(2, axis=2))


@pytest.mark.parametrize("bias", [-1e3, 1e3])
def test_the_spread_is_bounded(bias):
    params = random_params(SMALL)
    params["quant_conv"]["bias"] = np.full(8, bias, np.float32)
    _, std = jit_encode(SMALL, params, uniform(1, 8, 8, 3), jnp.float32)
    np.testing.assert_allclose(std, np.exp(10 if bias > 0 else -15), rtol=1e-6)


@pytest.fixture(scope="module")
def five():
    """(params, latents, pictures) of five latents decoded together."""
    params, latents = random_params(SMALL), uniform(5, 4, 6, 4)
    return params, latents, np.asarray(jit_decode(SMALL, params, latents, jnp.float32))


@pytest.mark.parametrize(("count", "batch_size"), [(5, 2), (2, 8), (0, 2)])
def test_decoding_in_batches_is_decoding(five, count, batch_size):
    params, latents, expected = five
    vae._decode.clear_cache()
    pictures = decode_all(SMALL, params, latents[:count], batch_size=batch_size)
    assert isinstance(pictures, np.ndarray) and pictures.shape == (count, 8, 12, 3) and pictures.dtype == np.float32
    np.testing.assert_allclose(pictures, expected[:count], rtol=0, atol=1e-5 * np.abs(expected).max())
    assert vae._decode._cache_size() == min(count, 1), "one program for all batches"


@pytest.mark.parametrize(("side", "batch_size"), [(16, 32), (32, 8), (64, 2), (128, 1)])
def test_larger_pictures_are_decoded_fewer_at_once(monkeypatch, side, batch_size):
    shapes = []

    def decoded(config, params, latents, dtype):
        shapes.append(latents.shape)
        return np.zeros((len(latents), 1, 1, 1), np.float32)

    monkeypatch.setattr(vae, "_decode", decoded)
    config = VAEConfig(block_out_channels=(1,) * 4, norm_num_groups=1, out_channels=1)
    decode_all(config, random_params(config), np.zeros((batch_size + 1, side, side, 4), np.float32))
    assert {shape[0] for shape in shapes} == {batch_size}


def test_decoding_in_bfloat16_follows_float32(five):
    params, latents, exact = five
    rounded = decode_all(SMALL, params, latents[:1], "bfloat16")
    assert 1e-4 < np.abs(exact[:1] - rounded).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("shape", [(1, 8, 8, 4), (1, 9, 8, 3), (1, 8, 9, 3), (8, 8, 3)])
def test_pictures_of_another_shape_are_refused(shape):
    with pytest.raises(AssertionError):
        jax.eval_shape(partial(encode, SMALL), abstract_params(SMALL), jax.ShapeDtypeStruct(shape, jnp.float32))


def test_the_benchmarks_peer_is_the_same_encoder():
    torch = pytest.importorskip("torch")
    path = Path(__file__).parents[1] / "benchmarks" / "torch_vae.py"
    spec = importlib.util.spec_from_file_location("torch_vae", path)
    torch_vae = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(torch_vae)
    params, pictures = random_params(SMALL), uniform(1, 8, 8, 3)
    encoder = torch_vae.make_encoder(SMALL, params, torch.float32, "cpu")
    for ours, theirs in zip(
        jit_encode(SMALL, params, pictures, jnp.float32), encoder(torch_vae.to_torch(pictures, "cpu")), strict=True
    ):
        assert_close(ours, nhwc(theirs.numpy()))


@pytest.mark.slow
def test_full_size_matches_diffusers(tmp_path):
    """In float64, for its float32 is off by as much as we may be: 1.0e-5 of the largest pixel, ours by 4.4e-6."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    reference = diffusers.AutoencoderKL(
        **dataclasses.asdict(VAEConfig()),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    reference.save_pretrained(tmp_path)
    config, params = load_vae(tmp_path)
    assert config == VAEConfig()
    pictures = uniform(2, 64, 64, 3)
    with torch.no_grad():
        reference.double()
        posterior = reference.encode(torch.from_numpy(np.moveaxis(pictures, -1, 1).astype(np.float64))).latent_dist
        decoded = reference.decode(posterior.mean).sample
    mean, std = jit_encode(config, params, pictures, jnp.float32)
    assert_close(mean, nhwc(posterior.mean.numpy()))
    assert_close(std, nhwc(posterior.std.numpy()))
    assert_close(decode_all(config, params, nhwc(posterior.mean.numpy())), nhwc(decoded.numpy()))
