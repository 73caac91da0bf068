"""The inception score against the ADM evaluator's and closed forms, whole and in portions."""

import numpy as np
import pytest

from terdit_jax.errors import UserError
from terdit_jax.evaluation.inception_score import InceptionScore, inception_score
from tests.golden_models import golden_arrays


def test_it_is_the_evaluators():
    golden = golden_arrays("adm_metrics")
    found = inception_score(golden["probs"], int(golden["is_split"]))
    assert found == pytest.approx(float(golden["inception_score"]), rel=1e-6)


@pytest.mark.parametrize("portion", [1, 7, 50, 333, 1000])
def test_portions_are_the_whole(portion):
    probabilities = golden_arrays("adm_metrics")["probs"]
    score = InceptionScore(250)
    for start in range(0, len(probabilities), portion):
        score.add(probabilities[start : start + portion])
    assert score.score() == pytest.approx(inception_score(probabilities, 250), rel=1e-12)


def test_certain_answers_score_the_number_of_classes_and_equal_ones_score_one():
    assert inception_score(np.eye(10)) == pytest.approx(10)
    assert inception_score(np.full((30, 10), 0.1)) == pytest.approx(1)


def test_splits_are_in_order_and_a_last_shorter_one_counts_as_much():
    # Classes 0 and 1, then class 2 alone: scores 2 and 1.
    probabilities = np.eye(3)[[0, 1, 0, 1, 2, 2]]
    assert inception_score(probabilities, 4) == pytest.approx(1.5)
    assert inception_score(probabilities, 6) == pytest.approx(3)


def test_unusable_probabilities_are_refused():
    with pytest.raises(UserError, match="no probabilities"):
        InceptionScore().score()
    for value in (-0.1, np.nan):
        with pytest.raises(UserError, match="below 0 or not finite"):
            inception_score(np.full((3, 3), value))
