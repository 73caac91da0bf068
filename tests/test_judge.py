"""Scores in training: they tell good weights from bad ones, and change nothing about the training."""

import time

import jax
import numpy as np
import pytest

from terdit_jax.checkpoints.layout import BEST
from terdit_jax.data.reader import open_dataset
from terdit_jax.data.synthetic import make_synthetic
from terdit_jax.errors import UserError
from terdit_jax.evaluation import judge as judge_module
from terdit_jax.evaluation.judge import make_proxy_judge, read_images
from terdit_jax.interop.weights import open_weights
from tests.runs import (
    assert_same_run,
    execute,
    logged_steps,
    metrics_without_timing,
    prepare_digits,
    programs,
    saved_run,
    start,
    train_arguments,
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return prepare_digits(tmp_path_factory.mktemp("data") / "digits")


def test_real_images_score_better_than_noise_and_the_same_twice(digits, monkeypatch):
    monkeypatch.setattr(judge_module, "classifier_steps", lambda count: 100)
    dataset = open_dataset(digits)
    train, asked = read_images(dataset, "train"), []

    def draw(params, labels):
        asked.append(labels)
        if params["real"]:
            return np.stack([train.images[train.labels == label][0] for label in labels])
        return np.random.default_rng(0).uniform(-1, 1, (len(labels), 8, 8, 1)).astype(np.float32)

    judge = make_proxy_judge(dataset, 60, draw)
    real, noise, again = (judge(step, {"real": step != 2}) for step in (1, 2, 3))
    assert real == again
    assert real.loss == real.figures["classifier_frechet_distance"] < noise.loss
    assert real.figures["classifier_agreement"] > 0.9 > noise.figures["classifier_agreement"]
    assert all(np.array_equal(labels, asked[0]) for labels in asked) and len(asked[0]) == 60


def test_latents_are_refused():
    with pytest.raises(UserError, match="config.log.score_every needs a data set of images"):
        make_proxy_judge(make_synthetic((8, 8, 1), 10), 10, lambda params, labels: None)


@pytest.mark.slow
def test_training_is_the_same_bit_for_bit_with_scores_and_without(digits, tmp_path):
    """And with a kill in between, with a best checkpoint that is the same as well."""
    plain, scored, killed = (tmp_path / name for name in ("plain", "scored", "killed"))
    scores = {"log__score_every": 10, "log__score_samples": 20}
    execute("main", *train_arguments(digits, plain))
    out, _ = execute("main", *train_arguments(digits, scored, **scores))
    assert "the best so far: kept in" in out
    lines = metrics_without_timing(scored)
    scores_of = {line["step"]: line for line in lines if "classifier_frechet_distance" in line}
    assert list(scores_of) == [10, 20, 30, 40]
    assert [line for line in lines if "classifier_frechet_distance" not in line] == metrics_without_timing(plain)
    (state, _), (expected, _) = saved_run(scored), saved_run(plain)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    best = min(scores_of, key=lambda step: scores_of[step]["classifier_frechet_distance"])
    weights = open_weights(scored / BEST)
    assert (weights.description.step, weights.description.ema) == (best, True)

    process = start("main", *train_arguments(digits, killed, **scores), cache=programs())
    while max(logged_steps(killed), default=0) < 20:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.communicate()
    execute("main", *train_arguments(digits, killed, **scores))
    assert_same_run(killed, scored)
    again = open_weights(killed / BEST)
    assert again.description == weights.description
    for (_, leaf), (_, other) in zip(again.leaves(), weights.leaves(), strict=True):
        np.testing.assert_array_equal(leaf, other)
