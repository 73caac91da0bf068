"""Pixels come back at their own values; latents are decoded, or become a preview that uses the whole range."""

import numpy as np
import pytest

from terdit_jax.errors import UserError
from terdit_jax.inference.decoding import to_images
from terdit_jax.interop.vae_weights import load_vae
from terdit_jax.model.vae import decode_all
from terdit_jax.parallel.mesh import local_mesh
from tests.golden_models import GOLDEN, assert_close


def latents(channels):
    return np.random.default_rng(0).normal(size=(3, 4, 4, channels)).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_unscaled_and_not_clipped(channels):
    drawn = latents(channels)
    pictures = to_images(drawn, 0.5)
    assert pictures.dtype == np.float32 and np.abs(pictures).max() > 1
    np.testing.assert_array_equal(pictures, 2 * drawn)


def test_preview_stretches_each_of_three_channels_to_its_range():
    drawn = latents(4) * np.float32([1, 10, 0.1, 1000]) + np.float32([0, 5, -3, 0])
    pictures = to_images(drawn, 0.18215)
    assert pictures.shape == (3, 4, 4, 3) and pictures.dtype == np.float32
    np.testing.assert_allclose(pictures.min((0, 1, 2)), -1, atol=1e-6)
    np.testing.assert_allclose(pictures.max((0, 1, 2)), 1, atol=1e-6)
    for channel in range(3):  # an increasing, straight map of the latents
        slope, _ = np.polyfit(drawn[..., channel].ravel(), pictures[..., channel].ravel(), 1)
        correlation = np.corrcoef(drawn[..., channel].ravel(), pictures[..., channel].ravel())[0, 1]
        assert slope > 0 and correlation > 1 - 1e-6


def test_preview_of_a_constant_channel_is_finite():
    pictures = to_images(np.full((1, 2, 2, 4), 7.0, np.float32), 1.0)
    assert np.isfinite(pictures).all() and np.abs(pictures).max() <= 1


def test_two_channels_make_a_picture_too():
    assert to_images(latents(2), 1.0).shape[-1] in (1, 3)


def test_latents_are_unscaled_and_decoded():
    vae, drawn = load_vae(GOLDEN / "vae_tiny"), latents(4)
    pictures = to_images(drawn, 0.5, vae)
    assert pictures.shape == (3, 32, 32, 3)
    assert_close(pictures, decode_all(*vae, 2 * drawn))


def test_a_mesh_shares_the_decoding_and_changes_no_picture():
    """Five latents on eight devices: the last three are filled up and left out again."""
    (config, params), drawn = load_vae(GOLDEN / "vae_tiny"), np.concatenate([latents(4), latents(4)[:2]])
    mesh = local_mesh()
    assert mesh.size == 8
    pictures = to_images(drawn, 0.5, (config, params), mesh=mesh)
    assert pictures.shape == (5, 32, 32, 3)
    assert_close(pictures, decode_all(config, params, 2 * drawn))


def test_an_autoencoder_of_other_latents_is_refused():
    with pytest.raises(UserError, match="latents have 4 channels, the model draws 3"):
        to_images(latents(3), 1.0, load_vae(GOLDEN / "vae_tiny"))
