"""Every second of a run is of one kind, over kills and restarts; productive is what a checkpoint still holds."""

import json

import pytest

from terdit_jax.training.goodput import GOODPUT_FILE, KINDS, Goodput


class Clock:
    def __init__(self):
        self.time = 1e9

    def __call__(self):
        return self.time

    def spend(self, seconds):
        self.time += seconds


@pytest.fixture
def clock():
    return Clock()


def seconds(goodput):
    figures = goodput.figures()
    return {kind: figures[f"seconds_{kind}"] for kind in KINDS if figures[f"seconds_{kind}"]}


def test_every_second_is_of_one_kind_and_kinds_nest(tmp_path, clock):
    goodput = Goodput(tmp_path, clock)
    clock.spend(3)
    with goodput.spent("restore"):
        clock.spend(2)
    goodput.now("train")
    clock.spend(10)
    with goodput.spent("evaluate"):
        clock.spend(1)
        with goodput.spent("save"):
            clock.spend(4)
        clock.spend(1)
    clock.spend(10)
    assert seconds(goodput) == {"start": 3, "restore": 2, "train": 20, "evaluate": 2, "save": 4}
    assert goodput.figures()["goodput"] == pytest.approx(20 / 31) and goodput.figures()["restarts"] == 0
    assert goodput.summary() == (
        "goodput 64.5% of 31s, 0 restart(s): train 20s, save 4s, start 3s, restore 2s, evaluate 2s"
    )


def test_a_kill_moves_what_it_undid_to_lost_and_counts_the_time_down(tmp_path, clock):
    goodput = Goodput(tmp_path, clock)
    goodput.resumed(0)
    goodput.now("train")
    for step in (10, 20):
        clock.spend(100)
        goodput.saved(step)
    clock.spend(50)
    goodput.write()
    clock.spend(7)  # killed within these
    for restart in (1, 2):
        again = Goodput(tmp_path, clock)
        clock.spend(5)
        again.resumed(10)
        down = 7 if restart == 1 else 14
        found = seconds(again)
        assert again.figures()["restarts"] == restart
        assert found["train"] == 100 and found["lost"] == 150 and found["down"] == down
        assert sum(found.values()) == clock.time - 1e9
        again.write()
        clock.spend(7)


def test_killed_before_the_first_checkpoint_all_is_lost(tmp_path, clock):
    goodput = Goodput(tmp_path, clock)
    goodput.now("train")
    clock.spend(30)
    goodput.write()
    again = Goodput(tmp_path, clock)
    again.resumed(0)
    assert seconds(again) == {"lost": 30} and again.figures()["goodput"] == 0


def test_a_completed_run_was_not_down(tmp_path, clock):
    goodput = Goodput(tmp_path, clock)
    goodput.now("train")
    clock.spend(30)
    goodput.saved(5)
    goodput.write(complete=True)
    clock.spend(1e6)
    again = Goodput(tmp_path, clock)
    again.resumed(5)
    assert seconds(again) == {"train": 30}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"seconds": {}}'])
def test_a_damaged_account_begins_anew(tmp_path, clock, content):
    (tmp_path / GOODPUT_FILE).write_text(content)
    goodput = Goodput(tmp_path, clock)
    goodput.write()
    assert json.loads((tmp_path / GOODPUT_FILE).read_text())["restarts"] == 0


def test_an_unknown_kind_is_a_bug(tmp_path):
    with pytest.raises(AssertionError):
        Goodput(tmp_path).now("coffee")
