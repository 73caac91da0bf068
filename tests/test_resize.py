"""TensorFlow 1's bilinear rule, worked out pixel by pixel in exact fractions."""

from fractions import Fraction
import math

import jax
import numpy as np
import pytest

from terdit_jax.evaluation.resize import legacy_bilinear


def by_the_rule(x, height, width):
    """Output pixel (i, j) lies at (i in_h / out_h, j in_w / out_w); beyond the last pixel it is repeated."""

    def places(size, wanted):
        for i in range(wanted):
            place = Fraction(i * size, wanted)
            first = math.floor(place)
            yield first, min(first + 1, size - 1), float(place - first)

    out = np.empty((len(x), height, width, x.shape[-1]))
    for i, (top, bottom, down) in enumerate(places(x.shape[1], height)):
        for j, (left, right, along) in enumerate(places(x.shape[2], width)):
            upper = (1 - along) * x[:, top, left] + along * x[:, top, right]
            lower = (1 - along) * x[:, bottom, left] + along * x[:, bottom, right]
            out[:, i, j] = (1 - down) * upper + down * lower
    return out


@pytest.mark.parametrize(
    ("size", "wanted"), [((8, 8), (29, 29)), ((32, 64), (41, 40)), ((50, 40), (17, 13)), ((1, 3), (5, 4))]
)
def test_it_is_tensorflows_rule(size, wanted):
    x = np.random.default_rng(0).uniform(0, 255, (2, *size, 3)).astype(np.float32)
    found = jax.jit(legacy_bilinear, static_argnums=(1, 2))(x, *wanted)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, by_the_rule(x.astype(np.float64), *wanted), rtol=0, atol=255 * 1e-5)


def test_known_values():
    """Doubled, a ramp rises by halves and its last pixel is repeated: pixel centres would begin with 0, 0.25."""
    ramp = np.arange(4, dtype=np.float32).reshape(1, 1, 4, 1)
    np.testing.assert_array_equal(legacy_bilinear(ramp, 1, 8).ravel(), [0, 0.5, 1, 1.5, 2, 2.5, 3, 3])
    # Halved, every second pixel is taken as it is: no filter.
    np.testing.assert_array_equal(legacy_bilinear(ramp, 1, 2).ravel(), [0, 2])


def test_the_networks_own_size_stays_as_it_is():
    x = np.random.default_rng(1).uniform(0, 255, (1, 299, 299, 3)).astype(np.float32)
    np.testing.assert_array_equal(legacy_bilinear(x, 299, 299), x)


def test_256_pixels_become_299_within_float32():
    x = np.random.default_rng(2).uniform(0, 255, (1, 256, 3, 1)).astype(np.float32)
    found = legacy_bilinear(x, 299, 3)
    np.testing.assert_allclose(found, by_the_rule(x.astype(np.float64), 299, 3), rtol=0, atol=255 * 2e-5)
