"""The ablations' benchmark: variants that exist, a classifier that is the same for all, rows as a table."""

import ml_collections
import numpy as np

from terdit_jax.config import base_config
from terdit_jax.evaluation.classifier import make_classifier, train_classifier
from tests.commands import no_flags

with no_flags():
    from benchmarks.ablations import QUARTERS, TERNARISED, VARIANTS, table


def test_variants_set_fields_that_there_are():
    for name, fields in VARIANTS.items():
        assert (fields is None) == (name == TERNARISED)
        config = ml_collections.ConfigDict(base_config())
        for field, value in (fields or {}).items():
            section, key = field.split(".")
            config[section][key] = value  # a locked configuration refuses what it does not know


def test_a_classifier_is_made_again_from_its_parameters():
    images = np.random.default_rng(0).uniform(-1, 1, (20, 8, 8, 1)).astype(np.float32)
    trained = train_classifier(images, np.arange(20) % 3, 3, num_steps=2)
    again = make_classifier((8, 8, 1), 3, trained.params)
    np.testing.assert_array_equal(again.logits(images), trained.logits(images))


def test_a_table_has_means_over_seeds_and_the_end_of_the_curves():
    curve = {name: [9.0] * 18 + [1.0, 3.0] for name in ("loss", *QUARTERS)}
    scores = {"frechet_distance": 5.0, "agreement": 0.5}
    rows = [{"variant": "ternary", "seed": seed, "curve": curve, "heldout_loss_ema": 0.25, **scores} for seed in "01"]
    rows += [{"variant": TERNARISED, "seed": "0", **scores, "frechet_distance": 7.0}]
    lines = table(rows).splitlines()
    assert lines[2].startswith("| ternary | 2 | 2.0000 ± 0.0000 |") and "| 5.00 ± 0.00 | 50.0% ± 0.0% |" in lines[2]
    assert lines[3] == f"| {TERNARISED} | 1 |  |  |  |  |  |  | 7.00 | 50.0% |  |"
