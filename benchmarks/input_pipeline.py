"""Training speed fed from stored records beside the same steps on synthetic latents, which cost the host nothing.

python -m benchmarks.input_pipeline --config=configs/terdit_600m.py --batch_size=256 --output=input_pipeline.json

Both go through the run's own loop of batches and step, without logging and saving, in turns within one process; the
figure is the median turn of each. Stored records are random latents with their mirrors in ArrayRecord shards.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import datetime
import json
import os
import pathlib
import sys
import tempfile
import time

from absl import flags
import jax
import numpy as np

from benchmarks.random_latents import WRITER_OPTIONS, write_dataset
from terdit_jax.config_file import define_config, read_config
from terdit_jax.data.reader import open_dataset
from terdit_jax.errors import UserError, run_command
from terdit_jax.paths import define_path
from terdit_jax.training.examples import device_batches
from terdit_jax.training.setup import set_up
from terdit_jax.training.state import make_state
from terdit_jax.training.step import make_train_step
from terdit_jax.versions import versions

_CONFIG = define_config("The model and its data.* settings, as of terdit_jax.main.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Batch size; the config's own if not given.", lower_bound=1)
_RECORDS = flags.DEFINE_integer("records", 20_480, "Stored records.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 20, "Steps a turn.", lower_bound=1)
_TURNS = flags.DEFINE_integer("turns", 5, "Turns of either kind.", lower_bound=1)
_OUTPUT = define_path("output", "input_pipeline.json", "JSON file.")


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    config = read_config(_CONFIG)
    if config is None:
        raise UserError("--config is missing, e.g. --config=configs/terdit_600m.py")
    batch_size = _BATCH_SIZE.value or config.train.batch_size
    config = config.with_fields({"train.batch_size": batch_size, "data.synthetic": True})
    with tempfile.TemporaryDirectory() as scratch:
        synthetic = set_up(config, pathlib.Path(scratch) / "run")
        path = pathlib.Path(scratch) / "data"
        write_dataset(path, synthetic.model.sample_shape, _RECORDS.value, 8, WRITER_OPTIONS["zstd"])
        stored = dataclasses.replace(synthetic, dataset=open_dataset(path))
        state = make_state(synthetic.model, synthetic.optimizer, synthetic.mesh, config.seed)
        run = synthetic
        step = make_train_step(config, run.model, run.objective, run.optimizer, run.mesh, 1.0, run.plan)
        feeds = {"synthetic": device_batches(synthetic, 0), "stored": device_batches(stored, 0)}
        rates: dict[str, list[float]] = {name: [] for name in feeds}
        for feed in feeds.values():  # compiles, and fills both prefetch buffers
            state = _run(step, state, feed)[0]
        for _ in range(_TURNS.value):
            for name, feed in feeds.items():
                state, seconds = _run(step, state, feed)
                rates[name].append(_STEPS.value * config.train.batch_size / seconds)
        # How fast the records could have come: no step between them.
        begin = time.perf_counter()
        jax.block_until_ready([next(feeds["stored"])["label"] for _ in range(_STEPS.value)])
        unused = _STEPS.value * config.train.batch_size / (time.perf_counter() - begin)
    medians = {name: float(np.median(values)) for name, values in rates.items()}
    packages = ("jax", "jaxlib", "flax", "optax", "grain", "array_record")
    content = {
        "command": " ".join(["python -m benchmarks.input_pipeline", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "versions": versions(*packages),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "config": config.name,
        "batch_size": config.train.batch_size,
        "remat": config.compute.remat,
        "images_per_second": medians,
        "turns": rates,
        "stored_over_synthetic": medians["stored"] / medians["synthetic"],
        "records_per_second_without_steps": unused,
    }
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(content, indent=1) + "\n")
    print(
        f"{config.name}, batch {config.train.batch_size}: {medians['stored']:.1f} images/s from stored records, "
        f"{medians['synthetic']:.1f} on synthetic latents: {content['stored_over_synthetic']:.2%}; "
        f"records alone: {unused:,.0f}/s"
    )


def _run(step, state: dict, feed: Iterator) -> tuple[dict, float]:
    """The state after a turn, and its seconds."""
    begin = time.perf_counter()
    for _ in range(_STEPS.value):
        state = step(state, next(feed))
    jax.block_until_ready(state)
    return state, time.perf_counter() - begin


if __name__ == "__main__":
    run_command(main)
