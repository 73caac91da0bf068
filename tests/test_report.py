"""The size report adds up to the published models' sizes, and says what it is measured by."""

import re

import jax
import pytest
from safetensors.numpy import load_file

from terdit_jax.interop.exports import export
from terdit_jax.interop.report import size_report
from terdit_jax.model.transformer import count_params, packed_operands
from tests.deployed import VARIANTS, random_params, small_config, weights_of
from tests.test_configs import model_of


def table(text):
    """part -> its cells."""
    rows = [re.split(r"\s{2,}", line) for line in text.splitlines() if line and not line.startswith(("this", "paper"))]
    header, *rows = rows
    return {name: dict(zip(header[1:], cells, strict=True)) for name, *cells in rows}


@pytest.mark.parametrize(
    ("name", "parameters", "ternary", "disk"),
    [
        ("terdit_600m", "609,984,160", "99.0%", "175.0 MB"),
        ("terdit_4b", "4,238,414,112", "99.8%", "1,099.2 MB"),
        ("dit_xl_2", "674,834,720", "0.0%", "2,700.5 MB"),
        ("terdit_dit_xl_2", "675,028,452", "99.1%", "193.1 MB"),
    ],
)
def test_totals_of_the_published_models(name, parameters, ternary, disk):
    text = size_report(model_of(name))
    total = table(text)["total"]
    assert (total["parameters"], total["ternary"], total["on disk"]) == (parameters, ternary, disk)
    assert total["float32"] == f"{4 * int(parameters.replace(',', '')) / 1e6:,.1f} MB"
    assert ("paper: TerDiT-4.2B 1.1 GB on disk, 1,919 MB in use" in text) == (name == "terdit_4b")


def test_the_full_precision_twin_has_nothing_ternary():
    total = table(size_report(model_of("large_dit_600m")))["total"]
    assert (total["parameters"], total["ternary"], total["on disk"]) == ("609,836,576", "0.0%", "2,439.3 MB")
    in_blocks = 603_979_776  # in bfloat16, the rest in float32
    assert total["in memory"] == f"{(2 * in_blocks + 4 * (609_836_576 - in_blocks)) / 1e6:,.1f} MB"


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_every_byte_is_counted_once(tmp_path, overrides):
    """The report against a file's tensors and against operands as they are made."""
    model = small_config(**overrides)
    params = random_params(model)
    kind = "packed" if model.ternary else "safetensors"
    export(weights_of(model, params), tmp_path / "out", kind)
    operands = jax.eval_shape(lambda params: packed_operands(model, params), params)
    total = table(size_report(model))["total"]
    for column, exact in (
        ("on disk", sum(tensor.nbytes for tensor in load_file(tmp_path / "out").values())),
        ("in memory", sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(operands))),
        ("parameters", count_params(model)["total"]),
    ):
        number, unit = f"{total[column]} B".replace(",", "").split()[:2]
        unit = {"MB": 1e6, "kB": 1e3, "B": 1}[unit]
        assert abs(float(number) * unit - exact) <= 0.05 * unit, column


def test_a_files_own_size_is_told():
    assert "this file: 12.3 kB" in size_report(small_config(), 12_345).splitlines()
    assert "this file" not in size_report(small_config())
