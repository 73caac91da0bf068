"""Ways to run: what divides, what should fit, what is ranked first."""

import pytest

from terdit_jax.aot.suggest import describe_suggestions, find_candidates, suggest
from terdit_jax.aot.topology import parse_topology
from terdit_jax.config import RunConfig
from terdit_jax.errors import UserError
from tests.runs import SHRUNKEN
from tests.test_compile import shipped


def shrunken(**fields):
    return shipped("digits", SHRUNKEN | fields)


@pytest.fixture(scope="module")
def small():
    return list(find_candidates(shrunken(), parse_topology("v5e:2x4")))


def test_only_what_divides_is_a_candidate(small):
    meshes = {candidate.mesh for candidate in small}
    assert all(data * fsdp * tensor == 8 for data, fsdp, tensor in meshes)
    assert (8, 1, 1) in meshes and (1, 8, 1) in meshes and (2, 2, 2) in meshes
    assert (1, 1, 8) not in meshes, "eight does not divide four heads"
    assert {c.accumulation for c in small if c.mesh == (8, 1, 1)} == {1, 2}, "sixteen images over eight chips"


def test_estimates_know_what_costs_what(small):
    of = {(c.mesh, c.remat, c.accumulation): c for c in small}
    flat = (8, 1, 1)
    assert of[flat, "none", 1].memory > of[flat, "dots", 1].memory > of[flat, "block", 1].memory
    assert of[flat, "block", 1].seconds > of[flat, "none", 1].seconds
    assert of[(1, 8, 1), "none", 1].memory < of[flat, "none", 1].memory


def report(seconds):
    roofline = dict.fromkeys(("overlapped", "bound", "mfu_bound", "images_per_second", "hours"), 1.0)
    return {"memory": {"total": 2**30}, "sent": 5, "roofline": roofline | {"in_turn": seconds}}


def test_what_is_compiled_is_ranked_by_what_the_compiler_says():
    seconds = iter([3.0, None, 1.0, 2.0])
    tried = []

    def compile_one(config):
        tried.append((vars(config.mesh), config.compute.remat, config.train.accumulation_steps))
        taken = next(seconds)
        if taken is None:
            raise UserError("digits does not fit")
        return report(taken)

    result = suggest(shrunken(), parse_topology("v5e:2x4"), compile_one, tries=4)
    assert len(set(map(str, tried))) == 4
    assert [row.get("in_turn") for row in result["tried"]] == [1.0, 2.0, 3.0, None]
    assert [row["fits"] for row in result["tried"]] == [True, True, True, False]
    lines = describe_suggestions(result).splitlines()
    assert len(lines) == 5 and "1000.0 ms in turn" in lines[1] and lines[-1].endswith("digits does not fit")


def large(**fields):
    return RunConfig().with_fields({name.replace("__", "."): value for name, value in fields.items()})


@pytest.mark.parametrize(
    ("config", "topology", "message"),
    [
        (large(), "cpu:8", "the rates of CPUs are not known"),
        (shrunken(train__batch_size=7), "v5e:2x4", "batch size 7 divides over no mesh of 8 chips"),
        (large(model__hidden_size=8192, model__depth=64), "v5e:2x4", "does not fit v5e:2x4: at least .* GiB a chip"),
    ],
)
def test_nothing_to_suggest_is_one_line(config, topology, message):
    with pytest.raises(UserError, match=message):
        suggest(config, parse_topology(topology), lambda config: report(1.0), tries=1)
