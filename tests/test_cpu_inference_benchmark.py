"""The benchmark on CPUs sets two ways of running one file side by side."""

import json
import os
import subprocess
import sys

import pytest

from terdit_jax.interop.exports import export
from tests.deployed import random_weights, small_config


@pytest.mark.slow
def test_rows_of_both_sides(tmp_path):
    pytest.importorskip("torch")
    export(random_weights(small_config()), tmp_path / "model.safetensors", "packed")
    command = [sys.executable, "-m", "benchmarks.cpu_inference", f"--models={tmp_path}/model.safetensors"]
    command += ["--ways=ours bfloat16,torch bfloat16", "--batches=2", "--turns=3", f"--output={tmp_path}/rows.json"]
    subprocess.run(command, check=True, capture_output=True, cwd=os.getcwd())
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["way"] for row in rows] == ["ours bfloat16", "torch bfloat16"]
    for row in rows:
        assert (row["model"], row["images"], len(row["turns"])) == ("model", 2, 3)
        assert min(row["seconds"], row["processor_seconds"], row["peak_mb"], row["start_seconds"]) > 0
