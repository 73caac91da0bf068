"""Which timesteps are visited: the published ones by default, distinct ones always, dense where they should be."""

import numpy as np
import pytest

from terdit_jax.choices import METHODS, SPACINGS
from terdit_jax.diffusion.schedule import linear_schedule, space_timesteps
from terdit_jax.diffusion.spacing import choose_timesteps
from terdit_jax.errors import UserError

FULL = linear_schedule()


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_count_gives_so_many_ascending_timesteps_from_end_to_end(spacing):
    for count in (2, 3, 7, 20, 50, 250, 600, 999, 1000):
        timesteps = choose_timesteps(FULL, count, spacing)
        assert len(timesteps) == count and all(type(t) is int for t in timesteps)
        assert timesteps[0] == 0 and timesteps[-1] == 999
        assert np.all(np.diff(timesteps) > 0)


def test_auto_is_as_published_for_the_published_methods_and_dense_at_low_noise_for_the_solvers():
    for method in METHODS:
        published = method in ("ddpm", "ddim")
        expected = space_timesteps(1000, 20) if published else choose_timesteps(FULL, 20, "power")
        assert choose_timesteps(FULL, 20, "auto", method) == expected


def test_powers_and_equal_steps_of_log_snr():
    np.testing.assert_array_equal(choose_timesteps(FULL, 10, "quadratic"), np.rint(999 * (np.arange(10) / 9) ** 2))
    np.testing.assert_array_equal(choose_timesteps(FULL, 8, "power"), np.rint(999 * (np.arange(8) / 7) ** 2.5))
    steps = np.array(choose_timesteps(FULL, 10, "logsnr"))
    logsnr = np.log(FULL.sqrt_alphas_cumprod / FULL.sqrt_one_minus_alphas_cumprod)
    gaps = np.diff(logsnr[steps])
    assert np.all(np.abs(gaps[2:] / gaps.mean() - 1) < 0.05), "equal, but for whole timesteps"


def test_one_step_is_the_noisiest():
    assert choose_timesteps(FULL, 1, "power") == choose_timesteps(FULL, 1, "logsnr") == (999,)


def test_bad_spacings_and_counts_are_named():
    with pytest.raises(UserError, match="'karras' is no spacing of timesteps: give one of auto, uniform"):
        choose_timesteps(FULL, 10, "karras")
    for count in (0, -1, 1001):
        for spacing in ("uniform", "power"):
            with pytest.raises(UserError, match=f"{count} timesteps"):
                choose_timesteps(FULL, count, spacing)
