"""The two objectives: the examples they draw, what they take of a configuration, and how their models are sampled."""

from functools import partial
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.choices import FLOW_METHODS, METHODS
from terdit_jax.config_sections import DiffusionConfig, SampleConfig
from terdit_jax.diffusion.guidance import guided
from terdit_jax.diffusion.objective import Ddpm, make_objective
from terdit_jax.errors import UserError
from terdit_jax.inference.sampling import check_settings
from terdit_jax.training.examples import example_keys, make_examples

MANY = 20_000


def flow(**fields):
    return make_objective(DiffusionConfig("flow", **fields), True)


def drawn(objective, count=MANY):
    """Examples of one pixel, of mean 0 and deviation 1."""
    batch = {
        "mean": np.zeros((count, 1, 1, 1), np.float16),
        "std": np.ones((count, 1, 1, 1), np.float16),
        "label": np.arange(count, dtype=np.int32) % 10,
    }

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def draw(batch, indices):
        keys = example_keys(0, 0, indices)
        return make_examples(batch, keys, objective, latent_scale=1.0, num_classes=10, class_dropout_prob=0.1)

    return jax.tree.map(np.asarray, draw(batch, np.arange(count, dtype=np.int32)))


def assert_distributed(t, distribution):
    """Kolmogorov-Smirnov: 20,000 draws leave their distribution by 1.95 / sqrt(n) once in a thousand times."""
    t = np.sort(t)
    assert np.abs(distribution(t) - (np.arange(len(t)) + 0.5) / len(t)).max() < 1.95 / math.sqrt(len(t))


def normal_distribution(x):
    return 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def test_the_objective_changes_t_and_nothing_else_that_is_drawn():
    ours, theirs = drawn(flow(), 64), drawn(Ddpm(), 64)
    for name in ("x_0", "noise", "y"):
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert (ours["t"].dtype, theirs["t"].dtype) == (np.float32, np.int32)


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_examples_lie_on_the_path(path):
    examples = {name: values.astype(np.float64).ravel() for name, values in drawn(flow(path=path), 64).items()}
    angle = np.pi / 2 * examples["t"]
    alpha, sigma = (examples["t"], 1 - examples["t"]) if path == "linear" else (np.sin(angle), np.cos(angle))
    np.testing.assert_allclose(examples["x_t"], alpha * examples["x_0"] + sigma * examples["noise"], atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_uniform_times(shift):
    t = drawn(flow(shift=shift))["t"].astype(float)
    assert 0 <= t.min() and t.max() <= 1
    # The draw is uniform before it is shifted: t = q / (q + shift (1 - q)).
    assert_distributed(t, lambda t: shift * t / (1 + (shift - 1) * t))
    assert (np.mean(t) < 0.4) == (shift == 3.0), "a shift above 1 gives more noise"


def test_logit_normal_times():
    t = drawn(flow(timesteps="logit_normal", logit_mean=0.5, logit_std=0.8))["t"].astype(float)
    assert_distributed(t, lambda t: normal_distribution((np.log(t / (1 - t)) - 0.5) / 0.8))


def test_parts_of_the_range_of_t():
    t = jnp.array([0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75, 1.0])
    assert flow().part(t, 4).tolist() == [0, 0, 1, 2, 2, 3, 3]
    assert Ddpm().part(jnp.array([0, 249, 250, 999]), 4).tolist() == [0, 0, 1, 3]


def test_times_on_the_scale_of_guidance():
    """Multiples of 1/1000 are whole timesteps exactly, however float32 rounds them."""
    whole = np.arange(1001)
    np.testing.assert_array_equal(flow().timestep(jnp.asarray(1 - whole / 1000, jnp.float32)), whole)
    np.testing.assert_array_equal(Ddpm().timestep(whole), whole)


@pytest.mark.parametrize("outputs", [1, 2])
def test_guidance_mixes_the_first_channels_of_a_velocity(outputs):
    """Networks have C or 2C channels; guidance acts within its interval of noise levels, and there alone."""
    calls = []

    def network(x, t, y):
        calls.append(len(y))
        v = jnp.broadcast_to(jnp.where(y == 10, 1.0, 3.0)[:, None, None, None], x.shape)
        return jnp.concatenate([v] * outputs, -1)

    x, y = jnp.zeros((2, 2, 2, 4)), jnp.array([3, 4])
    inside, outside = jnp.full(2, 0.5), jnp.full(2, 0.9)
    denoise = guided(network, y, 10, 2.0, 3, 200, None, flow().timestep)  # noise of 200 and more: t up to 0.8
    mixed = denoise(x, inside)
    assert mixed.shape == (2, 2, 2, 4 * outputs)
    np.testing.assert_array_equal(mixed[..., :3], 1 + 2.0 * (3 - 1))
    np.testing.assert_array_equal(mixed[..., 3:], 3)
    np.testing.assert_array_equal(denoise(x, outside), 3)
    np.testing.assert_array_equal(denoise(x, jnp.full(2, 0.8))[..., :3], 5)


@pytest.mark.parametrize(
    "fields", [{"path": "gvp"}, {"timesteps": "logit_normal"}, {"logit_mean": 1.0}, {"logit_std": 2.0}, {"shift": 3.0}]
)
def test_what_flow_alone_reads_is_refused_for_ddpm(fields):
    ((name, value),) = fields.items()
    flow(**fields)
    with pytest.raises(UserError) as caught:
        make_objective(DiffusionConfig(**fields), True)
    assert f"diffusion.{name}={value!r}" in str(caught.value) and "\n" not in str(caught.value)


def test_ddpm_needs_a_network_with_a_variance():
    assert make_objective(DiffusionConfig("flow"), learn_sigma=False).name == "flow"
    with pytest.raises(UserError, match="^model.learn_sigma=False: diffusion.objective='ddpm' learns the variance"):
        make_objective(DiffusionConfig(), learn_sigma=False)


def test_an_objective_takes_its_own_samplers():
    for objective, own, others in ((Ddpm(), METHODS, FLOW_METHODS), (flow(), FLOW_METHODS, METHODS)):
        for method in own:
            check_settings(SampleConfig(method=method), objective)
        for method in {*others} - {*own}:
            with pytest.raises(UserError) as caught:
                check_settings(SampleConfig(method=method), objective)
            message = str(caught.value)
            assert f"sample.method={method!r} samples no {objective.name} model: give {own[0]}" in message
    check_settings(SampleConfig(method="heun", spacing="uniform"), flow())
    with pytest.raises(UserError, match="sample.spacing='power' samples no flow model: give auto, uniform"):
        check_settings(SampleConfig(method="heun", spacing="power"), flow())


@pytest.mark.parametrize(("method", "calls"), [("euler", 4), ("sde", 4), ("heun", 5)])
def test_a_network_is_bound_to_all_times_that_it_is_asked_for(method, calls):
    objective, seen = flow(shift=2.0), set()

    def denoise(x, t):
        jax.debug.callback(lambda t: seen.add(t.item()), t[0])
        return x

    settings = SampleConfig(method=method, num_steps=4)
    x = jnp.ones((2, 2, 2, 1))
    objective.sample(denoise, x, lambda i: x, settings)
    jax.effects_barrier()
    times = objective.times(settings)
    assert times.dtype == np.float32 and len(times) == calls and set(times.tolist()) == seen
