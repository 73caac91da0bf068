"""The ablations' benchmark: variants that exist, runs after those they need, one classifier, rows as a table."""

import ml_collections
import numpy as np
import pytest

from terdit_jax.config import base_config
from terdit_jax.errors import UserError
from terdit_jax.evaluation.classifier import make_classifier, train_classifier
from tests.commands import no_flags

with no_flags():
    from benchmarks.ablation_report import QUARTERS, plot, table
    from benchmarks.ablation_variants import FULL, REFERENCE, TERNARISED, VARIANTS, needs, overrides
    from benchmarks.ablations import runs_for, take_classifier


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_set_fields_that_there_are(name):
    assert (VARIANTS[name] is None) == (name == TERNARISED)
    config = ml_collections.ConfigDict(base_config())
    fields = overrides(name, "runs/{}".format, steps=1000)
    for field, value in fields.items():
        section, key = field.split(".")
        config[section][key] = value  # a locked configuration refuses what it does not know, and values of other types
    if name != TERNARISED:
        workdirs = {value for value in fields.values() if str(value).startswith("runs/")}
        assert workdirs == {f"runs/{need}" for need in needs(name)}


def test_runs_come_after_those_that_they_need():
    assert runs_for("ternary", "1") == [("ternary", "1")]
    assert runs_for(TERNARISED, "0") == [(FULL, "0")]
    assert runs_for("teacher", "0") == [(FULL, "0"), ("teacher", "0")]
    assert runs_for("flow_channels_teacher", "0") == [("flow_full_precision", "0"), ("flow_channels_teacher", "0")]
    expected = [(FULL, "0"), ("teacher", "0"), (REFERENCE, "0"), ("teacher@time", "0")]
    assert runs_for("teacher@time", "0") == expected


def test_a_soft_start_takes_a_quarter_of_the_steps():
    assert overrides("soft_start", str, steps=1000)["train.soft_start_steps"] == 250


def test_a_classifier_is_made_again_from_its_parameters():
    images = np.random.default_rng(0).uniform(-1, 1, (20, 8, 8, 1)).astype(np.float32)
    trained = train_classifier(images, np.arange(20) % 3, 3, num_steps=2)
    again = make_classifier((8, 8, 1), 3, trained.params)
    np.testing.assert_array_equal(again.logits(images), trained.logits(images))


def test_a_given_judge_is_taken_and_never_replaces_another(tmp_path):
    given, place = tmp_path / "given.msgpack", tmp_path / "classifier.msgpack"
    with pytest.raises(UserError, match="no such file"):
        take_classifier(given, place)
    given.write_bytes(b"one")
    take_classifier(given, place)
    take_classifier(given, place)
    assert place.read_bytes() == b"one"
    given.write_bytes(b"two")
    with pytest.raises(UserError, match="another judge"):
        take_classifier(given, place)
    assert place.read_bytes() == b"one"


def rows_of(name, **fields):
    curve = {key: [9.0] * 18 + [1.0, 3.0] for key in ("loss", *QUARTERS)} | {"step": list(range(20))}
    heldout = {"step": [10, 20], "loss_ema": [0.5, 0.25]}
    row = {"steps": 2000, "curve": curve, "heldout": heldout, "heldout_loss_ema": 0.25, "frechet_distance": 5.0}
    row |= {"precision": 0.75, "recall": 0.5, "agreement": 0.5, "images_per_second": 100.0, "batch_size": 8}
    return [row | {"variant": name, "seed": seed} | fields for seed in "01"]


def test_a_table_has_means_over_seeds_the_end_of_the_curves_and_the_time_a_step():
    rows = rows_of("teacher", images_per_second=80.0) + rows_of(REFERENCE)
    rows += [{"variant": TERNARISED, "seed": "0", "frechet_distance": 7.0, "agreement": 0.5}]
    reference, teacher, ternarised = table(rows).splitlines()[2:]
    assert reference.startswith(f"| {REFERENCE} | 2 | 2,000 | 2.0000 ± 0.0000 |") and reference.endswith("| 1.00 |")
    assert "| 0.2500 ± 0.0000 | 5.00 ± 0.00 | 0.750 ± 0.000 | 0.500 ± 0.000 | 50.0% ± 0.0% |" in teacher
    assert teacher.endswith("| 1.25 |")
    assert ternarised == f"| {TERNARISED} | 1 |  |  |  |  |  |  |  | 7.00 |  |  | 50.0% |  |"


def test_rows_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    plot(rows_of("teacher") + rows_of(REFERENCE), str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
