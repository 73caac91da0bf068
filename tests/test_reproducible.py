"""The same numbers from a seed whatever JAX's settings say: 64-bit types, other generators, stricter promotion."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.choices import METHODS
from terdit_jax.config import RunConfig
from terdit_jax.diffusion.objective import Ddpm
from terdit_jax.evaluation.classifier import train_classifier
from terdit_jax.fast.inference_pass import bind_schedule
from terdit_jax.inference.image_set import make_labels
from terdit_jax.inference.runtime import load_model
from terdit_jax.inference.sampling import make_draw
from terdit_jax.interop.exports import export
from terdit_jax.model.plan import PLAIN
from terdit_jax.model.transformer import init_params
from terdit_jax.parallel.mesh import on_mesh, single_device_mesh
from terdit_jax.reproducible import key_bits, make_key, pin_settings, pinned
from terdit_jax.training.actions import make_heldout_loss
from terdit_jax.training.examples import example_keys, make_examples
from terdit_jax.training.optimizer import make_optimizer
from terdit_jax.training.state import make_state
from terdit_jax.training.step import make_train_step
from tests.deployed import random_weights, small_config
from tests.runs import finish, prepare_digits, saved_run, start, train_arguments

# A setting that changes draws or dtypes, as a context.
OTHERS = {
    "64 bits": lambda: jax.enable_x64(True),
    "another generator": lambda: jax.default_prng_impl("rbg"),
    "another order of bits": lambda: jax.threefry_partitionable(False),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "strict ranks": lambda: jax.numpy_rank_promotion("raise"),
}


def records(model, count):
    random = np.random.default_rng(0)
    mean, std = random.standard_normal((2, count, *model.sample_shape), np.float32).astype(np.float16)
    return {"mean": mean, "std": np.abs(std), "label": random.integers(0, 10, count, np.int32)}


def as_bytes(tree):
    """Dtype and bytes of every leaf."""
    return [(np.asarray(leaf).dtype, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def test_training_programs():
    """State and dtypes from a fresh start, and what a step and a held-out loss compute, to the last operation."""
    config = RunConfig().with_fields({"train.batch_size": 4, "optimizer.ema_ramp": True, "optimizer.drop_step": 1})
    model, mesh, objective = small_config(depth=1), single_device_mesh(), Ddpm()
    optimizer, batch = make_optimizer(config.optimizer), records(model, 4)

    def programs():
        state = on_mesh(mesh, make_state)(model, optimizer, mesh, config.seed)
        step = make_train_step(config, model, objective, optimizer, mesh, 0.18, PLAIN).__wrapped__
        heldout = make_heldout_loss(config, model, objective, mesh, 0.18, PLAIN).__wrapped__
        traced = [on_mesh(mesh, step.trace)(state, batch), on_mesh(mesh, heldout.trace)(state["params"], batch, 1)]
        return as_bytes(state), [str(program.jaxpr) for program in traced]

    expected = programs()
    assert {dtype.itemsize for dtype, _ in expected[0]} <= {1, 4}
    with jax.enable_x64(True):
        assert programs() == expected


def test_draws_have_dtypes_of_their_own():
    """Even where nothing is pinned around them."""
    model = small_config()

    def draw_all_kinds():
        keys = example_keys(3, 7, jnp.arange(6))
        options = {"latent_scale": 0.5, "num_classes": 10, "class_dropout_prob": 0.5}
        examples = make_examples(records(model, 6), keys, Ddpm(), **options)
        return examples, init_params(model, make_key(1)), make_labels(range(7), 20, "random", 5)

    expected = as_bytes(draw_all_kinds())
    with jax.enable_x64(True):
        assert as_bytes(draw_all_kinds()) == expected
    with jax.default_prng_impl("rbg"):
        assert as_bytes(draw_all_kinds()) == expected


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "tiny.safetensors"
    export(random_weights(small_config(depth=1)), path, "packed")
    return path


def test_images_and_outputs(artifact):
    def run():
        model = load_model(artifact)
        x_t = jnp.ones((2, *model.config.sample_shape))  # float64 where a caller has 64 bits
        images = model.draw(np.arange(2), num_steps=2, cfg_t_min=500)
        return as_bytes([model.operands, images, model(x_t, jnp.array([3, 9]), jnp.zeros(2, int))])

    expected = run()
    for setting in ("64 bits", "another generator"):
        with OTHERS[setting]():
            assert run() == expected, setting


@pytest.mark.parametrize(("method", "mode"), [*((method, "auto") for method in METHODS), ("ddim", "fast")])
def test_sampling_programs(artifact, method, mode):
    def program():
        model = load_model(artifact, mode=mode)
        settings = dataclasses.replace(model.description.sample, method=method, cfg_t_max=500)
        bind = partial(bind_schedule, model.config, model.numerics) if model.numerics else None
        draw = make_draw(model.config, Ddpm(), settings, bind)
        with pinned():
            return str(
                jax.make_jaxpr(draw)(model.operands, np.zeros(2, np.int32), np.arange(2, dtype=np.int32), key_bits(0))
            )

    expected = program()
    for name, setting in OTHERS.items():
        with setting():
            assert program() == expected, name


def test_classifier_that_judges_samples():
    images = np.random.default_rng(0).standard_normal((64, 8, 8, 1), np.float32)
    train = lambda: train_classifier(images, np.arange(64) % 4, 4, seed=1, num_steps=3).logits(images)  # noqa: E731
    expected = train()
    with jax.enable_x64(True):
        assert as_bytes(train()) == as_bytes(expected)


def test_settings_of_a_process_are_pinned_loudly(capsys):
    for name, value in (("jax_default_prng_impl", "rbg"), ("jax_enable_x64", True), ("jax_random_seed_offset", 5)):
        jax.config.update(name, value)
    pin_settings()
    assert jax.random.normal(jax.random.key(0), ()) == jax.random.normal(make_key(0), (), jnp.float32)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[0].startswith("JAX_ENABLE_X64=True has no effect"), lines
    pin_settings()
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_run_that_changes_between_both_and_its_samples(tmp_path):
    data, cache = prepare_digits(tmp_path / "digits"), tmp_path / "cache"
    other = {"JAX_ENABLE_X64": "1", "JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_RANDOM_SEED_OFFSET": "3"}

    def run(module, *arguments, environment=None):
        return finish(start(module, *arguments, cache=cache, environment=environment))

    run("main", *train_arguments(data, tmp_path / "plain", train__num_steps=12))
    out, err = run("main", *train_arguments(data, tmp_path / "mixed", train__num_steps=6), environment=other)
    assert err.count("has no effect") == 3, err
    run("main", *train_arguments(data, tmp_path / "mixed", train__num_steps=12))
    run("main", *train_arguments(data, tmp_path / "other", train__num_steps=12), environment=other)
    expected, _ = saved_run(tmp_path / "plain")
    for name in ("mixed", "other"):
        assert as_bytes(saved_run(tmp_path / name)[0]) == as_bytes(expected), name
    drawn = []
    for name, environment in (("plain", None), ("other", other)):
        output = tmp_path / f"{name}.npz"
        flags = (f"--model={tmp_path / name}", "--num_samples=6", "--label_order=random", f"--output={output}")
        run("sample", *flags, environment=environment)
        with np.load(output) as arrays:
            drawn.append(as_bytes(dict(arrays)))
    assert drawn[0] == drawn[1]
