"""The update rule against a numpy AdamW, the step at which the rate drops, and the EMA's decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from terdit_jax.config_sections import OptimizerConfig
from terdit_jax.training.optimizer import ema_decay, learning_rate_schedule, make_optimizer


def optimizer_config(**overrides):
    return OptimizerConfig(**overrides)


def updates_of(config, params, gradients):
    """The update of every step; parameters stay where they are, so that weight decay sees them as given."""
    optimizer = make_optimizer(config)
    update, state, out = jax.jit(optimizer.update), optimizer.init(params), []
    for gradient in gradients:
        updates, state = update(gradient, state, params, grad_norm=optax.tree.norm(gradient))
        out.append(updates)
    return out


def numpy_adamw(config, param, gradients):
    m = v = 0.0
    for step, g in enumerate(gradients, start=1):
        m, v = config.b1 * m + (1 - config.b1) * g, config.b2 * v + (1 - config.b2) * g * g
        m_hat, v_hat = m / (1 - config.b1**step), v / (1 - config.b2**step)
        yield -config.learning_rate * (m_hat / (np.sqrt(v_hat) + config.eps) + config.weight_decay * param)


def test_updates_are_adamw():
    config = optimizer_config(b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.1, clip_norm=1e3)
    rng = np.random.default_rng(0)
    param, gradients = rng.normal(size=5), rng.normal(size=(4, 5))
    actual = updates_of(config, jnp.asarray(param, jnp.float32), jnp.asarray(gradients, jnp.float32))
    for ours, expected in zip(actual, numpy_adamw(config, param, gradients), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_defaults_are_the_published_recipe():
    config = OptimizerConfig()
    assert (config.b1, config.b2, config.eps, config.weight_decay) == (0.9, 0.999, 1e-8, 0.0)
    assert (config.learning_rate, config.drop_learning_rate) == (5e-4, 1e-4)
    assert (config.clip_norm, config.ema_decay, config.ema_ramp) == (2.0, 0.9999, False)


@pytest.mark.parametrize(("gradient", "clipped"), [((6.0, 8.0), (1.2, 1.6)), ((0.3, 0.4), (0.3, 0.4))])
def test_gradients_are_clipped_by_their_global_norm(gradient, clipped):
    """Adam is blind to a gradient's scale except through eps: at eps 1 the first update is -rate * g / (|g| + 1)."""
    config = optimizer_config(clip_norm=2.0, eps=1.0, learning_rate=1.0)
    tree = {"a": jnp.float32(gradient[0]), "b": jnp.float32(gradient[1])}
    (updates,) = updates_of(config, tree, [tree])
    for update, g in zip((updates["a"], updates["b"]), clipped, strict=True):
        np.testing.assert_allclose(update, -g / (g + 1), rtol=1e-5)


def test_rate_drops_at_drop_step():
    """Under a constant gradient every update of Adam is the rate itself; update number drop_step is the first low."""
    config = optimizer_config(learning_rate=1e-2, drop_step=3, drop_learning_rate=1e-3)
    updates = updates_of(config, jnp.float32(0), [jnp.float32(1)] * 6)
    np.testing.assert_allclose(updates, [-1e-2] * 3 + [-1e-3] * 3, rtol=1e-4)
    schedule = learning_rate_schedule(config)
    np.testing.assert_allclose([schedule(step) for step in (0, 2, 3, 1000)], [1e-2, 1e-2, 1e-3, 1e-3], rtol=1e-6)


def test_without_a_drop_step_the_rate_is_constant():
    schedule = learning_rate_schedule(optimizer_config(learning_rate=1e-2, drop_step=0, drop_learning_rate=1e-3))
    assert [float(schedule(step)) for step in (0, 1, 10**7)] == [1e-2] * 3


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.1), (1, 2 / 11), (90, 0.91), (980, 981 / 990), (995, 0.991), (10**6, 0.991)]
)
def test_ramped_ema_decay(step, expected):
    decay = jax.jit(lambda step: ema_decay(optimizer_config(ema_decay=0.991, ema_ramp=True), step))(jnp.int32(step))
    assert decay.dtype == jnp.float32
    np.testing.assert_allclose(decay, expected, rtol=1e-6)


def test_constant_ema_decay():
    decay = jax.jit(lambda step: ema_decay(optimizer_config(ema_decay=0.991), step))
    assert decay(jnp.int32(0)) == decay(jnp.int32(500)) == np.float32(0.991)
