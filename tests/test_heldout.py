"""The held-out loss is a fixed yardstick: the same draws every time, whatever training flips, drops or draws."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

from terdit_jax.config import RunConfig
from terdit_jax.diffusion.objective import Ddpm
from terdit_jax.model.plan import PLAIN
from terdit_jax.model.transformer import abstract_params, make_operands
from terdit_jax.parallel.mesh import AXES
from terdit_jax.training.actions import make_heldout_loss
from terdit_jax.training.examples import example_keys, make_examples
from terdit_jax.training.step import mean_loss
from tests.golden_models import tiny_config

DDPM = Ddpm()
# The configuration drops most labels and flips, and the records have a mirror: held-out examples must see none of it.
MODEL = tiny_config(depth=1, hidden_size=32, ffn_multiple_of=32, class_dropout_prob=0.9)
BATCH = 8
SCALE = 0.5


@pytest.fixture(scope="module")
def params():
    """No leaf is zero: a fresh model's output is, whatever it is given."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.normal(0.2, 0.2, leaf.shape).astype(np.float32), abstract_params(MODEL))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(BATCH, *MODEL.sample_shape)).astype(np.float16)
    std = rng.uniform(0, 1, size=mean.shape).astype(np.float16)
    label = rng.integers(0, MODEL.num_classes, BATCH, dtype=np.int32)
    return {"mean": mean, "std": std, "label": label}


@pytest.fixture(scope="module")
def losses(params, batch):
    """Losses of the same records as batch 0, as batch 1 and as batch 0 again."""
    config = RunConfig()
    mesh = jax.make_mesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])
    loss = make_heldout_loss(config, MODEL, DDPM, mesh, SCALE, PLAIN)
    return [float(loss(params, batch, jnp.int32(number))) for number in (0, 1, 0)]


def test_it_is_the_mean_loss_of_plain_examples_drawn_apart_from_trainings(params, batch, losses):
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def reference(params, seed, class_dropout_prob):
        examples = make_examples(
            batch, example_keys(seed, 0, jnp.arange(BATCH)), DDPM, latent_scale=SCALE,
            num_classes=MODEL.num_classes, class_dropout_prob=class_dropout_prob,
        )  # fmt: skip
        return mean_loss(MODEL, DDPM, make_operands(MODEL, params), examples)[0]

    np.testing.assert_allclose(losses[0], reference(params, 0x5EED, 0.0), rtol=1e-5)
    assert abs(losses[0] / reference(params, 0x5EED, 0.9) - 1) > 1e-3, "labels do matter to this model"
    assert abs(losses[0] / reference(params, 0, 0.0) - 1) > 1e-3, "training's own draws of step 0 are others"


def test_every_batch_has_its_own_fixed_draws(losses):
    assert losses[2] == losses[0]
    assert abs(losses[1] / losses[0] - 1) > 1e-3
