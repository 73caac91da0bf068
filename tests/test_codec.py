import jax
import numpy as np
import pytest

from terdit_jax.data.codec import PixelCodec, VAECodec
from terdit_jax.errors import UserError
from terdit_jax.interop.vae_weights import load_vae
from terdit_jax.model.vae import encode
from tests.golden_models import GOLDEN


@pytest.fixture(scope="module")
def vae():
    return load_vae(GOLDEN / "vae_tiny")


def test_pixels_are_their_own_latents():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    mean, std = PixelCodec().encode(images)
    assert mean.dtype == np.float32 and not std.any()
    np.testing.assert_array_equal(np.round((mean.astype(np.float16).astype(np.float64) + 1) * 127.5), images)
    again, _ = PixelCodec().encode(mean)
    np.testing.assert_array_equal(again, mean)


@pytest.mark.parametrize("count", [1, 8, 11, 16])
def test_latents_are_the_encoders_on_all_devices_and_for_any_batch(vae, count):
    codec = VAECodec(*vae, "test", device_batch=2)
    assert codec.batch_size == 2 * jax.local_device_count() == 16
    images = np.random.default_rng(0).integers(256, size=(count, 16, 16, 3), dtype=np.uint8)
    found = codec.encode(images)
    assert all(array.dtype == np.float16 and len(array.sharding.device_set) == 8 for array in found)
    expected = encode(*vae, images / np.float32(127.5) - 1)
    for array, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(array)[:count], wanted, rtol=2e-3, atol=2e-3)  # of float16


def test_names_tell_weights_and_precision_apart(vae):
    names = {VAECodec(*vae, identity, dtype).name for identity in "ab" for dtype in ("float32", "bfloat16")}
    assert len(names) == 4
    assert VAECodec(*vae, "a").latent_scale == vae[0].scaling_factor


def test_images_that_the_autoencoder_cannot_take(vae):
    codec = VAECodec(*vae, "test")
    factor = vae[0].downsampling
    assert codec.latent_shape((8 * factor, 8 * factor, 3)) == (8, 8, vae[0].latent_channels)
    with pytest.raises(UserError, match=f"image_size={8 * factor + 1}: must be a multiple of {factor}"):
        codec.latent_shape((8 * factor + 1, 8 * factor + 1, 3))
    with pytest.raises(UserError, match="channels=1: the autoencoder takes 3"):
        codec.latent_shape((8 * factor, 8 * factor, 1))
