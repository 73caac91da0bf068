"""The cases: each kills or damages a run of digits in rounds and holds what comes of it against an undisturbed one.

Every assertion is one that a user relies on: the step that a resumed run begins at, the lines it prints, its exit
status, and in the end parameters, average, moments, counters and metrics equal bit for bit.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
import random
import re
import shutil
import signal
import subprocess
import time

from tests.faults.damages import DAMAGES, HALF_WRITTEN, MANIFEST
from tests.forked import Command
from tests.runs import (
    assert_same_run,
    finish_together,
    logged_steps,
    prepare_digits,
    signed_steps,
    start_together,
    train_arguments,
)

GRACE_SECONDS = 120  # in which the survivors of a killed process must have ended


class Bench:
    """The data, the cache of compiled programs and the undisturbed run that a case's rounds share."""

    def __init__(self, root: Path, *, steps: int, processes: int = 1, seed: int | None = None):
        self.root, self.steps, self.processes = root, steps, processes
        self.random = random.Random(seed)
        self.data, self.cache = prepare_digits(root / "digits"), root / "cache"
        self.undisturbed = root / "undisturbed"
        finish_together(self.start(self.undisturbed))

    def start(self, workdir: Path, steps: int | None = None) -> list[Command]:
        """The run, begun or resumed."""
        fields = {
            "train__num_steps": steps or self.steps,
            "optimizer__drop_step": self.steps // 2,
            "checkpoint__every": 10 if self.processes == 1 else 5,
            "log__every": 5,
            "log__heldout_every": 0,
        }
        if self.processes > 1:
            fields |= {"mesh__fsdp": 2}
        devices = 1 if self.processes == 1 else 2
        arguments = train_arguments(self.data, workdir, **fields)
        return start_together("main", arguments, processes=self.processes, devices=devices, cache=self.cache)

    def wait_for_progress(self, workdir: Path, processes: list[Command], beyond: int, before: int) -> bool:
        """Until the run has logged a step beyond the one that it goes on from; False if it has ended.

        `before`: of `_written`, from before the start. A run that was killed may have logged beyond its checkpoint.
        """
        deadline = time.monotonic() + 600
        while _written(workdir) == before or max(logged_steps(workdir), default=0) <= beyond:
            if processes[0].poll() is not None:
                return False
            assert time.monotonic() < deadline, "no progress in ten minutes"
            time.sleep(0.005)
        return True

    def check_whole(self, workdir: Path) -> None:
        """A completed run is the undisturbed one, bit for bit."""
        assert_same_run(workdir, self.undisturbed)


def kill(root: Path, rounds: int, seed: int | None = None) -> Iterator[dict]:
    """Rounds of kill -9 at a random moment, a fifth of them while the process still starts."""
    yield from _kill(Bench(root, steps=200, seed=seed), rounds)


def kill_2_processes(root: Path, rounds: int, seed: int | None = None) -> Iterator[dict]:
    """Like `kill`, of one of two processes: the other must end by itself, with a status that is not 0."""
    yield from _kill(Bench(root, steps=60, processes=2, seed=seed), rounds)


def _kill(bench: Bench, rounds: int) -> Iterator[dict]:
    done, whole, unplanned, startup = 0, 0, 0, None
    workdir = bench.root / "run_0"
    while True:
        expected = max(signed_steps(workdir), default=0)
        begun, before = time.monotonic(), _written(workdir)
        processes = bench.start(workdir)
        if done == rounds:
            finished = True  # the last run goes on to its end
        elif startup and bench.random.random() < 0.2:
            time.sleep(bench.random.uniform(0, startup))
            finished = False
        else:
            finished = not bench.wait_for_progress(workdir, processes, expected, before)
            startup = time.monotonic() - begun
            time.sleep(bench.random.uniform(0, 3 if len(processes) == 1 else 12))
        result = {"resumed_at": expected}
        if not finished and processes[0].poll() is None:
            victim = bench.random.randrange(len(processes))
            processes[victim].send_signal(signal.SIGKILL)
            result |= {"victim": victim, **_end_of_survivors(processes, victim)}
            _check_resumed(_output(processes)[0], expected)
            done += 1
            yield {"round": done, "saved": signed_steps(workdir)[-2:], **result}
            continue
        outputs = [process.communicate() for process in processes]
        if len(processes) > 1 and any(_timed_out(error) for _, error in outputs):
            unplanned += 1  # a machine with fewer cores than processes: what follows is a restart like any other
            assert unplanned <= rounds, outputs[0][1][-2000:]
            continue
        for process, (out, error) in zip(processes, outputs, strict=True):
            assert process.returncode == 0, f"status {process.returncode}: {out[-1000:]}{error[-2000:]}"
        _check_resumed(outputs[0][0], expected)
        bench.check_whole(workdir)
        shutil.rmtree(workdir)
        whole += 1
        if done == rounds:
            yield {"runs_compared_bit_for_bit": whole, "ended_by_a_timeout": unplanned}
            return
        workdir = bench.root / f"run_{whole}"


def _timed_out(error: str) -> bool:
    """Whether CPU collectives waited for a peer for longer than their fixed 30 seconds."""
    return "Gloo" in error and re.search(r"[Tt]imed out|DEADLINE_EXCEEDED|Connection closed by peer", error) is not None


def _end_of_survivors(processes: list[Command], victim: int) -> dict:
    killed = time.monotonic()
    survivors = [process for number, process in enumerate(processes) if number != victim]
    for process in survivors:
        try:
            process.wait(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            end = process.communicate()[1][-3000:]
            raise AssertionError(f"a survivor still ran {GRACE_SECONDS} s after the kill: {end}") from None
        assert process.returncode != 0, "a survivor of a killed run ended with status 0"
    processes[victim].wait()
    return {"survivors_ended_after_seconds": round(time.monotonic() - killed, 1)} if survivors else {}


def _output(processes: list[Command]) -> list[str]:
    return [process.communicate()[0] for process in processes]


def _check_resumed(output: str, expected: int) -> None:
    """Checks that a process said it began at the newest sound checkpoint, if it came so far."""
    begun = re.search(r"(?:resuming|starting) at step ([\d,]+) in", output)
    if begun:
        step = int(begun.group(1).replace(",", ""))
        assert step == expected, f"began at step {step}, the newest sound checkpoint is {expected}"


def sigterm(root: Path, rounds: int, seed: int | None = None) -> Iterator[dict]:
    """Rounds of SIGTERM: status 0 and a state saved at the very step, each time."""
    yield from _sigterm(Bench(root, steps=400, seed=seed), rounds)


def sigterm_2_processes(root: Path, rounds: int, seed: int | None = None) -> Iterator[dict]:
    """Like `sigterm`, sent to one of two processes: both save and end with status 0."""
    yield from _sigterm(Bench(root, steps=200, processes=2, seed=seed), rounds)


def sigterm_repeated(root: Path, rounds: int, seed: int | None = None) -> Iterator[dict]:
    """Like `sigterm`, with two more within a second, as schedulers send them: what the first began is completed."""
    yield from _sigterm(Bench(root, steps=400, seed=seed), rounds, more=2)


def sigterm_repeated_2_processes(root: Path, rounds: int, seed: int | None = None) -> Iterator[dict]:
    """Like `sigterm_repeated`, each sent to one of two processes at random."""
    yield from _sigterm(Bench(root, steps=200, processes=2, seed=seed), rounds, more=2)


def _sigterm(bench: Bench, rounds: int, more: int = 0) -> Iterator[dict]:
    workdir, done = bench.root / "run", 0
    while done < rounds:
        expected, before = max(signed_steps(workdir), default=0), _written(workdir)
        processes = bench.start(workdir)
        if not bench.wait_for_progress(workdir, processes, expected, before):
            finish_together(processes)
            bench.check_whole(workdir)
            shutil.rmtree(workdir)
            continue
        time.sleep(bench.random.uniform(0, 1))
        asked = time.monotonic()
        bench.random.choice(processes).send_signal(signal.SIGTERM)
        for _ in range(more):
            time.sleep(bench.random.uniform(0, 0.5))
            bench.random.choice(processes).send_signal(signal.SIGTERM)
        out = finish_together(processes)[0][0]
        stopped = re.search(r"stopped by SIGTERM at step ([\d,]+)", out)
        if stopped:
            step = int(stopped.group(1).replace(",", ""))
            assert signed_steps(workdir)[-1] == step
            done += 1
            yield {"round": done, "stopped_at": step, "seconds": round(time.monotonic() - asked, 1)}
    finish_together(bench.start(workdir))
    bench.check_whole(workdir)
    yield {"runs_compared_bit_for_bit": 1}


def _damage(name: str) -> Callable[..., Iterator[dict]]:
    damage = (DAMAGES | HALF_WRITTEN)[name]

    def case(root: Path, rounds: int, seed: int | None = None) -> Iterator[dict]:
        bench = Bench(root, steps=40, seed=seed)
        base = root / "base"
        finish_together(bench.start(base, steps=30))
        for number in range(1, rounds + 1):
            workdir = root / f"run_{number}"
            shutil.copytree(base, workdir)
            (before, newest) = signed_steps(workdir)[-2:]
            damage(workdir / "checkpoints" / str(newest))
            ((out, err),) = finish_together(bench.start(workdir))
            assert f"resuming at step {before} in" in out
            if name in DAMAGES:
                assert f"CHECKPOINT {newest} IS DAMAGED" in err
                assert (workdir / "damaged_checkpoints" / str(newest)).is_dir()
            bench.check_whole(workdir)
            shutil.rmtree(workdir)
            yield {"round": number, "damaged": newest, "resumed_at": before}
        yield {"runs_compared_bit_for_bit": rounds}

    case.__doc__ = f"The newest checkpoint {name.replace('_', ' ')}: the one before it is used, the end is the same."
    return case


def undeletable(root: Path, rounds: int, seed: int | None = None) -> Iterator[dict]:
    """The oldest checkpoint cannot be deleted: one line says so, every later save counts, the end is the same."""
    bench = Bench(root, steps=60, seed=seed)
    base = root / "base"
    finish_together(bench.start(base, steps=30))
    for number in range(1, rounds + 1):
        workdir = root / f"run_{number}"
        shutil.copytree(base, workdir)
        oldest, *_ = signed_steps(workdir)
        file = workdir / "checkpoints" / str(oldest) / MANIFEST
        made = subprocess.run(["chattr", "+i", file], capture_output=True, text=True, check=False)
        assert not made.returncode, f"needs root and a file system with immutable files: {made.stderr}"
        try:
            ((_, err),) = finish_together(bench.start(workdir))
            assert err.count(f"CHECKPOINT {oldest} COULD NOT BE DELETED") == 1 and "NOT BE SAVED" not in err, err
            assert signed_steps(workdir) == [oldest, 40, 50, 60]
            bench.check_whole(workdir)
        finally:
            subprocess.run(["chattr", "-i", file], check=True)
        shutil.rmtree(workdir)
        yield {"round": number, "undeletable": oldest}
    yield {"runs_compared_bit_for_bit": rounds}


CASES: dict[str, Callable[..., Iterator[dict]]] = {
    "kill": kill,
    "kill_2_processes": kill_2_processes,
    "sigterm": sigterm,
    "sigterm_2_processes": sigterm_2_processes,
    "sigterm_repeated": sigterm_repeated,
    "sigterm_repeated_2_processes": sigterm_repeated_2_processes,
    "undeletable": undeletable,
    **{name: _damage(name) for name in (*DAMAGES, *HALF_WRITTEN)},
}


def _written(workdir: Path) -> int:
    """When the metrics were last written."""
    metrics = workdir / "metrics.jsonl"
    return metrics.stat().st_mtime_ns if metrics.exists() else 0
