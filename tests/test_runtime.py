"""Loaded models compute what the public code recorded and what was trained, on one device and on many."""

import dataclasses
from functools import partial
import re

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import terdit_jax
from terdit_jax.config_sections import DiffusionConfig, MeshConfig, SampleConfig
from terdit_jax.diffusion.flow_sampler import flow_sample, flow_times
from terdit_jax.diffusion.guidance import guided
from terdit_jax.diffusion.sampler import sample
from terdit_jax.diffusion.schedule import linear_schedule, respace, space_timesteps
from terdit_jax.errors import UserError
from terdit_jax.inference.runtime import load_model, place_operands
from terdit_jax.interop.exports import export
from terdit_jax.interop.published import model_leaves
from terdit_jax.model.plan import PLAIN
from terdit_jax.model.transformer import forward, make_operands
from terdit_jax.parallel.mesh import make_mesh, single_device_mesh
from terdit_jax.reproducible import make_key
from terdit_jax.ternary.linear import PackedLinear
from tests.deployed import (
    describe,
    golden_weights,
    make_workdir,
    random_params,
    random_weights,
    small_config,
    weights_of,
)
from tests.golden_models import BY_CHANNEL, GOLDEN, assert_close, golden_arrays, nhwc, tiny_config
from tests.torch_files import save_state_dict


@pytest.fixture
def exported(tmp_path):
    """Exports weights to an artifact, or what else they can become, and returns where."""

    def write(weights, kind="packed"):
        export(weights, tmp_path / "model.safetensors", kind if weights.model.ternary else "safetensors")
        return tmp_path / "model.safetensors"

    return write


def inputs(config, batch=8):
    x_t = np.random.default_rng(3).standard_normal((batch, *config.sample_shape), np.float32)
    return x_t, np.arange(batch) * 130, np.arange(batch) % (config.num_classes + 1)


@partial(jax.jit, static_argnums=(0, 1))
def trained_forward(config, plan, params, x_t, t, y) -> Array:
    """The forward pass of training: from master weights, through the codes that have a gradient."""
    return forward(config, make_operands(config, params), x_t, t, y, plan.run_blocks)


@pytest.mark.parametrize(
    ("name", "kind", "dtype", "tolerance"),
    [
        ("terdit_tiny", "packed", "float32", 1e-5),
        ("terdit_tiny", "packed", "bfloat16", 0.03),
        ("terdit_tiny_noqk", "safetensors", "float32", 1e-5),
        ("largedit_tiny", "safetensors", "float32", 1e-5),
    ],
)
def test_golden_outputs_of_the_public_code(exported, name, kind, dtype, tolerance):
    """Planes become packed operands without ever being unpacked on the way."""
    model, io = load_model(exported(golden_weights(name), kind), dtype=dtype), golden_arrays(f"{name}_io")
    out = model(nhwc(io["x"]), io["t"], io["y"])
    assert out.dtype == jnp.float32
    assert_close(out, nhwc(io["out"]), tolerance)


@pytest.mark.parametrize(("project", "channels"), [("DiT", 8), ("SiT", 4)])
@pytest.mark.parametrize("name", ["XL-2-256x256.pt", "XL-2-256.pth", "XL-2.safetensors"])
def test_golden_outputs_of_published_files_of_dit_and_sit(tmp_path, project, channels, name):
    """DiT returns noise and variance, SiT the velocity alone."""
    tensors, path = load_file(GOLDEN / f"{project.lower()}_tiny.safetensors"), tmp_path / f"{project}-{name}"
    save_file(tensors, path) if path.suffix == ".safetensors" else save_state_dict(tensors, path)
    model, io = load_model(path, dtype="float32", num_heads=4), golden_arrays(f"{project.lower()}_tiny_io")
    out = model(nhwc(io["x"]), io["t"], io["y"])
    assert out.shape == (4, 8, 8, channels)
    assert_close(out, nhwc(io["out"]))


def test_what_a_file_does_not_tell_is_an_argument(tmp_path):
    save_file(load_file(GOLDEN / "sit_tiny.safetensors"), tmp_path / "mine.safetensors")
    for given in ({}, {"num_heads": 4}, {"objective": "flow"}):
        with pytest.raises(UserError, match="mine.safetensors: give what it does not tell"):
            load_model(tmp_path / "mine.safetensors", **given)
    model = load_model(tmp_path / "mine.safetensors", num_heads=4, objective="flow")
    assert np.isfinite(model.draw(np.arange(2), num_steps=2)).all()
    with pytest.raises(UserError, match="sample.method='ddpm' samples no flow model"):
        model.draw(np.arange(2), method="ddpm")


def test_golden_guided_sampling(exported):
    io = golden_arrays("e2e_io")
    model = load_model(exported(golden_weights("e2e", tiny_config(depth=2))), dtype="float32")
    schedule = respace(linear_schedule(), space_timesteps(1000, int(io["num_sampling_steps"])))
    noise = nhwc(io["noise"])[:, :2]

    @jax.jit
    def run(x_T, y, noise):
        denoise = guided(model, y, model.config.num_classes, float(io["cfg_scale"]), 3)
        return sample(denoise, x_T, lambda i: noise[i], schedule)

    assert_close(run(nhwc(io["z"])[:2], io["y"][:2], noise), nhwc(io["out"])[:2], 1e-4)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
    ("dtype", "fields"), [("float32", {}), ("bfloat16", {"depth": 1}), ("bfloat16", {"depth": 1, **BY_CHANNEL})]
)
def test_an_exported_model_computes_what_was_trained(exported, dtype, fields):
    """Bit for bit, as codes are exact in every dtype and the scales are applied alike; grouped heads included."""
    config = small_config(num_kv_heads=1, **fields)
    params = random_params(config)
    model = load_model(exported(weights_of(config, params)), dtype=dtype, mode="plain")
    assert model.config.dtype == dtype
    packed = [leaf for leaf in jax.tree.leaves(model.operands, is_leaf=_is_packed) if _is_packed(leaf)]
    assert len(packed) == 5 and all(leaf.packed.dtype == jnp.uint8 for leaf in packed)
    trained = partial(trained_forward, model.config, model.plan, params)
    expected, actual = (np.asarray(run(*inputs(config))) for run in (trained, model))
    assert np.abs(expected).max() > 0
    np.testing.assert_array_equal(actual, expected)


def _is_packed(leaf):
    return isinstance(leaf, PackedLinear)


def test_a_full_precision_model_holds_its_matrices_in_the_activations_dtype(exported):
    weights = random_weights(small_config(ternary=False))
    model = load_model(exported(weights), dtype="bfloat16", mode="plain")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.operands["blocks"]) if leaf.ndim > 3} == {
        jnp.dtype(jnp.bfloat16)
    }
    expected = make_operands(model.config, random_params(weights.model))
    assert jax.tree.structure(model.operands) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, model.operands, expected)


def test_a_mesh_changes_nothing_but_the_place(exported):
    path = exported(random_weights(small_config(hidden_size=64, depth=1, num_heads=4, num_kv_heads=2)))
    one = load_model(path)
    many = load_model(path, mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(one.operands))
    assert all(len(leaf.devices()) == 8 for leaf in jax.tree.leaves(many.operands))
    packed = [leaf for leaf in jax.tree.leaves(many.operands) if leaf.dtype == jnp.uint8]
    shares = {leaf.addressable_shards[0].data.size / leaf.size for leaf in packed}
    assert min(shares) == 1 / 4 and max(shares) <= 1 / 2, "every packed matrix is cut, most of them both ways"
    out = many(*inputs(one.config))
    expected = one(*inputs(one.config))
    assert (out.shape, out.dtype, expected.dtype) == ((8, 8, 8, 8), jnp.float32, jnp.float32)
    assert_close(out, np.asarray(expected))


def test_a_mesh_that_does_not_divide_the_model_is_one_line(exported):
    path = exported(random_weights(small_config(num_heads=2)))
    with pytest.raises(UserError, match="mesh axis tensor=8 does not divide the 2 kv heads") as caught:
        load_model(path, mesh=make_mesh(MeshConfig(data=1, fsdp=1, tensor=8)))
    assert "\n" not in str(caught.value)


def test_a_workdir_and_its_artifact_are_the_same_model(exported, tmp_path):
    from terdit_jax.interop.weights import open_weights

    make_workdir(tmp_path / "run")
    run, artifact = (load_model(path) for path in (tmp_path / "run", exported(open_weights(tmp_path / "run"))))
    assert artifact.description == run.description and artifact.config == run.config
    jax.tree.map(np.testing.assert_array_equal, artifact.operands, run.operands)
    raw, first = load_model(tmp_path / "run", ema=False), load_model(tmp_path / "run", step=1)
    assert (raw.description.ema, first.description.step) == (False, 1)
    tables = [np.asarray(model.operands["y_embedder"]["embedding_table"]) for model in (run, raw, first)]
    assert all(np.any(tables[i] != tables[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_pictures_are_drawn_as_the_description_says(exported):
    """Five steps of guidance 2, divided by the scale that training multiplied by, unless the caller says otherwise."""
    config = small_config(in_channels=3, depth=1)
    path = exported(random_weights(config, latent_scale=0.5))
    model, labels = load_model(path), np.arange(4)
    pictures = model.draw(labels)
    assert (pictures.shape, pictures.dtype) == ((4, 8, 8, 3), np.float32)
    sample_settings = SampleConfig(method="ddim", num_steps=4, cfg_scale=1.0, cfg_channels=3)
    other = dataclasses.replace(model, description=describe(config, sample=sample_settings))
    same = other.draw(labels, num_steps=5, cfg_scale=2.0, method="ddpm", seed=0)
    np.testing.assert_allclose(same, 0.5 * pictures, rtol=1e-6)
    assert np.abs(pictures[0] - pictures[1]).max() > 0


def test_settings_and_labels_that_cannot_be_drawn(exported):
    model = load_model(exported(random_weights(small_config())))
    for options, message in (
        ({"num_steps": 0}, "0 timesteps"),
        ({"num_steps": 1001}, "1001 timesteps"),
        ({"method": "euler"}, "sample.method='euler' samples no ddpm model"),
    ):
        with pytest.raises(UserError, match=message):
            model.draw(np.arange(2), **options)


@pytest.mark.parametrize("mode", ["plain", "exact"])
def test_a_flow_model_predicts_velocities_and_is_drawn_from_by_its_own_methods(exported, mode):
    """Also by the pass for inference, which works out the modulations of all its times before the loop."""
    settings = SampleConfig(method="heun", num_steps=3, cfg_scale=2.0)
    weights = random_weights(
        small_config(depth=1, in_channels=3), sample=settings, diffusion=DiffusionConfig("flow", path="gvp", shift=2.0)
    )
    model, params = load_model(exported(weights), mode=mode, dtype="float32"), random_params(weights.model)
    network = partial(trained_forward, model.config, PLAIN, params)
    x_t, _, y = inputs(model.config, batch=2)
    t = np.array([0.25, 0.75], np.float32)
    v = model(x_t, t, y)
    assert v.shape == x_t.shape and v.dtype == jnp.float32
    assert_close(v, np.asarray(network(x_t, t, y))[..., :3])
    assert np.abs(v - model(x_t, 1 - t, y)).max() > 1e-3

    keys = jax.vmap(jax.random.fold_in, (None, 0))(make_key(5), jnp.arange(2))
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), model.config.sample_shape))(keys)
    denoise, times = guided(network, jnp.array([1, 2]), 10, 2.0, 3), flow_times("heun", 3, 2.0)
    expected = jax.jit(lambda noise: flow_sample(denoise, noise, jnp.zeros_like, "gvp", times, "heun"))(noise)
    assert_close(model.draw([1, 2], seed=5), np.asarray(expected), 1e-4)
    with pytest.raises(UserError, match="sample.method='ddim' samples no flow model: give euler, heun, sde"):
        model.draw([1, 2], method="ddim")


def test_labels_that_are_no_classes_are_refused(exported):
    model = load_model(exported(random_weights(small_config())))
    x_t, t, _ = inputs(model.config, batch=2)
    for labels in ([3, 11], [-1, 0], [0, 1.5], [1, True], np.array([0, np.nan]), [1.0, 2.0], ["0", "1"], [], [[0, 1]]):
        for call in (model.draw, partial(model, x_t, t)):
            with pytest.raises(UserError, match="^label"):
                call(labels)
    with pytest.raises(UserError, match="label 10 is out of range: the model has classes 0 to 9"):
        model.draw([10])  # the null class, which only a call takes


def test_labels_that_are_classes_of_any_integer_type(exported):
    model = load_model(exported(random_weights(small_config())))
    x_t, t, _ = inputs(model.config, batch=2)
    expected = np.asarray(model(x_t, t, jnp.array([9, 10])))
    for labels in ([9, 10], np.array([9, 10], np.uint8), jnp.array([9, 10]), range(9, 11)):
        np.testing.assert_array_equal(np.asarray(model(x_t, t, labels)), expected)
    jitted = jax.jit(lambda y: model(x_t, t, y))
    np.testing.assert_allclose(jitted(jnp.array([9, 10])), expected, atol=1e-4)
    with pytest.raises(UserError, match="2 images with 3 labels"):
        model(x_t, t, np.array([1, 2, 3]))
    with pytest.raises(UserError, match="labels are float32"):
        jitted(jnp.ones(2))


def test_a_dtype_that_nothing_computes_in_is_refused(exported):
    path = exported(random_weights(small_config()))
    for dtype in ("float16", jnp.int8):
        with pytest.raises(UserError, match="dtype .*: choose one of bfloat16, float32"):
            load_model(path, dtype=dtype)


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds neither a run's checkpoints/ nor consolidated_ema_ternary"):
        load_model(tmp_path)


def test_leaves_are_packed_as_they_come():
    """Master weights never stand in memory all at once."""
    weights, alive = random_weights(small_config()), []
    ternary = {leaf.path for leaf in model_leaves(weights.model) if leaf.ternary}

    def leaves():
        import gc
        import weakref

        for path, leaf in weights.leaves():
            leaf = leaf.copy()
            if path in ternary:
                gc.collect()
                assert not any(reference() is not None for reference in alive), f"masters are kept until {path}"
                alive.append(weakref.ref(leaf))
            yield path, leaf
            del leaf

    place_operands(weights.model, leaves(), single_device_mesh())
    assert len(alive) == 8


def test_the_package_offers_it():
    assert terdit_jax.load_model is load_model
    with pytest.raises(AttributeError, match="no attribute 'load_models'"):
        terdit_jax.load_models  # noqa: B018


def test_a_model_prints_in_one_line(exported):
    text = repr(load_model(exported(golden_weights("e2e", tiny_config(depth=2))), dtype="float32"))
    assert text.startswith("Denoiser(") and "M parameters, float32, samples of (" in text and len(text) < 150


def test_the_package_has_a_version_and_names_what_it_offers():
    assert re.fullmatch(r"\d+\.\d+\.\d+", terdit_jax.__version__)
    assert {"load_model", "__version__"} <= set(dir(terdit_jax))
