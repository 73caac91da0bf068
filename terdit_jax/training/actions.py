"""The actions of a run after some of its steps: log, evaluate on held-out examples, draw, score and save.

`loop` calls them. Figures of training steps are fetched a step late, while the devices work on the next one.
"""

from collections.abc import Callable
import dataclasses
from functools import partial
from typing import Any

from absl import logging
from etils import epath
import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from terdit_jax.checkpoints.best import BestCheckpoint, Judge
from terdit_jax.checkpoints.layout import BEST
from terdit_jax.checkpoints.writer import CheckpointWriter
from terdit_jax.config import RunConfig
from terdit_jax.data.reader import heldout_batches
from terdit_jax.diffusion.objective import Objective
from terdit_jax.errors import UserError, going_on
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.plan import Plan
from terdit_jax.model.transformer import activation_rms
from terdit_jax.parallel.chips import peak_flops
from terdit_jax.parallel.mesh import on_mesh
from terdit_jax.parallel.sharding import batch_shards, constrain, local_block
from terdit_jax.progress import Bar, format_duration
from terdit_jax.training.examples import example_keys, make_examples, to_devices
from terdit_jax.training.metrics import MetricsWriter, say
from terdit_jax.training.observers import Observers
from terdit_jax.training.optimizer import learning_rate_schedule
from terdit_jax.training.resume import check_finite, describe_run
from terdit_jax.training.setup import Setup
from terdit_jax.training.state import State, code_statistics, means, packed_codes
from terdit_jax.training.step import mean_loss

Batch = dict[str, Array]
# Called with (step, EMA parameters); returns the path of the grid it wrote and the grid, (H, W, 3) uint8.
DrawGrid = Callable[[int, dict], tuple[epath.Path, np.ndarray]]

_LOWER_RATE = "go on from the last checkpoint with a lower config.optimizer.learning_rate or clip_norm"


@dataclasses.dataclass(frozen=True)
class Action:
    """Something that is done after some of the steps.

    Attributes:
      name: what it is.
      due: step -> whether it is done after this one.
      do: (state, batch, step) -> the state to go on with.
      kind: what its seconds count as, one of `observers.KINDS`.
      waits: whether it begins once the step is done and all figures are written, or only queues work on the devices.
    """

    name: str
    due: Callable[[int], bool]
    do: Callable[[State, Batch, int], State]
    kind: str = "evaluate"
    waits: bool = True


class Actions:
    """The actions of one run. Attributes:

    in_order: those that may be due after a step; saving is the last, for a resumed run goes on where the metrics end.
    bar: of the steps, on a terminal.
    """

    def __init__(
        self,
        setup: Setup,
        observers: Observers,
        writer: MetricsWriter | None,
        checkpoints: CheckpointWriter,
        draw_grid: DrawGrid,
        judge: Judge | None = None,
        best: BestCheckpoint | None = None,
        teacher: str = "",
    ):
        """Takes what the actions write to: `writer` is None on all processes but the first. `teacher`: fingerprint of
        the one that the run has or had."""
        self.teacher = teacher
        self.bar = Bar(setup.config.train.num_steps, "steps", timed=False, show=writer is not None)
        self.setup, self.goodput, self.writer, self.checkpoints = setup, observers.goodput, writer, checkpoints
        config, reached = setup.config, observers.interruption.reached
        self.in_order = (
            Action("log", self._every(config.log.every), self.log, waits=False),
            Action("evaluate", self._every(config.log.heldout_every), self.evaluate),
            Action("sample", self._every(config.log.samples_every), partial(self.sample, draw_grid)),
            *(
                [Action("score", self._every(config.log.score_every), partial(self.score, judge, best))]
                if judge
                else []
            ),
            Action("save", lambda step: reached(step) or saves(step), self.save, kind="save"),
        )
        saves = self._every(config.checkpoint.every or config.train.num_steps)
        latent_scale = setup.dataset.metadata.latent_scale
        self._heldout_loss = make_heldout_loss(
            config, setup.model, setup.objective, setup.mesh, latent_scale, setup.plan
        )
        self._summarize = on_mesh(setup.mesh, jax.jit(partial(_summarize, setup), donate_argnums=0))
        self._summary_kind = "compile"  # the first one compiles
        self._learning_rate = learning_rate_schedule(config.optimizer)
        self._spiked = 0
        self._pending: tuple[int, dict[str, Array]] | None = None

    def _every(self, steps: int) -> Callable[[int], bool]:
        """Due every `steps` steps and after the last; never for 0."""
        num_steps = self.setup.config.train.num_steps
        return lambda step: steps > 0 and (step % steps == 0 or step == num_steps)

    def log(self, state: State, batch: Batch, step: int) -> State:
        """Queues the figures of the window that ends here; returns the state with an empty window."""
        with self.goodput.spent(self._summary_kind):
            figures, state = self._summarize(state, batch)
        self._summary_kind, self._pending = "evaluate", (step, figures)
        return state

    def flush(self) -> None:
        """Fetches and writes the figures that wait, if any.

        Raises:
          UserError: too many steps in a row were not finite.
        """
        if self._pending is None:
            return
        (step, pending), self._pending = self._pending, None
        figures = {name: float(value) for name, value in jax.device_get(pending).items()}
        consecutive, skipped = int(figures.pop("skipped_consecutive")), int(figures["skipped_steps"])
        spiked = int(figures["spiked_steps"])
        figures["learning_rate"] = float(self._learning_rate(step - 1 - skipped - spiked))
        timing = self._timing(step) | self.goodput.figures()
        line = [f"loss {figures['loss']:.4f}"]
        line += [f"distillation {figures['distillation']:.4f}"] if "distillation" in figures else []
        line.append(f"{timing['images_per_second']:,.1f} images/s")
        line += [f"MFU {timing['mfu']:.1%}"] if "mfu" in timing else []
        line += [f"{format_duration(timing['eta_seconds'])} left"] if "eta_seconds" in timing else []
        self._write(step, figures, "  ".join([f"step {step:,}/{self.setup.config.train.num_steps:,}", *line]), timing)
        self.bar.tell("  ".join(line))
        self.goodput.write()
        if skipped:
            logging.warning("%d non-finite updates have been skipped so far", skipped)
        if spiked > self._spiked:
            self._spiked = spiked
            logging.warning("%d updates have been skipped as loss spikes so far", spiked)
        if consecutive >= self.setup.config.train.max_nonfinite_steps:
            raise UserError(
                f"loss or gradient has been non-finite at every step from {step - consecutive + 1} to {step}: "
                f"{_LOWER_RATE}"
            )

    def _timing(self, step: int) -> dict[str, float]:
        config, model = self.setup.config, self.setup.model
        rate = self.goodput.lap(step)
        timing = {"images_per_second": rate * config.train.batch_size}
        if rate:
            timing["eta_seconds"] = (config.train.num_steps - step) / rate
        if peak := peak_flops(jax.devices()[0].device_kind):
            # Training is counted as three forward passes; rematerialisation and a teacher are not the model's work.
            flops = 3 * model.flops_per_image() * timing["images_per_second"]
            timing["mfu"] = flops / (peak * jax.device_count())
        return timing

    def _write(self, step: int, figures: dict[str, float], line: str, timing: dict[str, float] | None = None) -> None:
        if self.writer:
            self.writer.write(step, figures, timing)
        say(line)

    def evaluate(self, state: State, batch: Batch, step: int) -> State:
        """Writes the held-out loss of raw and averaged weights."""
        config, mesh = self.setup.config, self.setup.mesh
        # As many examples as training has in memory at once.
        batch_size = config.train.batch_size // config.train.accumulation_steps
        num_batches = config.log.heldout_batches * config.train.accumulation_steps
        block, num_blocks = local_block(mesh, batch_size)
        figures = {"heldout_loss": 0.0, "heldout_loss_ema": 0.0}
        batches = heldout_batches(
            self.setup.dataset,
            batch_size=batch_size,
            num_batches=num_batches,
            process_index=block,
            process_count=num_blocks,
        )
        for number, records in enumerate(batches):
            batch = to_devices(mesh, records, batch_size)
            for name, weights in zip(figures, ("params", "ema_params"), strict=True):
                figures[name] += float(self._heldout_loss(state[weights], batch, jnp.int32(number)))
        raw, averaged = (total / num_batches for total in figures.values())
        if not np.isfinite([raw, averaged]).all():
            logging.error("step %d: THE HELD-OUT LOSS IS NOT FINITE", step)
        line = f"step {step:,}  held-out loss {raw:.4f}, EMA {averaged:.4f}"
        self._write(step, {"heldout_loss": raw, "heldout_loss_ema": averaged}, line)
        return state

    def sample(self, draw_grid: DrawGrid, state: State, batch: Batch, step: int) -> State:
        """Draws and writes a grid from the averaged weights."""
        with going_on(f"step {step}: NO SAMPLES"):
            path, grid = draw_grid(step, state["ema_params"])
            if self.writer:
                self.writer.write_image(step, "samples", grid)
            say(f"step {step:,}  samples in {path}")
        return state

    def score(self, judge: Judge, best: BestCheckpoint | None, state: State, batch: Batch, step: int) -> State:
        """Writes what samples of the averaged weights score, and keeps the weights if none have scored better."""
        with going_on(f"step {step}: NO SCORES"):
            judgement = judge(step, state["ema_params"])
            written = ", ".join(f"{name} {value:.4g}" for name, value in judgement.figures.items())
            self._write(step, judgement.figures, f"step {step:,}  {written}")
            if best and best.offer(state["ema_params"], self._describe(step), judgement.loss):
                say(f"step {step:,}  the best so far: kept in {self.setup.workdir / BEST}")
        return state

    def save(self, state: State, batch: Batch, step: int) -> State:
        """Saves the state.

        Raises:
          UserError: a state that no run could go on from; it must not take the place of one that is sound.
        """
        check_finite(state, f"the state after step {step}", f"it is not saved; {_LOWER_RATE}")
        self.checkpoints.save(state, self._describe(step))
        self.goodput.saved(step)
        return state

    def _describe(self, step: int) -> dict[str, Any]:
        return describe_run(self.setup.config, step, self.setup.dataset.metadata, self.teacher)


def _summarize(setup: Setup, state: State, batch: Batch) -> tuple[dict[str, Array], State]:
    """The figures of the window that ends here, and the state with an empty window."""
    config, model, window = setup.config, setup.model, state["window"]
    codes = packed_codes(model, state["params"])
    terms = (*setup.objective.terms, *(["distillation"] if setup.teacher else []))
    figures = means(window["sums"], terms) | code_statistics(window["codes"], codes)
    figures |= {"skipped_steps": state["skipped"]["total"], "skipped_consecutive": state["skipped"]["consecutive"]}
    figures |= {"spiked_steps": state["spikes"]["total"]}
    few = batch_shards(setup.mesh)  # one example a device is enough for a root mean square over all its tokens
    examples = make_examples(
        jax.tree.map(lambda leaf: leaf[:few], batch),
        example_keys(config.seed, state["step"], jnp.arange(few, dtype=jnp.int32)),
        setup.objective,
        latent_scale=setup.dataset.metadata.latent_scale,
        num_classes=model.num_classes,
        class_dropout_prob=0.0,
    )
    plan, inputs = setup.plan, (examples["x_t"], examples["t"], examples["y"])
    rms = activation_rms(model, plan.make_operands(model, state["params"]), *inputs, plan.run_blocks)
    figures |= {f"rms/{kind}": jnp.sqrt(jnp.mean(jnp.square(values))) for kind, values in rms.items()}
    return figures, state | {"window": {"sums": jax.tree.map(jnp.zeros_like, window["sums"]), "codes": codes}}


# Keeps the fixed draws apart from training's, which use the seed itself.
_SEED_OFFSET = 0x5EED


def make_heldout_loss(
    config: RunConfig, model: DiTConfig, objective: Objective, mesh: Mesh, latent_scale: float, plan: Plan
) -> Callable[[dict, dict, Array], Array]:
    """The jitted mean loss of a held-out batch, (params, global batch, its number) -> (): no label dropout."""

    def heldout_loss(params: dict, batch: dict[str, Array], number: Array) -> Array:
        # Keyed by the place among all held-out examples: how they are cut into batches changes nothing.
        size = len(batch["label"])
        keys = example_keys(config.seed + _SEED_OFFSET, 0, number * size + jnp.arange(size, dtype=jnp.int32))
        examples = make_examples(
            batch,
            constrain(keys, "batch"),
            objective,
            latent_scale=latent_scale,
            num_classes=model.num_classes,
            class_dropout_prob=0.0,
        )
        return mean_loss(model, objective, plan.make_operands(model, params), examples, plan)[0]

    return on_mesh(mesh, jax.jit(heldout_loss))
