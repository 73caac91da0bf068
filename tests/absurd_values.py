"""Gives every flag and every field of the commands at least eight absurd values, each in a command of its own.

python -m tests.absurd_values --jobs=2 --output=docs/benchmarks/absurd_values.json

A command that refuses its value ends with status 2 and one line that names the flag or the value, and leaves every file
as it was. One that accepts it must do its work and overwrite nothing, and ACCEPTED says why it may. Commands are forks
of one process that has imported JAX (`forked`), each in a folder of tiny inputs that is made anew once it has changed.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
import concurrent.futures
import dataclasses
import datetime
import fnmatch
import json
import os
from pathlib import Path
import platform
import queue
import runpy
import shutil
import subprocess
import sys
import tempfile
import time

from absl import flags
import jax
import numpy as np

from terdit_jax.config import FIELDS, PATHS
from terdit_jax.interop.exports import export
from tests.commands import no_flags
from tests.deployed import random_weights, small_config
from tests.documented_commands import STEPS
from tests.documented_inputs import make
from tests.forked import COMMANDS
from tests.runs import ROOT, command_environment, programs, quick_python

SECONDS = 300  # that a command may take
LONGEST_LINE = 1000  # characters

LONG_NAME, LONG_PATH = "n" * 300, "folder/" * 1000
NO_NUMBERS = ["", " ", "abc", "nan", "None", "[1]", "1;2", "0x10", "1,000", "--1", "1e", "ⅷ"]
WHOLE = ["-1", "0", "1.5", "1e3", "True", str(2**31), str(2**63), str(-(2**63) - 1), "1" + "0" * 400, *NO_NUMBERS]
REAL = ["-1", "inf", "-inf", "1e39", "-1e39", "1e400", "1e-60", "True", *NO_NUMBERS]
YES_OR_NO = ["", " ", "abc", "nan", "None", "2", "-1", "1.5", "[]", "truefalse", "yes please"]
TEXT = ["", " ", "abc", "nan", "None", "-1", "a b", "\n", "\x1b[2J", "{}", "../..", "x" * 5000, "n" * 20_000]
LIST = ["", ",", "abc", "1.5", "-1", "0,,1", "0;1", "nan", "True", "99", "9" * 30, " ", "[0]", "0x1", "-0,"]
PLACES = [
    "", " ", "\n", LONG_NAME, LONG_PATH, "nosuch://bucket/x", "gs://bucket/x", "s3://bucket/x", "gs://", "~nosuch/x",
    "notes.txt", "notes.txt/x", "/dev/null", "/dev/null/x", "empty", "dangling", "/proc/self/mem", "loop", "pictures",
]  # fmt: skip

# A command to which a value is added: one in which the flag or field takes part.
_MODEL_FILE, _RUN = "model.safetensors", "run"
BASES = {
    "prepare": "--source=folder --input=pictures --output=new --image_size=16",
    "prepare of latents": "--source=folder --input=pictures --output=new --image_size=16 --vae=vae",
    "prepare of tfds": "--source=tfds --input=no_such_data_set --data_dir=empty --output=new",
    "prepare inspects": "--inspect=data --output=new.png",
    "main": f"--config=configs/digits.py --workdir=new --config.data.dir=data {STEPS} --config.log.heldout_every=2",
    "sample": f"--model={_MODEL_FILE} --labels=0,1 --num_steps=2 --output=new.npz",
    "sample of a run": f"--model={_RUN} --labels=0,1 --num_steps=2 --output=new.npz",
    "sample of latents": "--model=latents.safetensors --vae=vae --labels=0 --num_steps=2 --output=new.npz",
    "export": f"--model={_MODEL_FILE} --format=safetensors --output=new.safetensors",
    "export of a run": f"--workdir={_RUN} --format=safetensors --output=new.safetensors",
    "export packs": f"--model={_MODEL_FILE} --format=packed --output=new.safetensors",
    "export for the Hub": f"--model={_MODEL_FILE} --format=hub --output=new",
    "evaluate": f"--workdir={_RUN} --num_samples=4 --output=new.json",
    "evaluate samples": f"--workdir={_RUN} --samples=samples.npz --output=new.json",
    "evaluate by suite": "--samples=samples.npz --reference=samples.npz --inception=notes.txt --output=new.json",
    "evaluate saves": "--reference=samples.npz --inception=notes.txt --save_reference=new.npz",
    "evaluate draws latents": f"--samples={_RUN} --vae=vae --reference=samples.npz --inception=notes.txt"
                              " --output=new.json",
    "compile": f"--config=configs/digits.py --topology=cpu:1 --output=new.json {STEPS}",
    "compile of drawing": f"--config=configs/digits.py --topology=cpu:1 --what=sample --output=new.json {STEPS}",
    "compile suggests": f"--config=configs/digits.py --topology=cpu:1 --suggest --tries=1 --output=new.json {STEPS}",
    "compile compares": "--table=reports",
    "report": f"{_RUN} --output=new.html",
}  # fmt: skip
# Of the flags that take no part in their command's first base.
BASE_OF = {
    "prepare": {
        "prepare of latents": ("vae", "dtype", "batch_size", "compilation_cache"),
        "prepare of tfds": ("data_dir",),
        "prepare inspects": ("inspect", "num_samples"),
    },
    "sample": {"sample of a run": ("step", "weights"), "sample of latents": ("vae",)},
    "export": {
        "export of a run": ("workdir", "step", "ema"),
        "export packs": ("compress",),
        "export for the Hub": ("push_to", "scores", "license"),
    },
    "evaluate": {
        "evaluate samples": ("samples",),
        "evaluate by suite": ("reference", "inception", "batch_size"),
        "evaluate saves": ("save_reference",),
        "evaluate draws latents": ("vae",),
    },
    "compile": {
        "compile of drawing": ("mode", "batch_size"),
        "compile suggests": ("tries",),
        "compile compares": ("table", "measured"),
    },
}

# (command, flag or field, value), each a pattern: values that are no mistake, and why.
ACCEPTED = {
    ("*", "*", "0x10"): "whole numbers may be written in hexadecimal",
    ("*", "*seed", "0"): "a seed like any other",
    ("*", "*seed", str(2**31)): "a seed like any other: they have 32 bits",
    ("*", "config.*_every", "0"): "0 is never",
    ("*", "config.optimizer.drop_step", "0"): "0 is no drop",
    ("*", "config.train.soft_start_steps", "0"): "0 is no soft start",
    ("*", "config.model.num_kv_heads", "0"): "0 is as many as num_heads",
    ("*", "config.sample.cfg_channels", "0"): "0 is all",
    ("*", "*cfg_t_min", "0"): "the first timestep",
    ("*", "config.mesh.data", "-1"): "-1 is what the other axes leave",
    ("*", "config.model.class_dropout_prob", "1e-60"): "0 in float32, which is no dropout",
    ("*", "config.optimizer.b[12]", "1e-60"): "0 in float32, which is no memory",
    ("*", "config.optimizer.ema_decay", "1e-60"): "0 in float32, which is no average",
    ("*", "config.optimizer.weight_decay", "1e-60"): "0 in float32, which is no decay",
    ("*", "config.optimizer.spike_sigma", "1e-60"): "0 in float32, which is no guard",
    ("*", "*cfg_scale", "1e-60"): "0 in float32, which is no guidance",
    ("prepare", "max_bad_share", "1e-60"): "no image may be bad",
    ("export", "license", "[an][ab][cn]"): "which licences there are is the Hub's to know",
    ("*", "config.name", "*"): "a title, of any printable characters",
    ("*", "config.train.compiler_options", "*"): "no options",
    ("*", "config.train.init_from", ""): "a start from scratch",
    ("*", "config.log.writers", ""): "no tracker",
    ("*", "config.train.teacher", ""): "no teacher",
    ("*", "config.train.teacher_weight", "1e-60"): "0 in float32, which teaches nothing",
    ("*", "config.train.compilation_cache", ""): "the user's cache folder",
    ("*", "*compilation_cache", "[ep]*"): "a folder that is there",
    ("main", "workdir", "[ep]*"): "a folder that is there and holds no run",
    ("prepare", "output", "empty"): "an empty folder",
    ("prepare", "input", "pictures"): "the folder of images",
    ("compile", "config.data.dir", "*"): "compiling reads no data",
    ("compile", "config.train.init_from", "*"): "compiling reads no weights",
    ("compile", "config.train.compilation_cache", "*"): "compiling for a report keeps nothing",
}
# Values that are no mistake either, of commands that then fail for want of something large.
FINE = {
    ("compile", "tries", "0x10"): "a suggestion needs the compiler of an accelerator",
    ("evaluate", "batch_size", "0x10"): "there are no weights of Inception",
    ("evaluate", "reference", "pictures"): "there are no weights of Inception",
    ("prepare", "data_dir", "[ep]*"): "there is no such TFDS data set",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A value of a flag or, with a dot in its name, of a field of the configuration."""

    command: str
    name: str
    value: str

    @property
    def arguments(self) -> list[str]:
        bases = BASE_OF.get(self.command, {})
        base = next((base for base, names in bases.items() if self.name in names), self.command)
        return [*BASES[base].split(), f"--{self.name}={self.value}"]

    def is_in(self, table: dict[tuple[str, str, str], str]) -> bool:
        """Whether a row of ACCEPTED or FINE is about it."""
        of_case = (self.command, self.name, self.value)
        return any(all(map(fnmatch.fnmatchcase, of_case, patterns)) for patterns in table)


def flags_of(command: str) -> dict[str, str]:
    """The flags that a command defines, each with the kind of its values."""
    module = f"terdit_jax.{command}"
    imported = sys.modules.pop(module, None)  # by another test, without its flags
    try:
        with no_flags():
            before = set(flags.FLAGS)
            runpy.run_module(module, run_name=module, alter_sys=True)
            return {name: flags.FLAGS[name].flag_type() for name in sorted(set(flags.FLAGS) - before)}
    finally:
        if imported:
            sys.modules[module] = imported


def values_of(kind: str) -> list[str]:
    """Absurd values of a kind of flag or field."""
    kinds = {
        "int": WHOLE, "float": REAL, "bool": YES_OR_NO, "path": PLACES, "a configuration file": PLACES,
        "comma separated list of strings": LIST,
    }  # fmt: skip
    return kinds.get(kind, TEXT)


def all_cases() -> Iterator[Case]:
    """Every case; those of the configuration are given to both commands that read one."""
    fields = {
        f"config.{name}": "path" if name in PATHS else type(field.default).__name__
        for name, field in sorted(FIELDS.items())
    }
    for command in COMMANDS:
        names = flags_of(command)
        for name, kind in {**names, **(fields if "config" in names else {})}.items():
            for value in values_of(kind):
                yield Case(command, name, value)


class Place:
    """A folder of tiny inputs in which one command runs at a time."""

    def __init__(self, inputs: Path, folder: Path):
        self._inputs, self.folder = inputs, folder
        self._restore()

    def judge(self, case: Case, environment: dict[str, str]) -> dict:
        """Runs a case. Returns its `result`, refused, accepted or FAILED, with the reason and what it printed."""
        command = ["python", "-m", f"terdit_jax.{case.command}", *case.arguments]
        begin = time.monotonic()
        try:
            done = subprocess.run(
                command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=SECONDS,
                stdin=subprocess.DEVNULL, errors="backslashreplace",
            )  # fmt: skip
            status, errors = done.returncode, done.stderr
        except subprocess.TimeoutExpired:
            status, errors = None, ""
        before = set(self._state)
        changed = {path for path, _ in _state(self.folder).items() ^ self._state.items()}
        if changed:
            self._restore()
        wrong = list(_faults(case, status, errors, before, changed))
        return {
            **dataclasses.asdict(case),
            "result": "FAILED" if wrong else "accepted" if status == 0 else "refused",
            "wrong": "; ".join(wrong),
            "said": errors[-600:],
            "seconds": round(time.monotonic() - begin, 1),
        }

    def _restore(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self._inputs, self.folder, symlinks=True)
        self._state = _state(self.folder)


def _faults(case: Case, status: int | None, errors: str, before: set[str], changed: set[str]) -> Iterator[str]:
    """Faults in how a command ended; `changed` are the paths that are new, gone or otherwise than before."""
    if overwritten := sorted(before & changed):
        yield f"overwrote {overwritten[:3]}"
    if status == 0:
        if not case.is_in(ACCEPTED):
            yield "accepted, which no row of ACCEPTED explains"
        return
    if status != 2:
        yield f"status {status}"
    if changed:
        yield f"wrote {sorted(changed)[:3]}"
    lines = errors.splitlines()
    if len(lines) != 1 or not lines[0].startswith("error: "):
        yield f"{len(lines)} lines instead of one"
    elif len(lines[0]) > LONGEST_LINE:
        yield f"a line of {len(lines[0])} characters"
    elif not case.is_in(FINE) and not _names(lines[0], case):
        yield "names neither the flag nor the value"


def _names(line: str, case: Case) -> bool:
    return case.name.rpartition(".")[2] in line or bool(case.value.strip()) and case.value in line


def _state(folder: Path) -> dict[str, tuple]:
    """The contents of a folder: path -> size, time of the last change, and target of a link."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            status = os.lstat(path)
            target = os.readlink(path) if os.path.islink(path) else None
            size = status.st_size if name in files else 0
            found[os.path.relpath(path, folder)] = (size, status.st_mtime_ns * (name in files), target)
    return found


def make_inputs(folder: Path, environment: dict[str, str]) -> None:
    """A data set, a run, models, samples, images, an autoencoder, and places that nothing can be read from."""
    folder.mkdir()
    (folder / "configs").symlink_to(ROOT / "configs")
    for name, path in (("pictures", "pictures"), ("data/digits", "data"), ("sd-vae-ft-ema", "vae")):
        make(name, folder / path)
    export(random_weights(small_config(input_size=8, in_channels=1)), folder / _MODEL_FILE, "packed")
    export(random_weights(small_config(input_size=8), codec="vae"), folder / "latents.safetensors", "packed")
    pictures = np.random.default_rng(0).integers(256, size=(8, 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "samples.npz", arr_0=pictures, labels=np.arange(8))
    for name in ("notes.txt", "reports/notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("notes\n")
    (folder / "empty").mkdir()
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    arguments = BASES["main"].replace("--workdir=new", f"--workdir={_RUN}").split()
    done = subprocess.run(
        ["python", "-m", "terdit_jax.main", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def make_places(root: Path, jobs: int) -> tuple[list[Place], dict[str, str]]:
    """A place for each command that may run at once, and the environment of the commands."""
    (root / "home").mkdir(parents=True)
    path = f"{quick_python()}:{os.environ['PATH']}"
    environment = {**command_environment(programs()), "PATH": path, "HOME": str(root / "home")}
    make_inputs(root / "inputs", environment)
    return [Place(root / "inputs", root / f"place_{job}") for job in range(jobs)], environment


def run(cases: list[Case], root: Path, jobs: int) -> Iterator[dict]:
    """The verdict on each case, as `Place.judge` returns it, in no particular order."""
    places, environment = make_places(root, jobs)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        free: queue.Queue[Place] = queue.Queue()
        for place in places:
            free.put(place)

        def judge(case: Case) -> dict:
            place = free.get()
            try:
                return place.judge(case, environment)
            finally:
                free.put(place)

        for done in concurrent.futures.as_completed([pool.submit(judge, case) for case in cases]):
            yield done.result()


def main() -> int:
    """Runs every case and prints what came of them; 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="commands at a time")
    parser.add_argument("--command", choices=COMMANDS, help="only this one's")
    parser.add_argument("--name", default="*", help="only flags and fields that match this pattern")
    parser.add_argument("--output", type=Path, help="a JSON file for the report")
    options = parser.parse_args()
    cases = [
        case for case in all_cases()
        if options.command in (None, case.command) and fnmatch.fnmatchcase(case.name, options.name)
    ]  # fmt: skip
    begin, results = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="absurd_") as root:
        for result in run(cases, Path(root), options.jobs):
            results.append(result)
            if result["result"] == "FAILED":
                print("FAILED", json.dumps({name: value[:300] if isinstance(value, str) else value
                                            for name, value in result.items()}), flush=True)  # fmt: skip
    report = {
        "command": f"python -m tests.absurd_values --jobs={options.jobs}",
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "cpus": os.cpu_count(),
        "seconds": round(time.monotonic() - begin),
        "commands": {command: dict(_counts(results, command)) for command in COMMANDS},
        "all": dict(_counts(results)),
        "accepted": sorted(
            [result["command"], result["name"], result["value"][:100]]
            for result in results
            if result["result"] == "accepted"
        ),
    }
    print(json.dumps({name: report[name] for name in ("commands", "all", "seconds")}, indent=1))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    return int(bool(report["all"].get("FAILED")))


def _counts(results: list[dict], command: str | None = None) -> Counter:
    of_command = [result for result in results if command in (None, result["command"])]
    names = len({(result["command"], result["name"]) for result in of_command})
    return Counter(result["result"] for result in of_command) | Counter(cases=len(of_command), flags_and_fields=names)


if __name__ == "__main__":
    sys.exit(main())
