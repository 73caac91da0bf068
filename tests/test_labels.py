"""A label that is no class is refused wherever labels are taken."""

import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.errors import UserError
from terdit_jax.inference.image_set import make_labels
from terdit_jax.labels import can_be_kept, check_labels, find_classes
from tests.runs import ROOT

BAD = {
    "label 10 is out of range: the model has classes 0 to 9": [np.array([3, 10]), [0, 10, -1], range(8, 12)],
    "label -1 is out of range": [np.array([-1]), [0, -1], jnp.array([0, -1])],
    "label 256 is out of range": [np.array([256], np.uint16), [2**8], np.array([256], np.uint64)],
    "labels are float64, the first": [np.array([1.5]), [1, 1.5], [float("nan")], [1.0, 2.0], np.array([1e300])],
    "labels are bool": [[True], [1, False], np.array([True, False]), [np.True_], jnp.array([True])],
    "labels are <U1, the first 1": [["1"], np.array(["1", "2"])],
    "labels are object": [[None], [2**70], [0, {}], np.array([0, 1], object)],
    "and at least one": [[], np.zeros(0, int), [[1, 2]], np.array(3), range(0)],
    "lists of several lengths": [[[1], [2, 3]]],
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_no_class_is_refused_in_one_line(message):
    for labels in BAD[message]:
        with pytest.raises(UserError) as caught:
            check_labels(labels, 10)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_classes_of_any_integer_type_are_returned():
    for labels in ([0, 9], (0, 9), range(0, 10, 9), np.array([0, 9], np.uint8), jnp.array([0, 9]), iter([0, 9])):
        checked = check_labels(labels, 10)
        assert checked.dtype.kind in "iu" and checked.tolist() == [0, 9]


def test_classes_go_by_their_names_and_by_each_part_of_them():
    names = ("tench, Tinca tinca", "crane", "ox", "crane, derrick", "7")
    assert find_classes(["Tinca tinca", "tench, Tinca tinca", "ox", "7", "derrick"], names) == [0, 0, 2, 4, 3]
    for one, said in {
        "crane": "is what classes 1 and 3 are called: give the number",
        "Tenche": "did you mean",
        "": "no class is called '': the first are tench, Tinca tinca, crane, ox",
    }.items():
        with pytest.raises(UserError, match=said):
            find_classes([one], names)
    with pytest.raises(UserError, match="^a: the names of the classes are not known"):
        find_classes(["ox"], (), prefix="a: ")


def test_names_are_kept_beside_weights_unless_they_are_too_long():
    assert can_be_kept(()) and can_be_kept(("a,b", "\n", "\U0001f408")) and can_be_kept(["x" * 20] * 20_000)
    assert not can_be_kept(["x" * 20] * 30_000) and not can_be_kept(["x" * 1001])
    assert not any(can_be_kept(["a", other]) for other in (3, None, ["b"], "\ud800"))


@pytest.mark.parametrize("order", ["balanced", "random"])
@pytest.mark.parametrize("classes", [[], [1.5], [True], ["3"], [-1], [2**31]])
def test_sets_are_of_classes(order, classes):
    with pytest.raises(UserError, match="label"):
        make_labels(classes, 4, order, 0)


SAMPLE = """
from absl import flags
from types import SimpleNamespace
from terdit_jax import sample
from terdit_jax.errors import UserError

def load_model(path, check, **options):
    check(SimpleNamespace(config=SimpleNamespace(num_classes=10), class_names=names))
    raise SystemExit(1)  # weights would be read

sample.load_model = load_model
names = ()
for labels in ("", "1.5", "True", "1,,2", "1_0", "cat", "1-3", "0x1", "1e3", "9" * 40, "nan", "\u0661", "hog,9", "10"):
    names = ("dog", *map(str, range(9))) if labels == "hog,9" else names
    flags.FLAGS["labels"].unparse()
    flags.FLAGS(["sample", "--model=run", "--output=a.png", f"--labels={labels}"])
    try:
        sample.main([])
    except UserError as error:
        print(error)
"""


def test_the_commands_labels_are_checked_before_the_model_is_loaded():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", SAMPLE], env=environment, capture_output=True, text=True, check=False, encoding="utf-8"
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 14, done.stderr
    *nameless, unknown, outside = lines
    assert all(line.startswith("--labels=") and line.endswith("give whole numbers, as 0,1,2") for line in nameless)
    assert unknown == "--labels=hog,9: no class is called 'hog': did you mean dog?"
    assert outside == "label 10 is out of range: the model has classes 0 to 9"
