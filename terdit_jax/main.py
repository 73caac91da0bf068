"""Trains a model, or goes on with its training.

python -m terdit_jax.main --config=configs/digits.py --workdir=runs/digits

Any field is overridden with --config.section.field=value; the same command resumes a run that was stopped.
"""

from absl import flags

from terdit_jax.config_file import define_config
from terdit_jax.errors import parse_flags
from terdit_jax.paths import define_path

_CONFIG = define_config("File with get_config(), as configs/digits.py, or a run's config.json.")
_WORKDIR = define_path("workdir", None, "Where checkpoints, metrics and samples go; local or gs://.")
_HEARTBEAT = define_path(
    "heartbeat", None, "File that every process renews while it trains; WORKDIR/heartbeat.json, by the first, if none."
)
_PRINT_CONFIG = flags.DEFINE_bool(
    "print_config", False, "Print the configuration, the devices, parameters and memory, and start nothing."
)
_PROFILE = flags.DEFINE_string("profile", None, "FIRST:LAST: steps to trace for xprof, into WORKDIR/profile.")

parse_flags(__name__)  # answers --help and wrong flags before the imports below, which take seconds

from collections.abc import Callable, Sequence
import dataclasses
import math

from etils import epath
import jax
import numpy as np

from terdit_jax.config_file import read_config
from terdit_jax.diffusion.objective import make_objective
from terdit_jax.errors import UserError, going_on, run_command
from terdit_jax.evaluation.judge import DrawImages, make_proxy_judge
from terdit_jax.inference.decoding import to_images
from terdit_jax.inference.images import class_columns, make_grid, save_png, to_uint8
from terdit_jax.inference.sampling import check_settings, draw_all, make_draw
from terdit_jax.inference.teacher import abstract_teacher, load_teacher
from terdit_jax.interop.start import Source, open_source
from terdit_jax.model.transformer import packed_operands
from terdit_jax.parallel.processes import initialize_processes
from terdit_jax.programs import keep_programs
from terdit_jax.training.actions import DrawGrid
from terdit_jax.training.layout import GRIDS, grid_name
from terdit_jax.training.metrics import say
from terdit_jax.training.observers import check_heartbeat, parse_steps
from terdit_jax.training.overview import make_overview
from terdit_jax.training.run import train
from terdit_jax.training.setup import Setup, set_up

_DRAWN_AT_ONCE = 256


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    config = read_config(_CONFIG)
    if config:
        check_settings(config.sample, make_objective(config.diffusion, config.model.learn_sigma))
    if config and _PRINT_CONFIG.value:
        print(make_overview(config, abstract_teacher))
        return
    if config is None or not _WORKDIR.value:
        raise UserError("--config and --workdir are both needed, e.g. --config=configs/digits.py --workdir=runs/digits")
    # On CPUs, steps dispatched asynchronously fight over the cores: five times slower on two of them.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    profile = parse_steps(_PROFILE.value)
    if _HEARTBEAT.value:
        check_heartbeat(_HEARTBEAT.value)
    initialize_processes()
    keep_programs(config.train.compilation_cache, "config.train.compilation_cache")
    setup = set_up(config, _WORKDIR.value)
    load_start, draw = _starter(setup), _drawer(setup)
    setup = dataclasses.replace(setup, teacher=load_teacher(setup))
    judge = None
    if config.log.score_every:
        judge = make_proxy_judge(setup.dataset, config.log.score_samples, draw)
    train(setup, _grid_drawer(setup, draw), load_start, judge, _HEARTBEAT.value, profile)


def _starter(setup: Setup) -> Callable[[], dict] | None:
    """Loads the parameters that a run begins with, if they come from another model.

    Those of a new run are opened and checked at once; a run that goes on needs them only if no checkpoint is sound.
    """
    fields = setup.config.train
    if not fields.init_from:
        return None
    objective = setup.objective.name

    def opened() -> Source:
        source = open_source(fields.init_from, setup.model, objective, keep_labels=fields.init_labels)
        if fields.soft_start_steps and not source.ternarises:
            raise UserError(
                f"config.train.soft_start_steps={fields.soft_start_steps}: begins at master weights, and "
                f"config.train.init_from={fields.init_from} is ternary already; give 0"
            )
        return source

    early = None if (setup.workdir / "checkpoints").exists() else opened()

    def load() -> dict:
        source = early or opened()
        say(str(source))
        return source.params(setup.config.seed)

    return load


def _drawer(setup: Setup) -> DrawImages:
    """Draws images from parameters as the run's `config.sample` has it. Its noise is keyed by the seed and the number
    of the image, never taken from a stream that training draws from as well."""
    sample, run_blocks = setup.config.sample, setup.plan.run_blocks
    draw = make_draw(setup.model, setup.objective, sample, run_blocks=run_blocks)
    operands = jax.jit(lambda params: packed_operands(setup.model, params))

    def draw_images(params: dict, labels: np.ndarray) -> np.ndarray:
        with jax.set_mesh(setup.mesh):
            packed = operands(params)
        seed, report = setup.config.seed, lambda done: None
        latents = draw_all(draw, packed, labels, setup.mesh, seed, batch_size=_DRAWN_AT_ONCE, report=report)
        return to_images(latents, setup.dataset.metadata.latent_scale)

    return draw_images


def _grid_drawer(setup: Setup, draw: DrawImages) -> DrawGrid:
    """Draws a column a class: of all classes, or of as many, evenly spaced, as make the grid a square."""
    count, names = setup.config.sample.num_images, setup.dataset.metadata.class_names
    columns = class_columns(count, len(names)) or math.ceil(math.sqrt(count))
    labels = np.arange(count) % columns * max(1, len(names) // columns) % len(names)
    titles = [names[label] for label in labels[:columns]]

    def draw_grid(step: int, params: dict) -> tuple[epath.Path, np.ndarray]:
        grid = make_grid(to_uint8(draw(params, labels)), columns, titles)
        path = setup.workdir / GRIDS / grid_name(step)
        if jax.process_index() == 0:
            with going_on("no grid"):  # a disk without room is no reason to stop training
                save_png(path, grid)
        return path, grid

    return draw_grid


if __name__ == "__main__":
    run_command(main)
