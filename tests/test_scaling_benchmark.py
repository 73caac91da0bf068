"""The benchmark of scaling plans its rows, counts what a step sends and says how rows compare."""

from pathlib import Path

from commands import no_flags
import pytest

from terdit_jax.errors import UserError

with no_flags():
    from benchmarks.scaling import compare, measure, plan, table

DIGITS = str(Path(__file__).parents[1] / "configs" / "digits.py")


def test_a_plan_has_one_device_first():
    rows = plan(["a.py:8", "b.py:4:block"], ["data", "fsdp"], ["codes", "bfloat16"])
    assert [(r["path"], r["layout"], r["gather"]) for r in rows[:4]] == [
        ("a.py", "one", "codes"),
        ("a.py", "data", "codes"),
        ("a.py", "fsdp", "codes"),
        ("a.py", "fsdp", "bfloat16"),
    ]
    assert len(rows) == 8 and rows[4]["remat"] == "block" and rows[4]["batch"] == 4


@pytest.mark.parametrize(("configs", "layouts"), [(["a.py"], ["data"]), (["a.py:x"], ["data"]), (["a.py:8"], ["x"])])
def test_a_plan_that_cannot_be_is_refused(configs, layouts):
    with pytest.raises(UserError, match="--(configs|layouts)="):
        plan(configs, layouts, ["codes"])


@pytest.mark.slow
def test_a_row_is_measured_on_eight_devices():
    (run,) = (row for row in plan([f"{DIGITS}:1"], ["fsdp"], ["codes"]) if row["layout"] == "fsdp")
    row = measure(run, steps=1, rounds=2)
    assert row["devices"] == 8 and row["finite_steps"] == 7 and row["images_per_second"] == 8 / row["seconds"]
    # Two gathers of 2-bit codes against one reduction of the gradients, which the CPU backend makes in float32.
    assert 0 < row["sent"]["gathered"] < row["sent"]["reduced"]
    one = {**row, "layout": "one", "devices": 1, "images_per_second": 2.0, "seconds": 0.5, "batch": 1}
    row |= {"images_per_second": 8.0, "seconds": 1.0}
    failed = {**run, "failed": "no memory"}
    rows = [one, row, failed]
    compare(rows)
    assert (one["scaling"], row["scaling"], row["beyond_one_device"]) == (1, 4, 0.5)
    lines = table(rows).splitlines()
    assert "| 4.00 | 50.0% |" in lines[3] and "failed: no memory" in lines[4]
