"""The samplers of the PyTorch module against the public code's loops and ours, and their settings."""

from functools import partial
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch")

from terdit_jax.config_sections import DiffusionConfig, SampleConfig  # noqa: E402
from terdit_jax.diffusion.flow_sampler import flow_times  # noqa: E402
from terdit_jax.diffusion.guidance import guided  # noqa: E402
from terdit_jax.diffusion.objective import Flow  # noqa: E402
from terdit_jax.diffusion.schedule import space_timesteps  # noqa: E402
from terdit_jax.interop import pytorch  # noqa: E402
from terdit_jax.interop.pytorch import sample, to_images  # noqa: E402
from terdit_jax.model.transformer import forward, make_operands  # noqa: E402
from tests.golden_models import (  # noqa: E402
    GOLDEN,
    assert_close,
    golden_arrays,
    golden_config,
    golden_params,
    nhwc,
    random_params,
    tiny_config,
)
from tests.torch_models import as_tensors, build, described, fields_of, golden_model, published_arrays  # noqa: E402

# Eleven points of the public code's grid are ten steps; those of the SDE end with one without noise.
FLOW_LOOPS = [("euler", 10, "ode_euler_11"), ("heun", 10, "ode_heun2_11"), ("sde", 12, "sde_euler_12")]


@pytest.fixture(scope="module")
def tiny():
    return golden_model("terdit_tiny")


@pytest.mark.parametrize(("method", "timesteps"), [("ddpm", None), ("ddim", list(range(0, 1000, 100)))])
def test_loop_is_the_public_codes(method, timesteps):
    golden = as_tensors(golden_arrays(f"sample_{method}10"))

    def denoise(x, t):
        eps = torch.einsum("oc,bchw->bohw", golden["eps_matrix"], x)
        return torch.cat([eps, torch.tanh(torch.einsum("oc,bchw->bohw", golden["var_matrix"], x))], 1)

    draw = iter(golden["noise"]).__next__
    x_0 = pytorch._reverse(denoise, golden["x_T"], draw, timesteps or pytorch._spaced(10), method)
    np.testing.assert_allclose(x_0, golden["out"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("path", ["linear", "gvp"])
@pytest.mark.parametrize(("method", "count", "name"), FLOW_LOOPS)
def test_flow_loops_are_the_public_codes(path, method, count, name):
    golden = as_tensors(golden_arrays("flow_samplers"))
    noise = iter(golden[f"{path}_sde_euler_12_noise"])

    def denoise(x, t):
        v = torch.einsum("oc,bchw->bohw", golden["A"], x) + 0.3 * math.sin(3 * t)
        return torch.cat([v, 100 * v], 1)

    times = pytorch._flow_times(method, count, 1.0)
    x_0 = pytorch._follow(denoise, golden["z"], noise.__next__, path, times, method)
    assert_close(x_0, golden[f"{path}_{name}"].numpy())
    assert len(list(noise)) == (0 if method == "sde" else 11)


@pytest.mark.parametrize("method", pytorch._METHODS["flow"])
def test_flows_are_sampled_as_in_jax(method):
    """A whole guided run of a model from the same noise, with a path and a shift that are not the defaults."""
    config = golden_config("sit_tiny")
    fields, arrays = golden_model("sit_tiny")
    model = build(fields, arrays)
    diffusion = {"objective": "flow", "path": "gvp", "shift": 2.5}
    interval = {"cfg_t_min": 0, "cfg_t_max": 800}
    settings = {"method": method, "num_steps": 4, "cfg_scale": 2.0, **interval}
    model.description = {"diffusion": diffusion, "sample": settings}
    labels = [3, 1]
    images = sample(model, labels)
    assert images.shape == (2, 4, 8, 8) and images.dtype == torch.float32
    generators = [torch.Generator().manual_seed(pytorch._seed(0, i)) for i in range(2)]
    drawn = torch.stack([torch.randn(4, 4, 8, 8, generator=generator) for generator in generators], 1)
    drawn = jnp.asarray(nhwc(drawn.numpy()))  # (4, 2, H, W, C): the start, then a step's noise each
    operands = make_operands(config, golden_params(config, "sit_tiny"))
    flow, settings = Flow(DiffusionConfig(**diffusion)), SampleConfig(method=method, num_steps=4)
    network, y = partial(forward, config, operands), jnp.array(labels)

    def in_jax(**interval):
        denoise = guided(network, y, config.num_classes, 2.0, 3, timestep=flow.timestep, **interval)
        return jax.jit(lambda drawn: flow.sample(denoise, drawn[0], lambda i: drawn[i + 1], settings))(drawn)

    expected = np.asarray(in_jax(t_max=800))
    assert_close(nhwc(images.numpy()), expected, 1e-4)
    assert np.abs(expected - in_jax()).max() > 0.01, "the interval leaves steps without guidance"


@pytest.mark.parametrize("method", pytorch._METHODS["flow"])
def test_times_of_a_flow_are_those_of_jax(method):
    for count in (1, 2, 250):
        for shift in (1.0, 0.3, 4.0):
            expected = flow_times(method, count, shift)
            np.testing.assert_allclose(pytorch._flow_times(method, count, shift), expected, rtol=0, atol=1e-12)


def test_timesteps_are_those_of_jax():
    for count in (1, 2, 5, 50, 250, 999, 1000):
        assert tuple(pytorch._spaced(count)) == space_timesteps(1000, count)


def test_golden_guided_sampling_end_to_end():
    io = as_tensors(golden_arrays("e2e_io"))
    model = build(fields_of(tiny_config(depth=2)), load_file(GOLDEN / "e2e.safetensors"))
    denoise = pytorch._guided(model, io["y"][:2], 10, float(io["cfg_scale"]), 3)
    x_0 = pytorch._reverse(denoise, io["z"][:2], iter(io["noise"][:, :2]).__next__, pytorch._spaced(5), "ddpm")
    assert_close(x_0, io["out"][:2].numpy(), 1e-4)


def test_samples_depend_on_seed_and_number_alone(tiny):
    model = build(*tiny)
    settings = {"num_steps": 3, "cfg_scale": 2.0}
    images = sample(model, [3, 1, 4], **settings)
    assert images.shape == (3, 4, 8, 8) and images.dtype == torch.float32 and not images.requires_grad
    assert_close(sample(model, np.array([1, 4]), first=1, **settings), images[1:].numpy(), 1e-4)
    assert_close(sample(model, torch.tensor([3]), **settings), images[:1].numpy(), 1e-4)
    for other in ({"seed": 1}, {"first": 1}, {"cfg_channels": 0}, {"method": "ddim"}):
        assert not torch.allclose(sample(model, [3], **settings | other), images[:1], atol=1e-2)
    noise = {pytorch._seed(seed, i) for seed in range(4) for i in range(1000)}
    assert len(noise) == 4000 and max(noise) < 2**32


def test_settings_come_from_the_description(tiny):
    model, plain = build(*tiny), build(*tiny)
    model.description = described(tiny[0], method="ddim", num_steps=2, cfg_scale=1.0, num_images=16)
    expected = sample(plain, [5], method="ddim", num_steps=2, cfg_scale=1.0)
    assert torch.equal(sample(model, [5]), expected)
    assert not torch.equal(sample(model, [5], num_steps=3), expected)


def test_the_last_channels_keep_the_labels_own_noise(tiny):
    model, y = build(*tiny), torch.tensor([2])
    x = torch.from_numpy(golden_arrays("terdit_tiny_io")["x"][:1])
    plain, guided = pytorch._guided(model, y, 10, 1.0, 3)(x, 500), pytorch._guided(model, y, 10, 4.0, 3)(x, 500)
    assert_close(guided[:, 3:], plain[:, 3:].numpy())
    assert not torch.allclose(guided[:, :3], plain[:, :3], atol=1e-3)


def test_images_are_bytes_channels_last():
    x = torch.tensor([-3.0, -2.0, 0.0, 2.0]).reshape(1, 1, 2, 2)
    images = to_images(x, 2.0)
    assert images.dtype == torch.uint8 and images.tolist() == [[[[0], [0]], [[128], [255]]]]
    with pytest.raises(ValueError, match="decode latents"):
        to_images(torch.zeros(1, 4, 2, 2), 1.0)
    with pytest.raises(ValueError, match="1 of 2 images hold values that are not finite"):
        to_images(torch.stack([x[0], x[0] / 0]), 1.0)


@pytest.mark.parametrize(
    ("name", "diffusion", "settings", "match"),
    [
        ("sit_tiny", {"objective": "flow"}, {"method": "ddim"}, "'ddim': a flow model takes one of sde, euler, heun"),
        ("dit_tiny", {"objective": "ddpm"}, {"method": "sde"}, "'sde': a ddpm model takes one of ddpm, ddim"),
        ("sit_tiny", {"objective": "edm"}, {}, "objective is 'edm'"),
        ("sit_tiny", {"objective": "flow", "path": "vp"}, {}, "path 'vp'"),
        ("sit_tiny", {"objective": "flow", "shift": 0}, {}, "shift is 0"),
        ("sit_tiny", {"objective": "flow", "shift": "2"}, {}, "shift is '2'"),
    ],
)
def test_objectives_and_methods_that_do_not_go_together_are_named(name, diffusion, settings, match):
    model = build(*golden_model(name))
    model.description = {"diffusion": diffusion}
    with pytest.raises(ValueError, match=match) as caught:
        sample(model, [0], **settings)
    assert "\n" not in str(caught.value)


def test_ddpm_needs_its_variance():
    config = tiny_config(depth=1, learn_sigma=False)
    model = build(fields_of(config), published_arrays(config, random_params(config)))
    with pytest.raises(ValueError, match="no learned variance"):
        sample(model, [0])
    model.description = {"diffusion": {"objective": "flow"}}
    assert sample(model, [0], num_steps=2).shape == (1, 4, 8, 8)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"labels": [10]}, r"classes in 0..9, got 10..10"),
        ({"labels": []}, "got none"),
        ({"labels": [1.5]}, "whole numbers, got 1.5"),
        ({"labels": [1, True]}, "whole numbers, got True"),
        ({"labels": torch.tensor([1.0])}, r"whole numbers, got tensor.1"),
        ({"labels": torch.tensor([True])}, r"whole numbers, got tensor.True"),
        ({"labels": ["1"]}, "whole numbers, got '1'"),
        ({"method": "euler"}, "method is 'euler': a ddpm model takes one of ddpm, ddim"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"cfg_scale": float("nan")}, "cfg_scale is nan"),
        ({"cfg_scale": 1e38}, "cfg_scale is 1e.38: give a number from 0 to 1000"),
        ({"cfg_scale": -3}, "cfg_scale is -3"),
        ({"cfg_channels": -1}, "cfg_channels is -1"),
    ],
)
def test_settings_that_cannot_be_are_named(tiny, settings, match):
    with pytest.raises(ValueError, match=match):
        sample(build(*tiny), **{"labels": [0]} | settings)
