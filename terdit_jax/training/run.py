"""A training run from configuration to last checkpoint: begins or resumes, trains, and closes what it opened.

`loop` trains. What a configuration must satisfy belongs to `setup`.
"""

from collections.abc import Callable, Iterator
import contextlib
import shlex
from typing import Any

from absl import logging
from etils import epath
import jax

from terdit_jax.checkpoints import disk
from terdit_jax.checkpoints.best import Judge, open_best
from terdit_jax.checkpoints.lock import WorkdirLock
from terdit_jax.checkpoints.writer import CheckpointWriter
from terdit_jax.errors import UserError, end_if_one_of_several
from terdit_jax.files import refusing, write_json
from terdit_jax.reproducible import pinned
from terdit_jax.training.actions import Actions, DrawGrid
from terdit_jax.training.layout import CONFIG_FILE
from terdit_jax.training.loop import run_steps
from terdit_jax.training.metrics import MetricsWriter, say
from terdit_jax.training.observers import Goodput, Observers, Steps
from terdit_jax.training.overview import introduction
from terdit_jax.training.resume import check_finite, check_resumable
from terdit_jax.training.setup import Setup
from terdit_jax.training.state import State, abstract_state, make_state


@pinned()
def train(
    setup: Setup,
    draw_grid: DrawGrid,
    load_start: Callable[[], dict] | None = None,
    judge: Judge | None = None,
    heartbeat: epath.PathLike | None = None,
    profile: Steps | None = None,
) -> None:
    """Runs, or continues, the training that `setup` describes.

    Args:
      setup: of `set_up`.
      draw_grid: draws the sample grids.
      load_start: host parameters for a run that begins with those of another model; fresh ones if left out.
      judge: judges the averaged weights every `log.score_every` steps; never if left out.
      heartbeat: the file that every process renews; WORKDIR/heartbeat.json, renewed by the first, if left out.
      profile: the steps to trace; none if left out.

    Raises:
      UserError: a workdir of another run or in use by one, too many non-finite steps in a row, or a last state that
        could not be saved.
    """
    config, workdir, num_steps = setup.config, setup.workdir, setup.config.train.num_steps
    with refusing(workdir, "--workdir"):
        workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as opened, _ending_together():  # closed from the last to the first
        opened.enter_context(WorkdirLock(workdir))
        observers = Observers(workdir, heartbeat, profile)
        checkpoints = CheckpointWriter(workdir, config.checkpoint)
        before = checkpoints.newest_run() or {}
        state = _resume(setup, before, checkpoints, observers.goodput) or _begin(setup, load_start)
        start = step = int(state["step"])
        _introduce(setup, start)
        if start >= num_steps:
            checkpoints.close()
        else:
            opened.enter_context(observers.watching(start))
            writer = None
            if jax.process_index() == 0:
                _write_config(setup)
                writer = MetricsWriter(workdir, start, config, lambda: checkpoints.signed)
                opened.callback(writer.close)  # after the last save, which may have no time to wait for trackers
            opened.callback(checkpoints.close)
            opened.callback(observers.goodput.now, "save")
            best = open_best(workdir, start) if judge else None
            if best:
                opened.callback(best.close)
            teacher = setup.teacher.fingerprint if setup.teacher else before.get("teacher", "")
            actions = Actions(setup, observers, writer, checkpoints, draw_grid, judge, best, teacher)
            opened.callback(actions.bar.close)
            step = run_steps(setup, state, actions, observers)
            observers.complete = step == num_steps
    if start >= num_steps:
        say(f"{workdir} is done: it has trained {start:,} of {num_steps:,} steps")
    else:
        say(observers.goodput.summary())
    if step < num_steps:
        name = observers.interruption.name
        say(f"stopped by {name} at step {step:,}, state saved: the same command goes on from there")
    else:
        _say_what_to_do_next(setup)


def _resume(setup: Setup, before: dict[str, Any], checkpoints: CheckpointWriter, goodput: Goodput) -> State | None:
    """The state to go on from, or None for a run that has saved nothing; `before` describes its newest checkpoint."""
    if before:
        fingerprint, workdir = setup.dataset.metadata.fingerprint, str(setup.workdir)
        for change in check_resumable(before, setup.config, fingerprint, workdir, setup.teacher):
            say(f"continuing with a changed configuration: {change}")
    with goodput.spent("restore"):
        taught = bool(setup.config.train.teacher)
        restored = checkpoints.restore(abstract_state(setup.model, setup.optimizer, setup.mesh, taught=taught))
        jax.block_until_ready(restored)
    if restored is None:
        return None
    state = restored[0]
    name = f"checkpoint {int(state['step'])} of {setup.workdir}"
    check_finite(state, name, "move it out of checkpoints/ to go on from the one before it")
    return state


def _begin(setup: Setup, load_start: Callable[[], dict] | None) -> State:
    params = load_start() if load_start else None
    taught = bool(setup.config.train.teacher)
    return make_state(setup.model, setup.optimizer, setup.mesh, setup.config.seed, params, taught=taught)


@contextlib.contextmanager
def _ending_together() -> Iterator[None]:
    """Ends this process at once if one of several fails: closing what is open would wait for the others."""
    try:
        yield
    except UserError:
        raise
    except Exception:
        end_if_one_of_several()
        raise


def _write_config(setup: Setup) -> None:
    path = setup.workdir / CONFIG_FILE
    try:
        write_json(path, setup.config.to_dict(), indent=1)
    except OSError as error:  # every checkpoint holds it too
        logging.error("%s cannot be written: %s", path, disk.reason(error))


def _introduce(setup: Setup, start: int) -> None:
    for line in introduction(setup.config, setup.model, setup.mesh, setup.plan, setup.teacher):
        say(line)
    say(f"{'resuming at' if start else 'starting at'} step {start:,} in {setup.workdir}")


def _say_what_to_do_next(setup: Setup) -> None:
    say(f"checkpoints, metrics.jsonl and samples are in {setup.workdir}")
    labels = ",".join(map(str, range(min(3, setup.model.num_classes))))
    command = ["python", "-m", "terdit_jax.sample", f"--model={setup.workdir}", f"--labels={labels}"]
    say("next: " + shlex.join([*command, "--output=grid.png"]))
