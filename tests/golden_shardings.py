"""How terdit_4b's state and operands lie on machines, as tests/golden/shardings has it; run as a program, writes it.

python -m tests.golden_shardings
"""

import importlib.util
import json
import math
from pathlib import Path

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from terdit_jax.config import freeze
from terdit_jax.fast.plan import FastPlan
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.transformer import abstract_params
from terdit_jax.parallel.mesh import AXES, mesh_shape
from terdit_jax.parallel.sharding import partition_spec, path_name
from terdit_jax.training.optimizer import make_optimizer
from terdit_jax.training.state import init_state

FOLDER = Path(__file__).parent / "golden" / "shardings"
CONFIG = Path(__file__).parents[1] / "configs" / "terdit_4b.py"
CHIPS = {"v5e:16x16": 256, "v5p:4x4x4": 64, "v6e:16x16": 256, "h200:8": 8}


def golden_file(machine: str) -> Path:
    return FOLDER / f"{machine.replace(':', '_')}.json"


def describe(machine: str) -> dict:
    """{"mesh", "bytes_per_chip" of state and operands, "leaves": {path: "type (spec) bytes"}} of the shipped config."""
    spec = importlib.util.spec_from_file_location("config", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = freeze(module.get_config())
    model, optimizer = DiTConfig.from_config(config), make_optimizer(config.optimizer)
    shape = mesh_shape(config.mesh, CHIPS[machine])
    mesh = AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    state = jax.eval_shape(lambda: init_state(model, optimizer, 0))
    plan = FastPlan(gather="codes", rings=(mesh.shape["fsdp"],))
    with jax.sharding.use_abstract_mesh(mesh):
        operands = jax.eval_shape(lambda params: plan.make_operands(model, params), abstract_params(model))
    described = {"mesh": dict(mesh.shape), "bytes_per_chip": {}, "leaves": {}}
    for name, tree in (("state", state), ("operands", operands)):
        total = 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            path = f"{name}/{path_name(path)}"
            if path.endswith("/sink"):
                continue  # zeros that no program holds
            spec = partition_spec(path, leaf.shape, mesh)
            size = _bytes(leaf, spec, mesh)
            total += size
            described["leaves"][path] = f"{leaf.dtype}{list(leaf.shape)} ({', '.join(map(str, spec))}) {size}"
        described["bytes_per_chip"][name] = total
    return described


def _bytes(leaf: jax.ShapeDtypeStruct, spec: PartitionSpec, mesh: AbstractMesh) -> int:
    parts = math.prod(mesh.shape[axis] for axis in spec if axis)
    return leaf.size * leaf.dtype.itemsize // parts


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for machine in CHIPS:
        golden_file(machine).write_text(json.dumps(describe(machine), indent=0) + "\n")
