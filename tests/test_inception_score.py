"""The inception score against the ADM evaluator's and closed forms."""

import numpy as np
import pytest

from terdit_jax.errors import UserError
from terdit_jax.evaluation.inception_score import inception_score
from tests.golden_models import golden_arrays


def score(probabilities, split=5000):
    return inception_score(probabilities[i : i + split] for i in range(0, len(probabilities), split))


def test_it_is_the_evaluators():
    golden = golden_arrays("adm_metrics")
    found = score(golden["probs"], int(golden["is_split"]))
    assert found == pytest.approx(float(golden["inception_score"]), rel=1e-6)


def test_certain_answers_score_the_number_of_classes_and_equal_ones_score_one():
    assert score(np.eye(10)) == pytest.approx(10)
    assert score(np.full((30, 10), 0.1)) == pytest.approx(1)


def test_a_last_shorter_split_counts_as_much():
    # Classes 0 and 1, then class 2 alone: scores 2 and 1.
    probabilities = np.eye(3)[[0, 1, 0, 1, 2, 2]]
    assert score(probabilities, 4) == pytest.approx(1.5)
    assert score(probabilities, 6) == pytest.approx(3)


def test_unusable_probabilities_are_refused():
    with pytest.raises(UserError, match="no probabilities"):
        inception_score([])
    for value in (-0.1, np.nan):
        with pytest.raises(UserError, match="below 0 or not finite"):
            score(np.full((3, 3), value))
