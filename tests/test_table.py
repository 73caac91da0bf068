"""Saved reports become tables."""

import json

from etils import epath
import pytest

from terdit_jax.aot.table import compare, make_tables
from terdit_jax.errors import UserError
from tests.runs import ROOT

GIB = 2**30
SPEED = {
    "compute": 0.5, "memory": 0.25, "network": 0.125, "overlapped": 0.5, "in_turn": 0.625, "bound": "compute",
    "mfu_bound": 0.75, "images_per_second": 1024.0, "hours": 163.8,
}  # fmt: skip


def report(what, topology, chips):
    return {
        "what": what, "topology": topology, "chips": chips, "mesh": {"data": 1, "fsdp": chips, "tensor": 1},
        "options": {"mode": "small"}, "images": 512, "steps": 250, "flops": {"compiled": 250e12}, "sent": 2 * GIB,
        "memory": {
            "arguments": {"weights": GIB}, "temporaries": 2 * GIB, "total": 3.5 * GIB, "limit": 16 * GIB,
        },
        "roofline": SPEED,
    }  # fmt: skip


def test_tables(tmp_path):
    for name, content in {
        "b": report("train", "v5e:16x16", 256),
        "a": report("train", "v5e:4x4", 16),
        "c": report("sample", "v6e:1x1", 1),
        "d": {"tried": []},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    train, sample = make_tables(epath.Path(tmp_path)).split("\n\n")
    assert [line.split(" | ")[:3] for line in train.splitlines()[2:]] == [
        ["| `v5e:4x4`", "16", "1 x 16 x 1"],
        ["| `v5e:16x16`", "256", "1 x 256 x 1"],
    ]
    assert train.splitlines()[2].endswith(
        "| 1.00 | 2.00 | 3.50 of 16.00 | 2.00 | 500.0 / 250.0 / 125.0 | 500.0, 625.0 | 75% | 1,024 | 164 |"
    )
    assert sample.splitlines()[2] == (
        "| `v6e:1x1` | small | 512 | 1.00 | 3.50 of 16.00 | 1.00 | 2.0 / 1.0 | 2.0, 2.5 | compute | 1024.00 |"
    )


def test_a_folder_without_reports_is_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no report"):
        make_tables(epath.Path(tmp_path))
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="x.json: it is not sound JSON"):
        make_tables(epath.Path(tmp_path))


def test_reports_beside_measured_steps(tmp_path):
    one = report("train", "h200:1", 1) | {"config": "terdit_4b", "images": 32, "options": {"remat": "dots"}}
    folder = epath.Path(tmp_path / "reports")
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(one))
    run = {
        "config": "terdit_4b", "batch_size": 32, "remat": "dots", "devices": 1, "images_per_second": 40.0,
        "peak_gb": 4.04,
    }  # fmt: skip
    measured = epath.Path(tmp_path / "measured.json")
    measured.write_text(json.dumps({"rows": [run | {"remat": "block", "images_per_second": 1.0}, run]}))
    (row,) = compare(folder, measured).splitlines()[2:]
    assert row == "| `terdit_4b` | 32 | dots | 3.8 | 4.0 | 500.0, 625.0 | 800 | 1.28 |"
    measured.write_text(json.dumps({"rows": [run | {"devices": 2}]}))
    with pytest.raises(UserError, match="holds no run on one device"):
        compare(folder, measured)
    measured.write_text("[]")
    with pytest.raises(UserError, match="is no result of benchmarks/training.py"):
        compare(folder, measured)


def test_what_a_step_sends_is_documented_as_the_reports_say():
    text = (ROOT / "docs" / "parallelism.md").read_text()
    pods, sent = ROOT / "docs" / "pods", {}
    for path in (pods / "train_h200_8.json", pods / "train_v5p_4x4x4.json", *(pods / "gathers").glob("*.json")):
        report = json.loads(path.read_text())
        key = report["topology"], report["options"]["gather"], report["options"]["grad_dtype"]
        gathered, reduced = (
            sum(row["sent"] for row in report["collectives"] if row["kind"] in kinds)
            for kinds in (("all-gather",), ("all-reduce", "reduce-scatter"))
        )
        bits = 8 * gathered / (2 * 4_227_858_432 * (1 - 1 / report["chips"]))
        figures = f"{bits:.2f} | {gathered / 1e9:.2f} | {reduced / 1e9:.2f} | {report['sent'] / 1e9:.2f}"
        assert f"| `{'` | `'.join(key)}` | {figures} |" in text
        assert report["images"] == 512 and report["config"] == "terdit_4b"
        sent[key] = report["sent"]
    for machine in ("h200:8", "v5p:4x4x4"):
        assert sent[machine, "bfloat16", "bfloat16"] / sent[machine, "codes", "bfloat16"] >= 2.2


def test_the_documentation_shows_what_the_reports_beside_it_say():
    text = (ROOT / "docs" / "pods_compile.md").read_text()
    pods = epath.Path(ROOT / "docs" / "pods")
    for table in (make_tables(pods), compare(pods / "one_h200", pods.parent / "benchmarks" / "training_h200.json")):
        lines = [line for line in table.splitlines() if line]
        assert len(lines) > 2 and all(line in text for line in lines)
