"""The training run from configuration to last checkpoint: set up or resume, step, log, evaluate, save.

The mathematics is `step`'s; this module decides when things happen and keeps the device busy while they do.
"""

from collections.abc import Callable
import contextlib
from functools import partial
import shlex

from absl import logging
from clu import parameter_overview
from etils import epath
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from terdit_jax.checkpoints import disk
from terdit_jax.checkpoints.best import FOLDER, Judge, open_best
from terdit_jax.checkpoints.lock import WorkdirLock
from terdit_jax.checkpoints.writer import CheckpointWriter
from terdit_jax.data.reader import heldout_batches
from terdit_jax.errors import UserError, end_if_one_of_several, going_on
from terdit_jax.files import refusing, write_json
from terdit_jax.model.transformer import abstract_params, activation_rms, count_params, make_operands, packed_bytes
from terdit_jax.parallel.chips import peak_flops
from terdit_jax.parallel.sharding import batch_shards, local_block
from terdit_jax.reproducible import pinned
from terdit_jax.training.batches import device_batches, to_devices
from terdit_jax.training.examples import example_keys, make_examples
from terdit_jax.training.heldout import make_heldout_loss
from terdit_jax.training.interruption import Interruption
from terdit_jax.training.metrics import MetricsWriter, Stopwatch, format_duration
from terdit_jax.training.observers import Observers
from terdit_jax.training.optimizer import learning_rate_schedule
from terdit_jax.training.profile import FOLDER as PROFILE_FOLDER
from terdit_jax.training.profile import Steps
from terdit_jax.training.resume import check_resumable, describe_run
from terdit_jax.training.setup import Setup
from terdit_jax.training.state import State, abstract_state, check_finite, make_state, packed_codes
from terdit_jax.training.step import make_train_step, on_mesh
from terdit_jax.training.window import code_statistics, empty_sums, means

_LOWER_RATE = "go on from the last checkpoint with a lower config.optimizer.learning_rate or clip_norm"

# Called with (step, EMA parameters); returns the path of the grid it wrote and the grid, (H, W, 3) uint8.
DrawGrid = Callable[[int, dict], tuple[str, np.ndarray]]


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
    with refusing(setup.workdir, "--workdir"):
        setup.workdir.mkdir(parents=True, exist_ok=True)
    with WorkdirLock(setup.workdir):
        _train(setup, draw_grid, load_start, judge, Observers(setup.workdir, heartbeat, profile))


def _train(
    setup: Setup,
    draw_grid: DrawGrid,
    load_start: Callable[[], dict] | None,
    judge: Judge | None,
    observers: Observers,
) -> None:
    config, goodput = setup.config, observers.goodput
    checkpoints = CheckpointWriter(setup.workdir, config.checkpoint)
    fingerprint = setup.dataset.metadata.fingerprint
    if run := checkpoints.newest_run():
        for change in check_resumable(run, config, fingerprint, str(setup.workdir)):
            _say(f"continuing with a changed configuration: {change}")
    target = abstract_state(setup.model, setup.optimizer, setup.mesh)
    with goodput.spent("restore"):
        restored = checkpoints.restore(target)
        jax.block_until_ready(restored)
    if restored:
        state = restored[0]
        name = f"checkpoint {int(state['step'])} of {setup.workdir}"
        check_finite(state, name, "move it out of checkpoints/ to go on from the one before it")
    else:
        params = load_start() if load_start else None
        if load_start:
            _say(f"weights from {config.train.init_from}")
        state = make_state(setup.model, setup.optimizer, setup.mesh, config.seed, params)
    start = int(state["step"])
    _introduce(setup, start)
    if start >= config.train.num_steps:
        _say(f"{setup.workdir} is done: it has trained {start:,} of {config.train.num_steps:,} steps")
        checkpoints.close()
        _close(setup)
        return
    goodput.resumed(start)
    observers.beat(start, now=True)
    if _is_first():
        _write_config(setup)
    with Interruption() as interruption:
        run = _Run(setup, start, draw_grid, checkpoints, judge, observers)
        try:
            step = run.train(state, start, interruption)
        except UserError:
            raise
        except Exception:
            end_if_one_of_several()
            raise
        finally:
            run.close()
    _say(goodput.summary())
    if step < config.train.num_steps:
        _say(f"stopped by {interruption.name} at step {step:,}, state saved: the same command goes on from there")
    else:
        _close(setup)


class _Run:
    """The compiled functions and open files of one run, and what happens at which step."""

    def __init__(
        self,
        setup: Setup,
        start: int,
        draw_grid: DrawGrid,
        checkpoints: CheckpointWriter,
        judge: Judge | None,
        observers: Observers,
    ):
        config, metadata = setup.config, setup.dataset.metadata
        self.setup, self.draw_grid, self.checkpoints, self.judge = setup, draw_grid, checkpoints, judge
        self.observers, self.goodput = observers, observers.goodput
        self.complete, self.spiked = False, 0
        self.best = open_best(setup.workdir, start) if judge else None
        common = (setup.schedule, setup.mesh, metadata.latent_scale)
        self.train_step = make_train_step(config, setup.model, common[0], setup.optimizer, *common[1:])
        self.heldout_loss = make_heldout_loss(config, setup.model, *common)
        self.summarize = on_mesh(setup.mesh, jax.jit(partial(_summarize, setup), donate_argnums=0))
        self.learning_rate = learning_rate_schedule(config.optimizer)
        self.writer = MetricsWriter(setup.workdir, start, tensorboard=config.log.tensorboard) if _is_first() else None
        self.stopwatch = Stopwatch(start)
        self.summaries = 0
        self.pending: tuple[int, dict[str, Array]] | None = None

    def train(self, state: State, start: int, interruption: Interruption) -> int:
        """Steps until the run is complete or interrupted, and saves; returns the step it has reached."""
        config, step = self.setup.config, start
        profiler = self.observers.profiler
        batches = device_batches(self.setup, start)
        while True:
            with self.goodput.spent("input"):
                batch = next(batches)
            if step == start:
                self.goodput.now("compile")
            profiler.before(step + 1)
            with jax.transfer_guard("disallow"):
                state = self.train_step(state, batch)
            step += 1
            if step == start + 1:
                jax.block_until_ready(state)
                self.stopwatch.restart(step)  # the first step compiles
                self.goodput.now("train")
            self.observers.beat(step)
            if profiler.after(step, state):
                _say(f"step {step:,}  trace in {self.setup.workdir / PROFILE_FOLDER}")
            self.flush()  # the log of the step before: this step is already running
            last = step == config.train.num_steps
            if step % config.log.every == 0 or last:
                first = self.summaries == 0
                self.summaries += 1
                with self.stopwatch.paused(), self.goodput.spent("compile" if first else "evaluate"):
                    figures, state = self.summarize(state, batch)
                self.pending = step, figures
            if _due(step, config.log.heldout_every) or last and config.log.heldout_every:
                with self.goodput.spent("evaluate"):
                    self.evaluate(state, step)
            if _due(step, config.log.samples_every) or last and config.log.samples_every:
                with self.goodput.spent("evaluate"):
                    self.sample(state, step)
            if self.judge and (last or _due(step, config.log.score_every)):
                with self.goodput.spent("evaluate"):
                    self.score(state, step)
            stop = last or interruption.reached(step)
            if stop or _due(step, config.checkpoint.every):
                self.save(state, step)
            if stop:
                break
        self.complete = last
        return step

    def close(self) -> None:
        """Releases what the run has opened, each whatever becomes of the others; a save under way is finished."""
        with contextlib.ExitStack() as ending:  # from the last to the first
            if self.writer:
                ending.callback(lambda: self.goodput.write(complete=self.complete))
            ending.callback(self._close_checkpoints)
            if self.writer:
                ending.callback(self.writer.close)
            if self.best:
                ending.callback(self.best.close)
            ending.callback(self.observers.profiler.close)

    def _close_checkpoints(self) -> None:
        complete, self.complete = self.complete, False
        with self.goodput.spent("save"):
            self.checkpoints.close()
        self.complete = complete

    def flush(self) -> None:
        """Fetches and writes the figures that are waiting, if any."""
        if self.pending is None:
            return
        step, figures = self.pending
        self.pending = None
        figures = {name: float(value) for name, value in jax.device_get(figures).items()}
        consecutive, skipped = int(figures.pop("skipped_consecutive")), int(figures["skipped_steps"])
        spiked = int(figures["spiked_steps"])
        figures["learning_rate"] = float(self.learning_rate(step - 1 - skipped - spiked))
        timing = self._timing(step) | self.goodput.figures()
        if self.writer:
            self.writer.write(step, figures, timing)
            self.goodput.write()
            self._report(step, figures, timing)
        if skipped:
            logging.warning("%d non-finite updates have been skipped so far", skipped)
        if spiked > self.spiked:
            self.spiked = spiked
            logging.warning("%d updates have been skipped as loss spikes so far", spiked)
        if consecutive >= self.setup.config.train.max_nonfinite_steps:
            raise UserError(
                f"loss or gradient has been non-finite at every step from {step - consecutive + 1} to {step}: "
                f"{_LOWER_RATE}"
            )

    def _timing(self, step: int) -> dict[str, float]:
        config, model = self.setup.config, self.setup.model
        rate = self.stopwatch.lap(step)
        timing = {"images_per_second": rate * config.train.batch_size}
        if rate:
            timing["eta_seconds"] = (config.train.num_steps - step) / rate
        if peak := peak_flops(jax.devices()[0].device_kind):
            # Training is counted as three forward passes; rematerialisation is not useful work.
            flops = 3 * model.flops_per_image() * timing["images_per_second"]
            timing["mfu"] = flops / (peak * jax.device_count())
        return timing

    def _report(self, step: int, figures: dict[str, float], timing: dict[str, float]) -> None:
        parts = [
            f"step {step:,}/{self.setup.config.train.num_steps:,}",
            f"loss {figures['loss']:.4f}",
            f"{timing['images_per_second']:,.1f} images/s",
        ]
        if "mfu" in timing:
            parts.append(f"MFU {timing['mfu']:.1%}")
        if "eta_seconds" in timing:
            parts.append(f"{format_duration(timing['eta_seconds'])} left")
        _say("  ".join(parts))

    def evaluate(self, state: State, step: int) -> None:
        """Writes the held-out loss of raw and EMA weights."""
        self.flush()
        config, mesh = self.setup.config, self.setup.mesh
        # As many examples as training has in memory at once.
        batch_size = config.train.batch_size // config.train.accumulation_steps
        num_batches = config.log.heldout_batches * config.train.accumulation_steps
        block, num_blocks = local_block(mesh, batch_size)
        totals = {"heldout_loss": 0.0, "heldout_loss_ema": 0.0}
        batches = heldout_batches(
            self.setup.dataset,
            batch_size=batch_size,
            num_batches=num_batches,
            process_index=block,
            process_count=num_blocks,
        )
        for number, batch in enumerate(batches):
            batch = to_devices(mesh, batch, batch_size)
            for name, weights in (("heldout_loss", "params"), ("heldout_loss_ema", "ema_params")):
                totals[name] += float(self.heldout_loss(state[weights], batch, jnp.int32(number)))
        figures = {name: total / num_batches for name, total in totals.items()}
        if not np.isfinite(list(figures.values())).all():
            logging.error("step %d: THE HELD-OUT LOSS IS NOT FINITE", step)
        if self.writer:
            self.writer.write(step, figures)
            _say(f"step {step:,}  held-out loss {figures['heldout_loss']:.4f}, EMA {figures['heldout_loss_ema']:.4f}")
        self.stopwatch.restart(step)

    def sample(self, state: State, step: int) -> None:
        """Draws and writes a grid from the EMA weights."""
        self.flush()
        with going_on(f"step {step}: NO SAMPLES"):
            path, grid = self.draw_grid(step, state["ema_params"])
            if self.writer:
                self.writer.write_picture(step, "samples", grid)
                _say(f"step {step:,}  samples in {path}")
        self.stopwatch.restart(step)

    def score(self, state: State, step: int) -> None:
        """Writes what samples of the EMA weights are worth, and keeps the weights if none were worth more."""
        self.flush()
        with going_on(f"step {step}: NO SCORES"):
            judgement = self.judge(step, state["ema_params"])
            if self.writer:
                self.writer.write(step, judgement.figures)
                written = ", ".join(f"{name} {value:.4g}" for name, value in judgement.figures.items())
                _say(f"step {step:,}  {written}")
            run = describe_run(self.setup.config, step, self.setup.dataset.metadata)
            if self.best and self.best.offer(state["ema_params"], run, judgement.loss):
                _say(f"step {step:,}  the best so far: kept in {self.setup.workdir / FOLDER}")
        self.stopwatch.restart(step)

    def save(self, state: State, step: int) -> None:
        """Saves, behind everything that has been logged: a resumed run goes on where the metrics file ends.

        Raises:
          UserError: a state that no run could go on from; it must not take the place of one that is sound.
        """
        self.flush()
        check_finite(state, f"the state after step {step}", f"it is not saved; {_LOWER_RATE}")
        with self.goodput.spent("save"):
            self.checkpoints.save(state, describe_run(self.setup.config, step, self.setup.dataset.metadata))
        self.goodput.saved(step)
        self.stopwatch.restart(step)


def _summarize(setup: Setup, state: State, batch: dict[str, Array]) -> tuple[dict[str, Array], State]:
    """The figures of the window that ends here, and the state with an empty window."""
    config, model, window = setup.config, setup.model, state["window"]
    codes = packed_codes(model, state["params"])
    figures = means(window["sums"]) | code_statistics(window["codes"], codes)
    figures |= {"skipped_steps": state["skipped"]["total"], "skipped_consecutive": state["skipped"]["consecutive"]}
    figures |= {"spiked_steps": state["spikes"]["total"]}
    few = batch_shards(setup.mesh)  # one example a device is enough for a root mean square over all its tokens
    examples = make_examples(
        jax.tree.map(lambda leaf: leaf[:few], batch),
        example_keys(config.seed, state["step"], jnp.arange(few, dtype=jnp.int32)),
        setup.schedule,
        latent_scale=setup.dataset.metadata.latent_scale,
        num_classes=model.num_classes,
        class_dropout_prob=0.0,
    )
    rms = activation_rms(model, make_operands(model, state["params"]), examples["x_t"], examples["t"], examples["y"])
    figures |= {f"rms/{kind}": jnp.sqrt(jnp.mean(jnp.square(values))) for kind, values in rms.items()}
    return figures, state | {"window": {"sums": empty_sums(), "codes": codes}}


def _write_config(setup: Setup) -> None:
    path = setup.workdir / "config.json"
    try:
        write_json(path, setup.config.to_dict(), indent=1)
    except OSError as error:  # every checkpoint holds it too
        logging.error("%s cannot be written: %s", path, disk.reason(error))


def _introduce(setup: Setup, start: int) -> None:
    counts = count_params(setup.model)
    if not start:
        _say(parameter_overview.get_parameter_overview(abstract_params(setup.model), include_stats=False))
        _say(str(setup.config))
    kind = f"ternary, {packed_bytes(setup.model) / 1e6:,.1f} MB packed" if setup.model.ternary else "full precision"
    _say(f"{setup.config.name}: {counts['total']:,} parameters ({kind})")
    axes = ", ".join(f"{axis}={size}" for axis, size in setup.mesh.shape.items())
    _say(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} process(es), mesh {axes}")
    _say(f"{'resuming at' if start else 'starting at'} step {start:,} in {setup.workdir}")


def _close(setup: Setup) -> None:
    _say(f"checkpoints, metrics.jsonl, TensorBoard events and samples are in {setup.workdir}")
    labels = ",".join(map(str, range(min(3, setup.model.num_classes))))
    command = ["python", "-m", "terdit_jax.sample", f"--model={setup.workdir}", f"--labels={labels}"]
    _say("next: " + shlex.join([*command, "--output=grid.png"]))


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _is_first() -> bool:
    return jax.process_index() == 0


def _say(line: str) -> None:
    if _is_first():
        print(line, flush=True)
