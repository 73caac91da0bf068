"""The benchmark of inference says how ours stands to PyTorch's, by batch and size, whatever was measured."""

import pytest

from tests.commands import no_flags

with no_flags():
    from benchmarks.inference import _plot, table


def row(who, pixels, batch, ms, **more):
    return {"who": who, "model": "m", "pixels": pixels, "batch": batch, "ms": ms, "held_gb": 1, "peak_gb": 2, **more}


ROWS = [
    row("fast", 256, 32, 50.0, floor_ms=25.0, error=0.031),
    row("torch compiled", 256, 32, 100.0),
    row("exact", 256, 32, 80.0, floor_ms=60.0, error=None),
    row("torch compiled", 256, 1, 8.0),
    row("exact", 512, 1, 4.0),
    {"who": "torch public", "model": "m", "pixels": 512, "batch": 1, "failed": "no memory"},
]


def test_the_tables():
    times, held = table(ROWS).split("\n\n")
    assert times.splitlines() == [
        "| Model | px | Images | `exact` | `fast` | torch.compile, bf16 |",
        "|---|---|---|---|---|---|",
        "| m | 256 | 1 |  |  | 8.00 |",
        "| m | 256 | 32 | 80.00 (1.25) | 50.00 (2.00) | 100.00 |",
        "| m | 512 | 1 | 4.00 |  |  |",
    ]
    assert "| m | 256 | `fast` | 32 | 1.00 | 2.00 | 2.56 | 50% | 0.031 |" in held
    assert "| m | 256 | torch.compile, bf16 | 32 | 1.00 | 2.00 | 1.28 |  |  |" in held
    assert held.endswith("torch public, m, 1: failed: no memory")


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    _plot(ROWS, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 1000
