"""After each step the actions that are due are done in order, once the figures before them are written."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from terdit_jax.progress import Bar
from terdit_jax.training import loop
from terdit_jax.training.actions import Action, Actions
from terdit_jax.training.observers import Observers

CONFIG = SimpleNamespace(train=SimpleNamespace(num_steps=5, soft_start_steps=0, batch_size=8))
HIDDEN = Bar(5, "steps", timed=False, show=False)


@pytest.fixture
def done(monkeypatch, tmp_path):
    """Runs five steps from a start with these actions; returns what happened, the step reached and the observers."""
    setup = SimpleNamespace(config=CONFIG, dataset=SimpleNamespace())
    setup.dataset.metadata = SimpleNamespace(latent_scale=1.0)
    for name in ("model", "objective", "optimizer", "mesh", "plan", "teacher"):
        setattr(setup, name, None)
    monkeypatch.setattr(loop, "make_train_step", lambda *_: lambda state, *_: {"step": state["step"] + 1})
    monkeypatch.setattr(loop, "device_batches", lambda setup, start: itertools.repeat({}))

    def run(start, make_actions):
        happened, observers = [], Observers(tmp_path)
        actions = SimpleNamespace(flush=lambda: happened.append("flush"), bar=HIDDEN)
        actions.in_order = make_actions(happened, observers)
        with observers.watching(start):
            return happened, loop.run_steps(setup, {"step": np.int32(start)}, actions, observers), observers

    return run


@pytest.mark.parametrize(("start", "made"), [(0, "SSSTT"), (2, "STT"), (3, "TT"), (4, "T")])
def test_a_soft_start_is_another_program_before_its_last_step(monkeypatch, tmp_path, capsys, start, made):
    config = SimpleNamespace(train=SimpleNamespace(num_steps=5, soft_start_steps=3, batch_size=8))
    setup = SimpleNamespace(config=config, dataset=SimpleNamespace(metadata=SimpleNamespace(latent_scale=1.0)))
    for name in ("model", "objective", "optimizer", "mesh", "teacher"):
        setattr(setup, name, None)
    setup.plan, steps, observers = "ternary", [], Observers(tmp_path)

    def make_train_step(*arguments, soft=False):
        assert arguments[-1] == ("full precision" if soft else "ternary")
        return lambda state, *_: steps.append("S" if soft else "T") or {"step": state["step"] + 1}

    monkeypatch.setattr(loop, "make_train_step", make_train_step)
    monkeypatch.setattr(loop, "choose_soft_plan", lambda model, mesh: "full precision")
    monkeypatch.setattr(loop, "device_batches", lambda setup, start: itertools.repeat({}))
    pending, rates = [], []  # figures are written a step late, with the rate since the last ones

    def log(state, batch, step):
        pending.append(step)
        return state

    actions = SimpleNamespace(bar=HIDDEN)
    actions.flush = lambda: rates.extend(observers.goodput.lap(pending.pop()) for _ in pending[:])
    actions.in_order = (Action("log", lambda step: True, log, waits=False),)
    with observers.watching(start):
        loop.run_steps(setup, {"step": np.int32(start)}, actions, observers)
    assert "".join(steps) == made and len(rates) == len(made) - 1 and min(rates, default=0) >= 0
    assert capsys.readouterr().out.count("the soft start is over") == (start < 4)


def every(steps):
    return Actions._every(SimpleNamespace(setup=SimpleNamespace(config=CONFIG)), steps)


def recorded(happened, name, due, **options):
    def do(state, batch, step):
        assert int(state["step"]) == step
        happened.append(f"{name} {step}")
        return state

    return Action(name, due, do, **options)


@pytest.mark.parametrize(("steps", "due"), [(0, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (9, [5])])
def test_an_action_is_due_every_so_many_steps_and_after_the_last_or_never(steps, due):
    assert [step for step in range(1, 6) if every(steps)(step)] == due


def test_actions_are_done_in_order_and_those_that_wait_find_all_figures_written(done):
    def make_actions(happened, _):
        first = recorded(happened, "log", every(2), waits=False)
        return first, recorded(happened, "draw", every(4)), recorded(happened, "save", every(9), kind="save")

    happened, step, observers = done(2, make_actions)
    assert step == 5 and observers.goodput.figures()["seconds_save"] > 0
    assert happened == [
        "flush", "flush", "log 4", "flush", "draw 4", "flush", "log 5", "flush", "draw 5", "flush", "save 5"
    ]  # fmt: skip


def test_an_interruption_ends_the_run_after_the_last_action(done):
    def make_actions(happened, observers):
        def ask(state, batch, step):
            observers.interruption.name = "SIGTERM"
            return state

        save = recorded(happened, "save", observers.interruption.reached, kind="save")
        return Action("ask", lambda step: step == 3, ask), save

    happened, step, _ = done(0, make_actions)
    assert step == 3 and happened[-1] == "save 3" and happened.count("save 3") == 1
