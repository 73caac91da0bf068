"""Which channels guidance mixes, what it costs, and that pairing examples moves nothing between devices."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import pytest

from terdit_jax.diffusion.guidance import guided
from terdit_jax.errors import UserError

NULL = 10
X = jax.random.normal(jax.random.key(0), (3, 2, 2, 4))
T = jnp.array([0, 5, 900], jnp.int32)
Y = jnp.array([2, 7, 9], jnp.int32)


def network(x_t, t, y):
    """A (B, H, W, 2C) output in which every channel depends on x_t, t and y."""
    label = y.astype(jnp.float32)[:, None, None, None]
    time = t.astype(jnp.float32)[:, None, None, None]
    return jnp.concatenate([jnp.sin(x_t * label + time), jnp.cos(x_t + 0.3 * label - time)], -1)


@pytest.mark.parametrize("cfg_channels, mixed", [(3, 3), (0, 4), (1, 1), (4, 4), (9, 4)])
def test_the_first_noise_channels_mix_and_the_rest_is_conditional(cfg_channels, mixed):
    output = guided(network, Y, NULL, 2.5, cfg_channels)(X, T)
    conditional, unconditional = network(X, T, Y), network(X, T, jnp.full_like(Y, NULL))
    expected = unconditional + 2.5 * (conditional - unconditional)
    assert np.all(np.abs(expected - conditional) > 0)  # so that the two comparisons below differ
    np.testing.assert_allclose(output[..., :mixed], expected[..., :mixed], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(output[..., mixed:], conditional[..., mixed:])


def test_output_is_linear_in_the_scale():
    at = lambda scale: np.asarray(guided(network, Y, NULL, scale, 3)(X, T))  # noqa: E731
    np.testing.assert_allclose(at(4.0) - at(2.0), 2 * (at(3.0) - at(2.0)), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(at(0.0)[..., :3], network(X, T, jnp.full_like(Y, NULL))[..., :3])


def test_one_call_on_interleaved_pairs():
    calls = []

    def recording(x_t, t, y):
        calls.append((x_t, t, y))
        return network(x_t, t, y)

    guided(recording, Y, NULL, 1.5, 3)(X, T)
    ((x_t, t, y),) = calls
    np.testing.assert_array_equal(y, [2, NULL, 7, NULL, 9, NULL])
    np.testing.assert_array_equal(t, [0, 0, 5, 5, 900, 900])
    np.testing.assert_array_equal(x_t, np.repeat(X, 2, axis=0))


def test_scale_one_runs_the_conditional_half_only():
    batches = []

    def recording(x_t, t, y):
        batches.append(y.shape[0])
        return network(x_t, t, y)

    output = guided(recording, Y, NULL, 1.0, 3)(X, T)
    np.testing.assert_array_equal(output, network(X, T, Y))
    # A traced scale cannot be looked at: it runs both halves to the same end.
    traced = jax.jit(lambda scale: guided(recording, Y, NULL, scale, 3)(X, T))(1.0)
    np.testing.assert_allclose(traced, output, atol=1e-6)
    assert batches == [3, 6]


def test_mixing_is_float32():
    """Two bfloat16 predictions a rounding step apart, times a large scale."""

    def close(x_t, t, y):
        base = jnp.where(y == NULL, 1.0, 1.0 + 2.0**-7)[:, None, None, None]
        return jnp.broadcast_to(base, (*x_t.shape[:-1], 8)).astype(jnp.bfloat16)

    output = guided(close, Y, NULL, 4.3, 0)(X, T)
    assert output.dtype == jnp.float32
    np.testing.assert_allclose(output[..., :4], 1 + 4.3 / 128, rtol=1e-6)


def test_pairs_stay_on_their_device():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    by_example = NamedSharding(mesh, PartitionSpec("data"))
    x_t = jax.random.normal(jax.random.key(1), (16, 2, 2, 4))
    t, y = jnp.full((16,), 7, jnp.int32), jnp.arange(16, dtype=jnp.int32) % NULL

    def run(x_t, t, y):
        return guided(network, y, NULL, 1.5, 3)(x_t, t)

    compiled = jax.jit(run, in_shardings=by_example, out_shardings=by_example).lower(x_t, t, y).compile()
    assert len(compiled.input_shardings[0][0].device_set) == 8
    moved = re.findall(r"all-\w+|collective-\w+|reduce-scatter", compiled.as_text())
    assert not moved
    arguments = jax.device_put((x_t, t, y), by_example)
    np.testing.assert_allclose(compiled(*arguments), run(x_t, t, y), atol=1e-6)


def test_negative_channels_are_refused():
    with pytest.raises(UserError, match="cfg_channels is -1"):
        guided(network, Y, NULL, 1.5, -1)


@pytest.mark.parametrize(
    ("t_min", "t_max", "guided_at"), [(5, 900, {5}), (0, 900, {0, 5}), (6, None, {900}), (0, None, {0, 5, 900})]
)
def test_guidance_keeps_to_its_interval(t_min, t_max, guided_at):
    """Example by example; what lies outside is the conditional prediction."""
    output = jax.jit(guided(network, Y, NULL, 2.5, 0, t_min, t_max))(X, T)
    always = guided(network, Y, NULL, 2.5, 0)(X, T)
    conditional = network(X, T, Y)
    for i, t in enumerate(T.tolist()):
        expected = always[i] if t in guided_at else conditional[i]
        np.testing.assert_allclose(output[i], expected, rtol=1e-5, atol=1e-5)
    assert np.abs(always - conditional)[..., :4].min() > 0


def test_outside_the_interval_only_the_conditional_half_runs():
    """At run time, as the timestep is known only there."""
    batches = []

    def recording(x_t, t, y):
        jax.debug.callback(lambda y: batches.append(len(y)), y)
        return network(x_t, t, y)

    run = jax.jit(guided(recording, Y, NULL, 2.5, 3, 100, 500))
    for t in (50, 100, 499, 500):
        run(X, jnp.full_like(T, t)).block_until_ready()
    jax.effects_barrier()
    assert batches == [3, 6, 6, 3]


@pytest.mark.parametrize(("t_min", "t_max"), [(-1, 10), (10, 10), (500, 100)])
def test_an_empty_interval_is_refused(t_min, t_max):
    with pytest.raises(UserError, match=f"guidance from timestep {t_min} to {t_max}"):
        guided(network, Y, NULL, 1.5, 3, t_min, t_max)
