"""Sampling: pictures that neither batch nor mesh changes."""

import dataclasses

import jax
import numpy as np
import pytest

from terdit_jax.choices import FLOW_METHODS
from terdit_jax.config_sections import DiffusionConfig, MeshConfig, SampleConfig
from terdit_jax.diffusion.objective import Ddpm, make_objective
from terdit_jax.errors import UserError
from terdit_jax.inference.sampling import check_settings, draw_all, make_draw
from terdit_jax.model.transformer import init_params, packed_operands
from terdit_jax.parallel.mesh import make_mesh, single_device_mesh
from tests.golden_models import assert_close, random_params, tiny_config


def mesh_of(data, fsdp, tensor):
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))


@pytest.fixture(scope="module")
def model():
    """A model whose output is not zero, and settings to sample it with."""
    config = tiny_config(depth=2, hidden_size=32, num_heads=8)
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(0))
    params["final_layer"]["linear"]["weight"] += 0.05
    params["blocks"]["adaLN_modulation"]["bias"] += 0.1
    return config, params, SampleConfig(num_steps=4, cfg_scale=2.0)


def draw(model, mesh, labels, batch_size, seed=0):
    config, params, settings = model
    with jax.set_mesh(mesh):
        operands = jax.jit(lambda p: packed_operands(config, p))(params)
    reports = []
    images = draw_all(
        make_draw(config, Ddpm(), settings), operands, labels, mesh, seed, batch_size=batch_size, report=reports.append
    )
    assert reports[-1] == len(labels) and images.shape == (len(labels), *config.sample_shape)
    return images


def test_batch_and_mesh_change_no_picture(model):
    labels = np.arange(13) % 10
    expected = draw(model, mesh_of(8, 1, 1), labels, batch_size=16)
    assert np.abs(expected[0] - expected[10]).max() > 0.1  # the same label, another picture
    assert_close(draw(model, mesh_of(8, 1, 1), labels, batch_size=8), expected, 1e-4)
    assert_close(draw(model, mesh_of(2, 2, 2), labels, batch_size=8), expected, 1e-4)
    assert np.abs(draw(model, mesh_of(8, 1, 1), labels, batch_size=16, seed=1) - expected).max() > 0.1


def test_part_of_a_set_is_that_part_of_it():
    """Stochastic solver, guidance in an interval: picture i starts from, and is disturbed by, noise of its index."""
    config = tiny_config(depth=1, hidden_size=32, num_heads=2, ffn_multiple_of=32)
    settings = SampleConfig(method="dpmpp_2m_sde", num_steps=4, cfg_t_min=500)
    operands, mesh, labels = (
        packed_operands(config, random_params(config)),
        single_device_mesh(),
        np.arange(8),
    )
    draw_in_interval = make_draw(config, Ddpm(), settings)
    common = {"mesh": mesh, "seed": 0, "batch_size": 4, "report": lambda done: None}
    whole = draw_all(draw_in_interval, operands, labels, **common)
    assert_close(draw_all(draw_in_interval, operands, labels[5:], first=5, **common), whole[5:], 1e-4)
    always = draw_all(make_draw(config, Ddpm(), dataclasses.replace(settings, cfg_t_min=0)), operands, labels, **common)
    assert np.abs(always - whole).max() > 1e-3 * np.abs(whole).max()


@pytest.mark.parametrize("method", FLOW_METHODS)
def test_batch_and_mesh_change_no_picture_of_a_flow_model(model, method):
    config, params, settings = model
    objective = make_objective(DiffusionConfig("flow", shift=2.0), True)
    settings = dataclasses.replace(settings, method=method, cfg_t_max=700)
    labels, drawn = np.arange(13) % 10, []
    for mesh, batch_size in ((single_device_mesh(), 13), (mesh_of(2, 2, 2), 8)):
        with jax.set_mesh(mesh):
            operands = jax.jit(lambda p: packed_operands(config, p))(params)
        draw = make_draw(config, objective, settings)
        drawn.append(draw_all(draw, operands, labels, mesh, 0, batch_size=batch_size, report=lambda done: None))
    assert drawn[0].shape == (13, *config.sample_shape) and np.abs(drawn[0][0] - drawn[0][10]).max() > 0.1
    assert_close(drawn[1], drawn[0], 1e-4)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("method", "euler", "sample.method='euler' samples no ddpm model: give ddpm, ddim, dpmpp_2m"),
        ("spacing", "karras", "sample.spacing='karras' samples no ddpm model: give auto, uniform"),
        ("cfg_t_min", 1000, "guidance from timestep 1000 to 1000"),
        ("cfg_t_max", 1001, "guidance from timestep 0 to 1001"),
        ("num_steps", 1001, "1001 timesteps: give 1 to 1000"),
    ],
)
def test_settings_that_no_sampler_can_follow(field, value, message):
    with pytest.raises(UserError, match=message):
        check_settings(SampleConfig(**{field: value}), Ddpm())
