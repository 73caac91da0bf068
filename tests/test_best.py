"""The best checkpoint: the lowest loss wins, survives its process, and yields to nothing that is not a number."""

import jax
import numpy as np
import pytest

from terdit_jax.checkpoints.best import BestCheckpoint
from terdit_jax.checkpoints.layout import BEST
from terdit_jax.config import RunConfig
from terdit_jax.config_sections import ModelConfig
from terdit_jax.data.synthetic import make_synthetic
from terdit_jax.interop.weights import open_weights
from terdit_jax.training.resume import describe_run
from tests.deployed import random_params, small_config


def describe(step):
    model = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "ffn_multiple_of": 32, "num_classes": 10}
    config = RunConfig(model=ModelConfig(**model))
    return describe_run(config, step, make_synthetic((8, 8, 4), 10).metadata)


def kept(workdir):
    """The step and some of the weights that whoever opens the folder gets."""
    weights = open_weights(workdir / BEST)
    return weights.description.step, dict(weights.leaves())["y_embedder/embedding_table"]


@pytest.fixture(scope="module")
def params():
    return [random_params(small_config(), seed) for seed in range(3)]


def test_the_lowest_loss_is_kept_and_remembered(tmp_path, params):
    best = BestCheckpoint(tmp_path, start_step=0)
    offers = [(10, 3.0, True), (20, 4.0, False), (30, float("nan"), False), (40, 2.0, True), (50, 2.0, False)]
    for step, loss, expected in offers:
        assert best.offer(params[step == 40], describe(step), loss) is expected
    best.close()
    step, table = kept(tmp_path)
    assert step == 40
    np.testing.assert_array_equal(table, np.asarray(params[1]["y_embedder"]["embedding_table"]))
    best = BestCheckpoint(tmp_path, start_step=50)
    assert not best.offer(params[2], describe(60), 2.5)
    assert best.offer(params[2], describe(70), 1.5)
    best.close()
    assert kept(tmp_path)[0] == 70
    assert {path.name for path in (tmp_path / BEST / "checkpoints").iterdir()} == {"40", "70"}


def test_what_a_lost_continuation_found_is_dropped(tmp_path, params):
    best = BestCheckpoint(tmp_path, start_step=0)
    best.offer(params[0], describe(10), 3.0)
    best.offer(params[1], describe(20), 1.0)
    best.close()
    best = BestCheckpoint(tmp_path, start_step=15)  # resumed from before step 20, with another rate perhaps
    assert best.offer(params[2], describe(20), 2.0)
    best.close()
    step, table = kept(tmp_path)
    assert step == 20
    np.testing.assert_array_equal(table, np.asarray(params[2]["y_embedder"]["embedding_table"]))
    assert jax.tree.leaves(params[1])  # alive until here: the saved one is not they
