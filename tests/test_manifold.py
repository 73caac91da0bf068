"""Precision and recall against the ADM evaluator's, against plain loops, and within bounded memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.errors import UserError
from terdit_jax.evaluation import manifold
from terdit_jax.evaluation.manifold import precision_recall
from tests.golden_models import golden_arrays


@pytest.fixture(scope="module")
def golden():
    return golden_arrays("adm_metrics")


def test_figures_are_the_evaluators_but_for_one_image(golden):
    """It lies at the edge of a ball, and the float16 of the evaluator's distances is what puts it inside."""
    exact = by_definition(golden["real"].astype(np.float64), golden["fake"].astype(np.float64))
    assert precision_recall(golden["real"], golden["fake"]) == exact == (891 / 1000, 616 / 1200)
    assert (float(golden["precision"]), float(golden["recall"])) == (891 / 1000, 617 / 1200)


def by_definition(reference, samples, neighbours=3):
    def distances(a, b):
        return np.stack([np.square(a - row).sum(axis=1) for row in b], axis=1)

    def covered(of, by):
        radii = np.sort(distances(by, by), axis=1)[:, neighbours]
        return float((distances(of, by) <= radii).any(axis=1).mean())

    return covered(samples, reference), covered(reference, samples)


@pytest.mark.parametrize("block", [7, 1000])
def test_blocks_change_nothing_and_ties_count_as_within(block):
    """Small whole numbers: all arithmetic is exact, and many distances are equal."""
    rng = np.random.default_rng(block)
    reference, samples = (
        rng.integers(-size, size, (count, 8)).astype(np.float32) for size, count in ((3, 61), (4, 37))
    )
    found = precision_recall(reference, samples, block)
    assert found == by_definition(reference, samples)
    assert 0 < min(found) < 1


def test_a_set_covers_itself_and_not_what_is_far_away():
    features = np.random.default_rng(2).normal(size=(40, 6)).astype(np.float32)
    assert precision_recall(features, features) == (1, 1)
    assert precision_recall(features, features + 100) == (0, 0)
    # Every sample in one place that is like the reference: all of them convince, and cover little.
    narrow = np.repeat(features[:1], 30, axis=0)
    assert precision_recall(features, narrow) == (1, 1 / 40)


def test_fifty_thousand_by_fifty_thousand_fit(monkeypatch):
    """Compiled for 2,048 features: a block at a time is about a gigabyte, and nothing larger is ever made."""

    def of(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    block, shapes = manifold.BLOCK, set()
    features, radii = of(block, 2048), of(block)
    programs = (
        manifold._nearest.lower(of(block, 4), features, features, jax.ShapeDtypeStruct((), jnp.int32)),
        manifold._within.lower(features, radii, features, radii),
    )
    for program in programs:
        memory = program.compile().memory_analysis()
        needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
        assert 4 * block**2 <= needed < 1.1e9

    within = manifold._within

    def recorded(rows, row_radii, columns, column_radii):
        shapes.add((rows.shape, columns.shape))
        return within(rows, row_radii, columns, column_radii)

    monkeypatch.setattr(manifold, "_within", recorded)
    wide = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    precision_recall(wide, wide[:44], block=10)
    assert shapes == {((10, 2), (10, 2))}, "a last block of another shape would be compiled once more"


@pytest.mark.parametrize(
    ("reference", "samples", "message"),
    [
        (np.zeros((3, 2)), np.zeros((9, 2)), r"reference: features of shape \(3, 2\).*at least 4"),
        (np.zeros((9, 2)), np.zeros((9,)), r"samples: features of shape \(9,\)"),
        (np.zeros((9, 2)), np.zeros((9, 3)), "widths 2 and 3"),
        (np.zeros((9, 2)), np.full((9, 2), np.nan), "samples: 18 of 18"),
    ],
)
def test_unusable_features_are_refused(reference, samples, message):
    with pytest.raises(UserError, match=message):
        precision_recall(reference.astype(np.float32), samples.astype(np.float32))
