"""The benchmark of scaling plans its rows, counts what a step sends and says how rows compare."""

from pathlib import Path

import pytest

from terdit_jax.errors import UserError
from tests.commands import no_flags

with no_flags():
    from benchmarks.machine import load_changed
    from benchmarks.scaling import compare, deal, plan, plan_losses, plan_sampling, table
    from benchmarks.scaling_rows import measure, measure_losses, measure_sampling

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
    rows = plan(["a.py:8:dots:data+fsdp:codes", "b.py@model.depth=3:4:block:fsdp"], ["data"], ["bfloat16"])
    assert [(r["layout"], r["gather"]) for r in rows if r["devices"] == 2 and r["path"] == "a.py"] == [
        ("data", "codes"),
        ("fsdp", "codes"),
    ]
    assert (rows[-1]["path"], rows[-1]["layout"], rows[-1]["gather"]) == ("b.py@model.depth=3", "fsdp", "bfloat16")


@pytest.mark.parametrize(("configs", "layouts"), [(["a.py"], ["data"]), (["a.py:x"], ["data"]), (["a.py:8"], ["x"])])
def test_a_plan_that_cannot_be_is_refused(configs, layouts):
    with pytest.raises(UserError, match="--(configs|layouts)="):
        plan(configs, layouts, ["codes"])


def test_a_configuration_is_changed_and_named_so():
    config = load_changed(f"{DIGITS}@model.depth=3@compute.layers='unrolled'")
    assert (config.model.depth, config.compute.layers) == (3, "unrolled")
    assert config.name == "digits, depth=3, layers='unrolled'"
    for change in ("model.depths=3", "model.depth=x", "model.depth"):
        with pytest.raises(UserError, match=change):
            load_changed(f"{DIGITS}@{change}")


@pytest.mark.slow
def test_a_row_is_measured_on_eight_devices():
    _, run = plan([f"{DIGITS}:1"], ["fsdp"], ["codes"], [1, 8])
    row = measure(run, steps=1, rounds=2)
    assert row["devices"] == 8 and row["finite_steps"] == 7 and row["images_per_second"] == 8 / row["seconds"]
    # Two gathers of 2-bit codes against one reduction of the gradients, which the CPU backend makes in float32.
    assert 0 < row["sent"]["gathered"] < row["sent"]["reduced"]
    assert row["compile_seconds"] > 0
    one = {**row, "layout": "one", "devices": 1, "images_per_second": 2.0, "seconds": 0.5, "batch": 1}
    row |= {"images_per_second": 8.0, "seconds": 1.0}
    failed = {**run, "failed": "no memory"}
    rows = [one, row, failed]
    compare(rows)
    assert (one["scaling"], row["scaling"], row["beyond_one_device"]) == (1, 4, 0.5)
    lines = table(rows).splitlines()
    assert "| 4.00 | 50.0% |" in lines[3] and "failed: no memory" in lines[4]


def test_every_number_of_devices_has_its_rows():
    rows = plan(["a.py:8:dots:fsdp"], ["data"], ["codes", "bfloat16"], [1, 2, 4])
    assert [(r["devices"], r["layout"], r["gather"]) for r in rows] == [
        (1, "one", "codes"), (2, "fsdp", "codes"), (2, "fsdp", "bfloat16"), (4, "fsdp", "codes"),
        (4, "fsdp", "bfloat16"),
    ]  # fmt: skip
    assert deal(rows[1:], 4) == [[0, 1], [2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_losses_are_compared_at_one_global_batch():
    rows = plan_losses(["a.py:8"], [1, 4])
    assert [(r["layout"], r["batch"] * r["devices"], r["accumulation"]) for r in rows] == [
        ("one", 8, 1), ("one", 8, 4), ("data", 8, 1), ("fsdp", 8, 1),
    ]  # fmt: skip
    for row, loss in zip(rows, (2.0, 2.0, 2.02, 1.0), strict=True):
        row["losses"] = [1.0, loss]
    rows[3]["failed"] = "no memory"
    compare(rows)
    assert rows[1]["largest_difference"] == 0 and abs(rows[2]["largest_difference"] - 0.01) < 1e-9
    assert "1.0e-02" in table(rows).splitlines()[4] and "failed: no memory" in table(rows).splitlines()[5]
    with pytest.raises(UserError, match="not divisible by 3 devices"):
        plan_losses(["a.py:8"], [1, 3])


@pytest.mark.slow
def test_losses_and_pictures_are_the_same_on_more_devices():
    rows = [measure_losses({**row, "path": DIGITS}) for row in plan_losses(["digits:8"], [1, 4])]
    compare(rows)
    assert all(row["finite_steps"] == 20 and row["losses"][-1] < row["losses"][0] for row in rows)
    assert max(row["largest_difference"] for row in rows) < 0.05
    one, four = (measure_sampling(row) for row in plan_sampling([DIGITS], [1, 4], batch=2, steps=2, pictures=9))
    assert one["finite"] and four["finite"] and four["devices"] == 4
