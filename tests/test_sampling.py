"""Sampling: the recorded end-to-end loop of the public code, and pictures that neither batch nor mesh changes."""

from golden_models import assert_close, golden_arrays, golden_params, nhwc, tiny_config
import jax
from ml_collections import ConfigDict
import numpy as np
import pytest

from terdit_jax.config import base_config
from terdit_jax.diffusion.guidance import guided
from terdit_jax.diffusion.sampler import sample
from terdit_jax.diffusion.schedule import linear_schedule, respace, space_timesteps
from terdit_jax.errors import UserError
from terdit_jax.inference.runs import check_labels, load_sampler
from terdit_jax.inference.sampling import draw_all, make_draw
from terdit_jax.model.transformer import forward, init_params, make_operands
from terdit_jax.parallel.mesh import make_mesh


def mesh_of(data, fsdp, tensor):
    return make_mesh(ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor}))


def test_golden_guided_sampling_of_a_packed_model():
    config, io = tiny_config(depth=2), golden_arrays("e2e_io")
    operands = make_operands(config, golden_params(config, "e2e"), packed=True)
    schedule = respace(linear_schedule(), space_timesteps(1000, int(io["num_sampling_steps"])))
    noise = nhwc(io["noise"])[:, :2]

    @jax.jit
    def run(x_T, y, noise):
        denoise = guided(
            lambda x, t, y: forward(config, operands, x, t, y), y, config.num_classes, float(io["cfg_scale"]), 3
        )
        return sample(denoise, x_T, lambda i: noise[i], schedule)

    assert_close(run(nhwc(io["z"])[:2], io["y"][:2], noise), nhwc(io["out"])[:2], 1e-4)


@pytest.fixture(scope="module")
def model():
    """A model whose output is not zero, and settings to sample it with."""
    config = tiny_config(depth=2, hidden_size=32, num_heads=8)
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(0))
    params["final_layer"]["linear"]["weight"] += 0.05
    params["blocks"]["adaLN_modulation"]["bias"] += 0.1
    settings = base_config().sample
    settings.update({"num_steps": 4, "cfg_scale": 2.0})
    return config, params, settings


def draw(model, mesh, labels, batch_size, seed=0):
    config, params, settings = model
    with jax.set_mesh(mesh):
        operands = jax.jit(lambda p: make_operands(config, p, packed=True))(params)
    reports = []
    images = draw_all(
        make_draw(config, settings, seed), operands, labels, mesh, batch_size=batch_size, report=reports.append
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


def test_labels_out_of_range_are_refused():
    check_labels(np.array([0, 9]), 10)
    with pytest.raises(UserError, match="label 10 is out of range.*0 to 9"):
        check_labels(np.array([0, 10]), 10)


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        load_sampler(tmp_path)
    with pytest.raises(UserError, match="choose one of ema, raw"):
        load_sampler(tmp_path, "best")
