"""The tables and timestep sets against the public code's, and what respacing must leave unchanged."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.diffusion.schedule import Schedule, gather, linear_schedule, respace, space_timesteps
from terdit_jax.errors import UserError

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "diffusion_schedule.npz")
TABLES = [field.name for field in dataclasses.fields(Schedule)]


@pytest.mark.parametrize("name", [name for name in TABLES if name in GOLDEN])
def test_tables_are_the_public_codes(name):
    table = getattr(linear_schedule(), name)
    assert table.dtype == np.float64
    np.testing.assert_allclose(table, GOLDEN[name], rtol=1e-12, atol=0)


def test_golden_file_covers_the_tables():
    assert len([name for name in TABLES if name in GOLDEN]) == 8


@pytest.mark.parametrize(
    "section_counts, name",
    [
        (250, "space_250"),
        ("250", "space_250"),
        (50, "space_50"),
        ([10], "space_10"),
        ([10, 15, 20], "space_10_15_20"),
        ("10,15,20", "space_10_15_20"),
        ("ddim50", "space_ddim50"),
        ("ddim100", "space_ddim100"),
    ],
)
def test_timestep_sets_are_the_public_codes(section_counts, name):
    timesteps = space_timesteps(1000, section_counts)
    assert all(type(t) is int for t in timesteps)
    assert timesteps == tuple(GOLDEN[name])


def test_every_count_gives_so_many_ascending_timesteps_from_end_to_end():
    for count in range(2, 1001):
        timesteps = space_timesteps(1000, count)
        assert len(timesteps) == count
        assert timesteps[0] == 0 and timesteps[-1] == 999
        assert np.all(np.diff(timesteps) > 0)


@pytest.mark.parametrize(
    "section_counts, named",
    [
        (0, "0"),
        (-3, "-3"),
        (1001, "1001"),
        ("10,999,20", "999"),
        ("many", "'many'"),
        (2.5, "2.5"),
        (None, "None"),
        ("", "''"),
        ([], r"\[\]"),
        ("ddim333", "'ddim333'"),
        ("ddim0", "'ddim0'"),
        ("ddim", "'ddim'"),
        ("ddim-5", "'ddim-5'"),
    ],
)
def test_bad_counts_are_named(section_counts, named):
    with pytest.raises(UserError, match=f"^{named} ?") as caught:
        space_timesteps(1000, section_counts)
    assert "\n" not in str(caught.value)


def test_respacing_to_all_steps_changes_nothing():
    schedule = linear_schedule()
    again = respace(schedule, space_timesteps(1000, 1000))
    for name in TABLES:
        np.testing.assert_allclose(getattr(again, name), getattr(schedule, name), rtol=1e-10, atol=0, err_msg=name)


def test_respacing_keeps_the_noise_levels_and_names_the_models_timesteps():
    schedule = linear_schedule()
    timesteps = space_timesteps(1000, [10, 15, 20])
    short = respace(schedule, timesteps)
    assert short.num_timesteps == 45
    assert short.timestep_map.dtype == np.int32
    np.testing.assert_array_equal(short.timestep_map, timesteps)
    np.testing.assert_allclose(short.alphas_cumprod, schedule.alphas_cumprod[list(timesteps)], rtol=1e-12)

    shorter = respace(short, [0, 20, 44])
    np.testing.assert_array_equal(shorter.timestep_map, np.array(timesteps)[[0, 20, 44]])
    np.testing.assert_allclose(shorter.alphas_cumprod, schedule.alphas_cumprod[shorter.timestep_map], rtol=1e-12)


def test_one_step_has_finite_tables():
    short = respace(linear_schedule(), space_timesteps(1000, 1))
    assert all(np.all(np.isfinite(getattr(short, name))) for name in TABLES)


@pytest.mark.parametrize("timesteps", [[], [3, 2], [5, 5], [-1, 4], [0, 1000]])
def test_respacing_refuses_what_is_no_subset(timesteps):
    with pytest.raises(ValueError, match="ascend within 0..999"):
        respace(linear_schedule(), timesteps)


def test_other_lengths_end_at_the_same_noise():
    np.testing.assert_allclose(linear_schedule(4000).alphas_cumprod[-1], linear_schedule().alphas_cumprod[-1], rtol=0.1)
    with pytest.raises(ValueError, match="20 steps"):
        linear_schedule(20)


def test_gather_looks_up_float32_under_jit():
    schedule = linear_schedule()
    t = jnp.array([0, 7, 999], jnp.int32)
    entries = jax.jit(lambda t: gather(schedule.betas, t, 4))(t)
    assert entries.shape == (3, 1, 1, 1) and entries.dtype == jnp.float32
    np.testing.assert_array_equal(np.ravel(entries), schedule.betas[[0, 7, 999]].astype(np.float32))
