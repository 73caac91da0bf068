"""A record's draws follow from (seed, step, index) alone, and each has the distribution it should."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.diffusion.objective import Ddpm
from terdit_jax.training.examples import example_keys, make_examples

DDPM = Ddpm()
NUM_CLASSES = 10
MANY = 20_000


# Random numbers compile slowly on CPUs: unoptimised, and for few shapes.
@partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def _draw(batch, indices, seed, step, latent_scale, class_dropout_prob):
    return make_examples(
        batch,
        example_keys(seed, step, indices),
        DDPM,
        latent_scale=latent_scale,
        num_classes=NUM_CLASSES,
        class_dropout_prob=class_dropout_prob,
    )


def draw(batch, indices, *, seed=0, step=0, latent_scale=1.0, class_dropout_prob=0.1):
    return _draw(batch, indices, seed, step, latent_scale, class_dropout_prob)


def records(count=64, shape=(2, 4, 3)):
    rng = np.random.default_rng(0)
    return {
        "mean": rng.normal(size=(count, *shape)).astype(np.float16),
        "std": rng.uniform(0.1, 1, size=(count, *shape)).astype(np.float16),
        "label": rng.integers(0, NUM_CLASSES, count, dtype=np.int32),
    }


def constant_records(mean, std, count=64, shape=(2, 4, 3)):
    full = lambda value: np.full((count, *shape), value, np.float16)  # noqa: E731
    return {"mean": full(mean), "std": full(std), "label": np.zeros(count, np.int32)}


def rows(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


@pytest.fixture(scope="module")
def many():
    """Draws of 20,000 one-pixel records of mean 0 and std 1: x_0 is the posterior's noise itself."""
    draws = draw(constant_records(0, 1, MANY, (1, 1, 1)), np.arange(MANY))
    return {name: np.asarray(values) for name, values in draws.items()}


def test_examples_do_not_depend_on_their_neighbours():
    batch, indices = records(), np.arange(64)
    whole = draw(batch, indices)
    permutation = np.random.default_rng(1).permutation(64)
    permuted = draw(rows(batch, permutation), indices[permutation])
    jax.tree.map(np.testing.assert_array_equal, permuted, rows(whole, permutation))
    for part in (slice(0, 32), slice(32, 64)):
        split = draw(rows(batch, part), indices[part])
        jax.tree.map(np.testing.assert_array_equal, split, rows(whole, part))


def test_draws_do_not_depend_on_what_the_record_holds():
    one, other = draw(records(), np.arange(64)), draw(constant_records(3, 0), np.arange(64))
    np.testing.assert_array_equal(one["noise"], other["noise"])
    np.testing.assert_array_equal(one["t"], other["t"])


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}, {"indices": np.arange(64, 128)}])
def test_seed_step_and_index_each_change_every_draw(change):
    batch = constant_records(0, 1)
    base = draw(batch, np.arange(64))
    other = draw(batch, **{"indices": np.arange(64), **change})
    for name in ("x_0", "noise"):
        assert not np.any(base[name] == other[name]), name
    assert np.mean(base["t"] == other["t"]) < 0.1
    assert np.any(base["y"] != other["y"])


def test_no_two_records_of_a_step_share_their_noise(many):
    assert len(np.unique(many["noise"])) > 0.99 * MANY
    assert len(np.unique(many["x_0"])) > 0.99 * MANY


def test_shapes_and_dtypes():
    examples = draw(records(), np.arange(64))
    for name in ("x_0", "noise", "x_t"):
        assert examples[name].shape == (64, 2, 4, 3) and examples[name].dtype == jnp.float32
    for name in ("t", "y"):
        assert examples[name].shape == (64,) and examples[name].dtype == jnp.int32


def test_latents_are_drawn_from_the_posterior_and_scaled():
    batch, indices = records(), np.arange(64)
    unit = draw(constant_records(0, 1), indices)["x_0"]
    expected = (batch["mean"].astype(np.float32) + batch["std"].astype(np.float32) * unit) * 0.18215
    np.testing.assert_allclose(draw(batch, indices, latent_scale=0.18215)["x_0"], expected, rtol=1e-5, atol=1e-6)


def test_zero_std_is_exact():
    batch = records()
    batch["std"] = np.zeros_like(batch["std"])
    x_0 = draw(batch, np.arange(64), latent_scale=0.5)["x_0"]
    np.testing.assert_array_equal(x_0, batch["mean"].astype(np.float32) * np.float32(0.5))


def test_x_t_mixes_signal_and_noise_as_the_schedule_says():
    examples = jax.tree.map(np.asarray, draw(records(), np.arange(64)))
    alphas_cumprod = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[examples["t"]][:, None, None, None]
    expected = np.sqrt(alphas_cumprod) * examples["x_0"] + np.sqrt(1 - alphas_cumprod) * examples["noise"]
    np.testing.assert_allclose(examples["x_t"], expected, rtol=1e-5, atol=1e-6)


def test_noise_is_standard_normal(many):
    for draws in (many["noise"], many["x_0"]):
        assert abs(np.mean(draws)) < 0.03 and abs(np.std(draws) - 1) < 0.03
        assert np.mean(np.abs(draws) < 1) == pytest.approx(0.683, abs=0.02)


def test_timesteps_are_uniform_over_the_whole_schedule(many):
    counts = np.bincount(many["t"], minlength=1000)
    assert len(counts) == 1000 and counts.min() > 0
    expected = MANY / 1000
    assert np.sum((counts - expected) ** 2 / expected) < 1200  # chi-square of 999 degrees: 999 +- 45


def test_a_tenth_of_the_labels_becomes_the_null_class(many):
    dropped = many["y"] == NUM_CLASSES
    assert dropped.mean() == pytest.approx(0.1, abs=0.01)
    assert np.all(many["y"][~dropped] == 0), "the labels that stay are the records' own"


def test_no_label_is_dropped_at_probability_zero():
    batch = records()
    np.testing.assert_array_equal(draw(batch, np.arange(64), class_dropout_prob=0.0)["y"], batch["label"])
    assert np.any(draw(batch, np.arange(64), class_dropout_prob=0.5)["y"] != batch["label"])


def test_draws_of_different_purposes_are_independent(many):
    draws = [many["x_0"], many["noise"], many["t"], many["y"] == NUM_CLASSES]
    correlation = np.corrcoef([np.ravel(d).astype(float) for d in draws]) - np.eye(4)
    assert np.abs(correlation).max() < 0.04  # five standard deviations of 20,000 pairs
