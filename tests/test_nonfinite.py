"""One number that is not finite is seen: by the guard of training, in checkpoints and files, before it is an image."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.checkpoints.writer import CheckpointWriter
from terdit_jax.config import RunConfig
from terdit_jax.config_sections import ModelConfig, OptimizerConfig, SampleConfig
from terdit_jax.data.synthetic import make_synthetic
from terdit_jax.errors import UserError
from terdit_jax.inference import image_set
from terdit_jax.inference.decoding import to_images
from terdit_jax.inference.image_set import draw_set, make_plan
from terdit_jax.inference.images import to_uint8
from terdit_jax.inference.runtime import load_model
from terdit_jax.inference.sampling import check_settings
from terdit_jax.inference.shards import Shards
from terdit_jax.interop.exports import export
from terdit_jax.interop.start import open_source
from terdit_jax.interop.weights import open_weights
from terdit_jax.model.plan import PLAIN
from terdit_jax.model.transformer import make_operands
from terdit_jax.training.actions import Actions
from terdit_jax.training.optimizer import make_optimizer
from terdit_jax.training.resume import check_finite, describe_run
from terdit_jax.training.state import init_state
from terdit_jax.training.step import apply_gradients, mean_loss
from tests.deployed import random_weights, small_config, weights_of
from tests.golden_models import random_params
from tests.test_step import DDPM, jitted, random_examples

MODEL = small_config(depth=1)
# A leaf, and what one of its numbers becomes.
POISONS = [
    ("blocks/attention/wq/weight", np.nan),
    ("blocks/feed_forward/w2/weight", np.inf),
    ("blocks/adaLN_modulation/weight", -np.inf),
    ("blocks/attention/wv/weight", 3e38),  # gamma overflows float32
    ("blocks/attention/wo/alpha", np.nan),
    ("blocks/adaLN_modulation/alpha", 1e30),  # the norm after it would make zeros of what overflows
    ("blocks/attention/wk/alpha", -np.inf),
    ("blocks/attention_norm/scale", np.nan),
    ("blocks/adaLN_modulation/bias", np.inf),
    ("x_embedder/bias", np.nan),
    ("t_embedder/mlp_in/weight", np.inf),
]


def poisoned(params, path, value):
    """The parameters with one number of one leaf changed."""
    *parents, name = path.split("/")
    copy = jax.tree.map(lambda leaf: np.array(leaf), params)
    branch = copy
    for parent in parents:
        branch = branch[parent]
    branch[name].reshape(-1)[-1] = value
    return copy


@pytest.fixture(scope="module")
def trained():
    """A state, a function from (state, examples) to the next, and a held-out loss."""
    config = OptimizerConfig()
    optimizer, gradients = make_optimizer(config), jitted(MODEL)
    state = init_state(MODEL, optimizer, 0, random_params(MODEL))

    @jax.jit
    def advance(state, examples):
        sums, grads = gradients(state["params"], examples)
        return apply_gradients(optimizer, config, state, sums, grads, PLAIN.gradient_norm(grads))

    heldout = jax.jit(lambda params, examples: mean_loss(MODEL, DDPM, make_operands(MODEL, params), examples)[0])
    return state, advance, heldout


@pytest.mark.parametrize(("path", "value"), POISONS)
def test_training_and_the_held_out_loss_see_it(trained, path, value):
    state, advance, heldout = trained
    params, examples = poisoned(state["params"], path, value), random_examples(MODEL, 4)
    after = advance(state | {"params": params}, examples)
    assert int(after["skipped"]["total"]) == 1
    jax.tree.map(np.testing.assert_array_equal, after["params"], params)
    jax.tree.map(np.testing.assert_array_equal, after["ema_params"], state["ema_params"])
    assert not np.isfinite(heldout(params, examples))
    assert int(advance(state, examples)["skipped"]["total"]) == 0


@pytest.mark.parametrize("matmul_dtype", ["int8", pytest.param("float8_e4m3fn", marks=pytest.mark.slow)])
def test_training_in_8_bits_sees_it(matmul_dtype):
    model = small_config(depth=1, dtype="bfloat16", grad_dtype="bfloat16", matmul_dtype=matmul_dtype)
    run, params, examples = jitted(model), random_params(model), random_examples(model, 4)
    for path, value in POISONS[:7]:
        assert not np.isfinite(run(poisoned(params, path, value), examples)[0]["loss"]), path


def test_a_loss_whose_square_overflows_is_not_learned_from(trained):
    """It would leave the guard against spikes without a variance, and so without effect for good."""
    state, advance, heldout = trained
    examples = random_examples(MODEL, 4)
    examples["noise"] = examples["noise"] * np.float32(1e6)
    assert np.isfinite(heldout(state["params"], examples))
    after = advance(state, examples)
    assert int(after["skipped"]["total"]) == 0 and np.isfinite(after["spikes"]["variance"])
    examples["noise"] = examples["noise"] * np.float32(1e10)
    assert np.isfinite(heldout(state["params"], examples))
    after = advance(state, examples)
    assert int(after["skipped"]["total"]) == 1 and np.isfinite(after["spikes"]["variance"])


@pytest.mark.parametrize("part", ["params", "ema_params", "opt_state"])
def test_a_state_is_checked_part_by_part(trained, part):
    state, _, _ = trained
    check_finite(state, "this", "do that")
    leaves, structure = jax.tree.flatten(state[part])
    leaves[-1] = leaves[-1].at[..., 0].set(jnp.inf) if leaves[-1].ndim else jnp.float32(jnp.nan)
    if part == "opt_state":
        leaves = [leaf * jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf for leaf in leaves]
    with pytest.raises(UserError, match=f"this holds values that are not finite, in {part}.* others: do that"):
        check_finite(state | {part: structure.unflatten(leaves)}, "this", "do that")


def test_a_run_neither_saves_such_a_state_nor_ends_for_images(trained, caplog):
    def refuse(*_):
        raise UserError("2 of 4 images")

    state, _, _ = trained
    run = SimpleNamespace()
    assert Actions.sample(run, refuse, state, {}, 7) is state
    assert Actions.score(run, refuse, None, state, {}, 7) is state
    assert "step 7: NO SAMPLES (2 of 4 images)" in caplog.text and "step 7: NO SCORES (2 of 4" in caplog.text
    bad = state | {"params": poisoned(state["params"], "x_embedder/bias", np.nan)}
    with pytest.raises(UserError, match="the state after step 9 holds values .* in params/x_embedder/bias .*not saved"):
        Actions.save(run, bad, {}, 9)


@pytest.mark.parametrize(("path", "value"), [*POISONS[:2], *POISONS[4:8]])
def test_checkpoints_are_read_by_nobody(tmp_path, path, value):
    """`sample`, `export` and `train.init_from` of a run, and what other software might have written into a file."""
    model = ModelConfig(**{name: getattr(MODEL, name) for name in vars(ModelConfig()) if name != "num_kv_heads"})
    config, data = RunConfig(model=model), make_synthetic(MODEL.sample_shape, MODEL.num_classes).metadata
    params = poisoned(random_params(MODEL), path, value)
    checkpoints = CheckpointWriter(tmp_path, config.checkpoint)
    checkpoints.save({"ema_params": jax.tree.map(jnp.asarray, params)}, describe_run(config, 3, data))
    checkpoints.close()
    message = f"step 3: {path} holds values that are not finite, or beyond"
    with pytest.raises(UserError, match=message):
        load_model(tmp_path)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path, MODEL).params(0)
    with pytest.raises(UserError, match=message):
        export(open_weights(tmp_path), tmp_path / "packed.safetensors", "packed")
    assert not (tmp_path / "packed.safetensors").exists()
    plain = tmp_path / "plain.safetensors"
    export(weights_of(MODEL, params), plain, "safetensors", masters=True)
    with pytest.raises(UserError, match="holds values that are not finite, or beyond"):
        load_model(plain)


@pytest.mark.parametrize(("mode", "dtype"), [("auto", "float32"), ("fast", "bfloat16")])
def test_images_are_not_finite_in_any_mode_and_not_written(tmp_path, mode, dtype):
    path = tmp_path / "model.safetensors"
    export(random_weights(MODEL), path, "packed")
    model = load_model(path, mode=mode, dtype=dtype)
    spoil = lambda at, leaf: leaf * jnp.nan if "alpha" in jax.tree_util.keystr(at) else leaf  # noqa: E731
    model.operands.update(jax.tree_util.tree_map_with_path(spoil, model.operands))
    images = model.draw(np.arange(3), num_steps=1)
    with pytest.raises(UserError, match="3 of 3 images hold values that are not finite"):
        to_uint8(images)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, jnp.bfloat16])
def test_bytes_of_what_is_not_finite_are_refused_and_counted(value, dtype):
    images = np.zeros((5, 4, 4, 3), dtype)
    images[1, 2, 3, 0] = images[1, 0, 0, 0] = images[4, 0, 0, 2] = value
    with pytest.raises(UserError, match="2 of 5 images hold values that are not finite") as caught:
        to_uint8(images)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="1 of 1 images"):
        to_uint8(images[1])


def test_a_preview_spoils_one_image_for_one_that_is_not_finite():
    latents = np.random.default_rng(0).standard_normal((4, 4, 4, 4), np.float32)
    latents[2, 0, 0, 1] = np.inf
    with pytest.raises(UserError, match="1 of 4 images"):
        to_uint8(to_images(latents, 0.18))


def test_a_set_is_not_finished_with_black_images(tmp_path, monkeypatch):
    monkeypatch.setattr(image_set, "SHARD_SIZE", 2)
    plan = make_plan(model={}, settings={}, labels={}, num_samples=4, seed=0)

    def draw(of_shard, first, report):
        return np.full((2, 4, 4, 1), np.nan if first == spoilt else 0.5, np.float32)

    spoilt = 2
    with pytest.raises(UserError, match="2 of 2 images"):
        draw_set(Shards(tmp_path / "set.npz", plan), np.arange(4), draw, print)
    assert not (tmp_path / "set.npz").exists()
    spoilt = None
    draw_set(Shards(tmp_path / "set.npz", plan), np.arange(4), draw, print)
    assert (tmp_path / "set.npz").exists()


@pytest.mark.parametrize("scale", [-3, -1e-9, 1e38, 1e39, 1001, np.inf, np.nan])
def test_guidance_that_overflows_or_is_none_is_refused(scale):
    with pytest.raises(UserError, match="cfg_scale=.*: give a number from 0 to 1000"):
        check_settings(SampleConfig(cfg_scale=scale), DDPM)
