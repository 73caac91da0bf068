"""Every second of a run is of one kind, over kills and restarts; productive is what a checkpoint still holds."""

import json

import pytest

from terdit_jax.training.observers import GOODPUT_FILE, KINDS, Goodput


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


def test_steps_a_second_count_training_and_waiting_for_batches_alone(tmp_path, clock):
    goodput = Goodput(tmp_path, clock)
    clock.spend(100)
    goodput.now("train")
    goodput.lap(5)
    clock.spend(8)
    with goodput.spent("input"):
        clock.spend(2)
    with goodput.spent("evaluate"):
        clock.spend(50)
    assert goodput.lap(25) == 2.0
    assert goodput.lap(25) == 0.0, "no step since"


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


ACCOUNT = {"restarts": 3, "seconds": {"train": 9.0}, "saved": {"5": 7.0}, "updated": 1e9, "complete": False}
WRONG = [
    *({"seconds": value} for value in (None, 5, [], "train", {"train": "9"}, {"train": None}, {"train": [9]})),
    *({"seconds": {"train": value}} for value in (True, float("nan"), float("inf"), 10**400)),
    *({"saved": value} for value in (None, [5], {"five": 7.0}, {"5": "7"}, {"5": {}}, {"5": float("nan")})),
    *({"restarts": value} for value in (None, "3", 3.0, True, [])),
    *({"updated": value} for value in (None, "now", True, float("-inf"))),
    *({"complete": value} for value in (None, 0, "no")),
]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"7", b"null", b'{"seconds": {}}', b"\xff\xfe{}", b"\0" * 99, b"[" * 100_000]
    + [json.dumps(ACCOUNT | wrong).encode() for wrong in WRONG],
    ids=lambda content: repr(content[:60]),
)
def test_a_damaged_account_begins_anew_and_is_kept_beside(tmp_path, clock, caplog, content):
    path = tmp_path / GOODPUT_FILE
    path.write_bytes(content)
    goodput = Goodput(tmp_path, clock)
    goodput.resumed(5)
    assert f"{path} cannot be read (damaged): the account begins anew" in caplog.text
    clock.spend(3)
    assert seconds(goodput) == {"start": 3} and goodput.summary()
    goodput.write()
    assert json.loads(path.read_text())["restarts"] == 0
    assert path.with_name(f"{GOODPUT_FILE}.damaged").read_bytes() == content


def test_the_account_that_the_damages_are_of_is_sound(tmp_path, clock, caplog):
    (tmp_path / GOODPUT_FILE).write_text(json.dumps(ACCOUNT))
    goodput = Goodput(tmp_path, clock)
    goodput.resumed(5)
    assert goodput.figures()["restarts"] == 4 and not caplog.records
    assert seconds(goodput) == {"train": 7, "lost": 2}


def test_a_folder_in_its_place_is_set_aside(tmp_path, clock, caplog):
    (tmp_path / GOODPUT_FILE).mkdir()
    Goodput(tmp_path, clock).write()
    assert json.loads((tmp_path / GOODPUT_FILE).read_text())["restarts"] == 0
    assert "Is a directory" in caplog.text and (tmp_path / f"{GOODPUT_FILE}.damaged").is_dir()


def test_an_unknown_kind_is_a_bug(tmp_path):
    with pytest.raises(ValueError):
        Goodput(tmp_path).now("coffee")
