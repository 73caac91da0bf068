"""Device memory of a packed model: held once loaded, and at most while one picture is drawn with guidance.

python -m benchmarks.memory --configs=configs/terdit_600m.py,configs/terdit_4b.py --output=memory.json

Weights are random codes. Each model is drawn from twice, each time in a process of its own: the first fills the
compilation cache, the second is measured, so that autotuning's scratch memory does not count. The figures come
from the allocator; the driver's own context comes on top.
"""

from collections.abc import Iterator, Sequence
import datetime
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import flags
import jax
import numpy as np

from terdit_jax.config import freeze
from terdit_jax.config_file import load_config
from terdit_jax.data.synthetic import make_synthetic
from terdit_jax.errors import UserError, run_command
from terdit_jax.inference.runtime import load_model
from terdit_jax.interop.artifact import write_artifact
from terdit_jax.interop.description import describe_run as describe
from terdit_jax.interop.published import Layout, published_layout
from terdit_jax.model.config import DiTConfig
from terdit_jax.paths import define_path
from terdit_jax.training.resume import describe_run
from terdit_jax.versions import versions

_CONFIGS = flags.DEFINE_list("configs", None, "Configuration files of ternary models.")
_NUM_STEPS = flags.DEFINE_integer("num_steps", 250, "Denoising steps.", lower_bound=1)
_OUTPUT = define_path("output", "memory.json", "JSON file.")
_ONE = flags.DEFINE_string("one", None, "One artifact, in this process; prints JSON.")


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    if _ONE.value:
        print(json.dumps(measure(_ONE.value)))
        return
    if not _CONFIGS.value:
        raise UserError("--configs is missing, e.g. --configs=configs/terdit_600m.py")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for path in _CONFIGS.value:
            artifact = pathlib.Path(scratch) / f"{pathlib.Path(path).stem}.safetensors"
            write_random(path, artifact)
            rows.append([_in_own_process(artifact, scratch) for _ in range(2)][-1])
    date = datetime.date.today().isoformat()
    content = {"date": date, "versions": versions("jax", "flax", "numpy"), "rows": rows}
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(content, indent=1) + "\n")
    print(f"{'model':<16}{'file':>10}{'held':>10}{'peak':>10}{'ms a step':>12}")
    for row in rows:
        sizes = "".join(f"{row[name] / 1e9:>7.3f} GB" for name in ("file_bytes", "held_bytes", "peak_bytes"))
        print(f"{row['model']:<16}{sizes}{row['step_ms']:>12.2f}")


def write_random(config_path: str, artifact: pathlib.Path) -> None:
    """An artifact of a configuration with random codes and floats."""
    config = freeze(load_config(config_path))
    model = DiTConfig.from_config(config)
    layout = published_layout(model, packed=True)
    run = describe_run(config, 0, make_synthetic(model.sample_shape, model.num_classes).metadata)
    write_artifact(artifact, describe(run, ema=True), layout, _random_tensors(layout))


def _random_tensors(layout: Layout) -> Iterator[tuple[str, np.ndarray]]:
    random = np.random.default_rng(0)
    bytes_of_codes = np.array([b for b in range(256) if not b & b >> 1 & 0b01010101], np.uint8)  # no bit pair 11
    for name, (dtype, shape) in layout.items():
        if dtype == np.uint8:
            yield name, bytes_of_codes[random.integers(0, len(bytes_of_codes), shape, np.uint8)]
        else:
            yield name, random.standard_normal(shape, np.float32) * np.float32(0.02)


def measure(artifact: str) -> dict:
    """Held and peak bytes of the first device, and milliseconds a guided step of one picture."""
    model = load_model(artifact)
    (device,) = model.mesh.devices.flat
    held = (device.memory_stats() or {}).get("bytes_in_use", 0)
    labels = np.array([1])
    model.draw(labels, num_steps=_NUM_STEPS.value, cfg_scale=4.0)
    begin = time.perf_counter()
    model.draw(labels, num_steps=_NUM_STEPS.value, cfg_scale=4.0)
    seconds = time.perf_counter() - begin
    return {
        "model": model.description.name,
        "device": device.device_kind,
        "file_bytes": os.path.getsize(artifact),
        "held_bytes": held,
        "operand_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.operands)),
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use", 0),
        "step_ms": 1e3 * seconds / _NUM_STEPS.value,
    }


def _in_own_process(artifact: pathlib.Path, scratch: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.memory", f"--one={artifact}", f"--num_steps={_NUM_STEPS.value}"]
    cache = {"JAX_COMPILATION_CACHE_DIR": scratch, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(command, env=os.environ | cache, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{artifact.name} failed: see the lines above")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    run_command(main)
