"""The training loop: one step after another, and after each the actions that are due, in order.

`step` holds the mathematics, `actions` what is done after steps; `run` opens and closes what both need.
"""

from functools import partial
import time

import jax

from terdit_jax.fast.plan import choose_soft_plan
from terdit_jax.progress import format_duration
from terdit_jax.training.actions import Actions
from terdit_jax.training.examples import device_batches
from terdit_jax.training.metrics import say
from terdit_jax.training.observers import Observers
from terdit_jax.training.setup import Setup
from terdit_jax.training.state import State
from terdit_jax.training.step import make_train_step


def run_steps(setup: Setup, state: State, actions: Actions, observers: Observers) -> int:
    """Trains until the run is complete or interrupted, and saved; returns the step it has reached.

    Args:
      setup: of the run.
      state: to begin or go on from; its memory is reused.
      actions: due after steps.
      observers: of the run.
    """
    latent_scale = setup.dataset.metadata.latent_scale
    make_step = partial(
        make_train_step, setup.config, setup.model, setup.objective, setup.optimizer, setup.mesh, latent_scale
    )
    soft_steps, num_steps = setup.config.train.soft_start_steps, setup.config.train.num_steps
    train_step = soft_step = make_step(setup.plan)
    if soft_steps:
        soft_step = make_step(choose_soft_plan(setup.model, setup.mesh), soft=True)
    start = step = int(state["step"])
    batches = device_batches(setup, start)
    goodput, profiler = observers.goodput, observers.profiler
    while True:
        compiles = step in (start, soft_steps)  # the first call of a program
        if compiles:
            if step == soft_steps > 0:
                jax.block_until_ready(state)
                actions.flush()  # before `lap` counts from a later step
                say(f"step {step:,}  the soft start is over: compiling the step of ternary weights")
            else:
                say("compiling the first step ...")
            goodput.now("compile")
        began = time.perf_counter()
        with goodput.spent("input"):
            batch = next(batches)
        profiler.before(step + 1)
        with jax.transfer_guard("disallow"):
            state = (soft_step if step < soft_steps else train_step)(state, batch, setup.teacher)
        step += 1
        if compiles:
            jax.block_until_ready(state)
            goodput.now("train")
            goodput.lap(step)
            say(f"step {step:,}  compiled and made in {time.perf_counter() - began:.1f} s")
        elif step == start + 2 < num_steps:  # long before the first figures of a large model
            jax.block_until_ready(state)
            seconds = time.perf_counter() - began
            pace = f"{setup.config.train.batch_size / seconds:,.1f} images/s"
            left = f"{pace}  about {format_duration((num_steps - step) * seconds)} left"
            say(f"step {step:,}/{num_steps:,}  {left}")
            actions.bar.tell(left)
        actions.bar.reached(step)
        observers.heartbeat.beat(step)
        profiler.after(step, state)
        actions.flush()  # figures of the step before: the devices are already at work on this one
        for action in actions.in_order:
            if action.due(step):
                if action.waits:
                    jax.block_until_ready(state)
                    actions.flush()
                with goodput.spent(action.kind), jax.profiler.TraceAnnotation(action.name):
                    state = action.do(state, batch, step)
        if step == num_steps or observers.interruption.agreed:
            return step
