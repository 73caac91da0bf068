"""Exports a checkpoint of random weights in a process of its own and reports its peak memory and the artifact's size.

python -m benchmarks.export --config=configs/terdit_600m.py --output=export_600m.json
python -m benchmarks.export --config=configs/terdit_4b.py --ema_only --output=export_4b.json

The weights are uniform and none of them is a zero leaf, as a xavier start would be were every matrix trained. Memory
is counted above that of a process that has only started, and compared with the largest stored leaf.
"""

from collections.abc import Sequence
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from terdit_jax.checkpoints.manifest import write_manifest
from terdit_jax.checkpoints.writer import CheckpointWriter, save_arguments
from terdit_jax.config_file import define_config, read_config
from terdit_jax.data.synthetic import make_synthetic
from terdit_jax.errors import UserError, run_command
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.transformer import abstract_params, count_params, packed_bytes
from terdit_jax.paths import define_path
from terdit_jax.training.optimizer import make_optimizer
from terdit_jax.training.resume import describe_run
from terdit_jax.training.state import init_state

_CONFIG = define_config("A ternary configuration.")
_EMA_ONLY = flags.DEFINE_bool("ema_only", False, "A checkpoint of the averaged weights alone, not of a whole state.")
_SCRATCH = define_path("scratch", None, "Where checkpoint and artifacts go meanwhile; the system's own if none.")
_MEASURED = """
import atexit, runpy, sys
atexit.register(lambda: print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))))
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
_OUTPUT = define_path("output", "export.json", "JSON file.")


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    config = read_config(_CONFIG)
    if config is None:
        raise UserError("--config is missing, e.g. --config=configs/terdit_600m.py")
    model = DiTConfig.from_config(config)
    workdir = pathlib.Path(tempfile.mkdtemp(dir=_SCRATCH.value))
    try:
        _save(config, model, workdir)
        _report(config, model, workdir)
    finally:
        shutil.rmtree(workdir)


def _report(config, model: DiTConfig, workdir: pathlib.Path) -> None:
    idle, _ = _peak_bytes("terdit_jax.interop.exports")
    leaf = max(4 * leaf.size for leaf in jax.tree.leaves(abstract_params(model)))
    ternary = count_params(model)["ternary"]
    row = {"config": config.name, "checkpoint_bytes": _tree_bytes(workdir), "largest_leaf_bytes": leaf}
    for name, options in (("packed", ()), ("compressed", ("--compress",))):
        path = workdir / f"{name}.safetensors"
        command = ("terdit_jax.export", f"--workdir={workdir}", f"--output={path}", *options)
        peak, seconds = _peak_bytes(*command)
        size = path.stat().st_size
        row[name] = {
            "bytes": size,
            "against_packed_bytes": size / packed_bytes(model),
            "bits_a_code": 8 * (size - (packed_bytes(model) - ternary / 4)) / ternary,
            "peak_above_idle_bytes": peak - idle,
            "peak_against_bound": (peak - idle) / (1.5 * leaf + size),
            "seconds": seconds,
        }
        path.unlink()
    names = ("jax", "orbax-checkpoint", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names} | {"python": platform.python_version()}
    provenance = {"date": datetime.date.today().isoformat(), "cpus": os.cpu_count(), "versions": versions}
    pathlib.Path(_OUTPUT.value).write_text(json.dumps({**provenance, **row}, indent=1) + "\n")
    print(json.dumps(row, indent=1))


def _save(config, model: DiTConfig, workdir: pathlib.Path) -> None:
    """A checkpoint as training writes it; moments and both kinds of weights share the random arrays."""
    random = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        bound = (6 / sum(leaf.shape[-2:])) ** 0.5 if leaf.ndim > 1 else 1.0
        # Centred at one where there is no matrix: norms and alphas are never zero.
        values = random.random(leaf.shape, np.float32)
        values -= 0.5
        values *= 2 * bound
        values += 0.0 if leaf.ndim > 1 else 1.0
        return jax.device_put(values)

    run = describe_run(config, 1, make_synthetic(model.sample_shape, model.num_classes).metadata)
    params = jax.tree.map(draw, abstract_params(model))
    if not _EMA_ONLY.value:
        optimizer = make_optimizer(config.optimizer)
        rest = jax.eval_shape(lambda: init_state(model, optimizer, 0))
        same = {leaf.shape: leaf for leaf in jax.tree.leaves(params)}
        state = jax.tree.map(lambda leaf: same.get(leaf.shape, jnp.zeros(1)), rest)
        checkpoints = CheckpointWriter(workdir, config.checkpoint)
        checkpoints.save(state | {"params": params, "ema_params": params, "step": np.int32(1)}, run)
        checkpoints.close()
        return
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    handlers = {"ema_params": ocp.PyTreeCheckpointHandler(save_concurrent_gb=4), "run": ocp.JsonCheckpointHandler()}
    manager = ocp.CheckpointManager(workdir / "checkpoints", options=options, item_handlers=handlers)
    items = ocp.args.Composite(ema_params=save_arguments({"ema_params": params}), run=ocp.args.JsonSave(run))
    manager.save(1, args=items)
    manager.close()
    write_manifest(manager.directory / "1")


def _peak_bytes(module: str, *arguments: str) -> tuple[int, float]:
    """Runs a module as Python's -m does; its peak resident memory, and seconds.

    The process reads its own VmHWM: what the system tells a parent of a child counts the parent's memory too.
    """
    begin = time.perf_counter()
    command = [sys.executable, "-c", _MEASURED, module, *arguments]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{module} {' '.join(arguments)} failed: see the lines above")
    return 1024 * int(done.stdout.split()[-2]), time.perf_counter() - begin


def _tree_bytes(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    run_command(main)
