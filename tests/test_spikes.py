"""The guard against loss spikes finds what a plain running mean and variance find, and changes nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.config_sections import OptimizerConfig
from terdit_jax.training.optimizer import empty_spikes, judge_loss, make_optimizer
from terdit_jax.training.state import empty_sums, init_state
from terdit_jax.training.step import apply_gradients
from tests.golden_models import random_params, tiny_config


def judged(losses, sigma=4.0, window=10, spikes=None):
    """Which losses are spikes, and the statistics after the last."""
    config = OptimizerConfig(spike_sigma=sigma, spike_window=window)
    judge = jax.jit(lambda spikes, loss: judge_loss(config, spikes, loss))
    spikes, found = spikes or empty_spikes(), []
    for loss in losses:
        spike, spikes = judge(spikes, jnp.float32(loss))
        found.append(bool(spike))
    return found, spikes


def noise(count, seed=0):
    return 1 + 0.1 * np.random.default_rng(seed).uniform(-1, 1, count)


def test_statistics_are_the_plain_mean_and_variance_until_the_window_is_full():
    losses = noise(10)
    found, spikes = judged(losses)
    assert not any(found) and int(spikes["seen"]) == 10
    np.testing.assert_allclose(spikes["mean"], losses.mean(), rtol=1e-6)
    np.testing.assert_allclose(spikes["variance"], losses.var(), rtol=1e-4)


def test_a_spike_is_found_counted_and_hardly_moves_the_statistics():
    losses = [*noise(30), 5.0, *noise(20, seed=1)]
    found, spikes = judged(losses)
    assert [i for i, spike in enumerate(found) if spike] == [30]
    assert int(spikes["total"]) == 1
    np.testing.assert_allclose(spikes["mean"], 1, atol=0.1)


@pytest.mark.parametrize(("losses", "sigma"), [([*noise(5), 50.0], 4.0), ([*noise(30), 50.0], 0.0)])
def test_neither_in_the_first_window_nor_when_off(losses, sigma):
    assert not any(judged(losses, sigma)[0])


def test_a_low_loss_is_no_spike():
    assert not any(judged([*noise(30), -50.0])[0])


def test_a_new_level_is_accepted_in_the_end():
    found, _ = judged([*noise(30), *(1 + noise(100, seed=1))])
    assert found[30] and not any(found[-50:])


@pytest.mark.parametrize("loss", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_is_left_to_the_other_guard(loss):
    _, before = judged(noise(30))
    (spike,), after = judged([loss], spikes=before)
    assert not spike
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_a_spike_teaches_nothing_but_is_logged():
    model = tiny_config(depth=1, hidden_size=32)
    config = OptimizerConfig(spike_sigma=4.0, spike_window=10)
    optimizer = make_optimizer(config)
    _, spikes = judged(noise(30))
    state = init_state(model, optimizer, 0, random_params(model)) | {"spikes": spikes}
    update = jax.jit(lambda *args: apply_gradients(optimizer, config, *args, jnp.float32(1)))
    grads = jax.tree.map(jnp.ones_like, state["params"])
    after = update(state, empty_sums() | {"loss": jnp.float32(5)}, grads)
    for name in ("params", "ema_params", "opt_state", "skipped"):
        jax.tree.map(np.testing.assert_array_equal, after[name], state[name])
    assert int(after["spikes"]["total"]) == 1 and int(after["step"]) == 1
    assert float(after["window"]["sums"]["loss"]) == 5
    learned = update(after, empty_sums() | {"loss": jnp.float32(1)}, grads)
    assert int(learned["spikes"]["total"]) == 1
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), learned["params"], state["params"])
    assert all(jax.tree.leaves(moved))
