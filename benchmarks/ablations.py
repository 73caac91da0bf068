"""Measures what each choice of the recipe does: one configuration trained in several ways, over several seeds.

python -m benchmarks.ablations --data=data/cifar10 --steps=16000 --seeds=0,1 --devices=2 --runs_per_device=2 \
  --variants=full_precision,least_squares,alpha_per_channel,teacher,teacher@time --set=sample.cfg_scale=1.5 \
  --folder=runs/ablations --output=ablations.json --plot=ablations.png --grid=ablations_samples.png

Every run is `terdit_jax.main` on the configuration with the overrides of `ablation_variants`, in a process of its own
with a device of its own, and is judged there as `terdit_jax.evaluate` does it, by one classifier for all, on images of
its averaged weights. Variants train for equal steps; VARIANT@time trains for as long as least_squares, by the rates of
both, which on shared GPUs are as alike as their neighbours. A run that starts from the full-precision one, or learns
from it, begins when that has ended, whose time is not counted. Rows are written as they
come; runs and rows that exist are not made again, and a run that was stopped goes on from its last checkpoint. Further
overrides for all runs: --set=model.hidden_size=256,model.depth=6. With --calls=10,20,50,250, images are also drawn and
judged with these numbers of calls of the network, by the samplers of the run's objective. Distances of different days
compare only if one judge gave them: keep FOLDER/classifier.msgpack and give it as --classifier.
"""

from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
import dataclasses
import datetime
import json
import pathlib
import shutil
import subprocess
import sys
import threading
import time
from typing import Any

from absl import flags
from flax import serialization
import jax
import numpy as np

from benchmarks.ablation_report import QUARTERS, grid, names_of, plot, table
from benchmarks.ablation_variants import (
    AT_EQUAL_TIME,
    FULL,
    REFERENCE,
    SAMPLERS,
    TERNARISED,
    VARIANTS,
    needs,
    overrides,
    split_name,
)
from benchmarks.machine import locked, on_devices
from terdit_jax.data.reader import open_dataset
from terdit_jax.diffusion.objective import make_objective
from terdit_jax.errors import UserError, run_command
from terdit_jax.evaluation.classifier import Classifier, make_classifier, train_classifier
from terdit_jax.evaluation.judge import read_images
from terdit_jax.evaluation.manifold import precision_recall
from terdit_jax.evaluation.proxy import LabelledImages, classifier_steps, proxy_metrics, sample_labels
from terdit_jax.inference.images import to_uint8
from terdit_jax.inference.runtime import Denoiser, describe_denoiser, load_denoiser
from terdit_jax.interop.published import params_leaves
from terdit_jax.interop.start import master_params, ternarised_params
from terdit_jax.interop.weights import open_weights
from terdit_jax.parallel.mesh import single_device_mesh
from terdit_jax.paths import define_path
from terdit_jax.versions import versions

_CONFIG = flags.DEFINE_string("config", "configs/cifar10.py", "Configuration of a ternary model of images.")
_DATA = define_path("data", "data/cifar10", "Its data set.")
_STEPS = flags.DEFINE_integer("steps", 4000, "Of each run.", lower_bound=10)
_DROP = flags.DEFINE_float("drop", 0.8, "Share of the steps after which the learning rate drops.", 0, 1)
_SEEDS = flags.DEFINE_list("seeds", "0", "Of the runs.")
_VARIANTS = flags.DEFINE_list("variants", None, "Some of VARIANTS, or VARIANT@time; all of VARIANTS if left out.")
_SET = flags.DEFINE_list("set", "", "FIELD=VALUE of the configuration, for all runs.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 5000, "Images judged, of each run.", lower_bound=2)
_CALLS = flags.DEFINE_list("calls", "", "Calls of the network at which images are judged too.")
_FOLDER = define_path("folder", "runs/ablations", "Where the runs' workdirs are.")
_DEVICES = flags.DEFINE_integer("devices", 1, "GPUs that runs are spread over.", lower_bound=1)
_RUNS_PER_DEVICE = flags.DEFINE_integer("runs_per_device", 1, "Runs that share a GPU.", lower_bound=1)
_MINUTES = flags.DEFINE_float("minutes", 0, "After which no run is begun; 0: no limit.", lower_bound=0)
_CLASSIFIER = define_path("classifier", None, "Trained judge, from an earlier --folder; trained anew if left out.")
_PLOT = define_path("plot", None, "PNG to draw of all rows.")
_GRID = define_path("grid", None, "PNG of images of each variant's first seed, one a class.")
_OUTPUT = define_path("output", "ablations.json", "JSON file.")
_CLASSIFIER_FILE = "classifier.msgpack"
_ONE = flags.DEFINE_string("one", None, "VARIANT:SEED, in this process; prints its rows. Or classifier.")


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    if _ONE.value:
        for row in make_rows(_ONE.value):
            print("row " + json.dumps(row), flush=True)
        return
    names = _VARIANTS.value or list(VARIANTS)
    if unknown := [name for name in names if split_name(name)[0] not in VARIANTS]:
        raise UserError(f"--variants: no {unknown[0]!r}, give some of {', '.join(VARIANTS)}")
    if timeless := [name for name in names if name in (f"{TERNARISED}{AT_EQUAL_TIME}", f"{REFERENCE}{AT_EQUAL_TIME}")]:
        raise UserError(f"--variants: {timeless[0]} is not trained for a time of its own: leave {AT_EQUAL_TIME} out")
    path = pathlib.Path(_OUTPUT.value)
    content = json.loads(path.read_text()) if path.exists() else {"rows": []}
    content |= {
        "command": " ".join(["python -m benchmarks.ablations", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "versions": versions("jax", "jaxlib", "flax", "optax"),
    }
    known = {(row["variant"], row["seed"]) for row in content["rows"]}
    wanted = [(name, seed) for seed in _SEEDS.value for name in names if (name, seed) not in known]
    runs = dict.fromkeys(run for name, seed in wanted for run in runs_for(name, seed))
    # A run that another needs is there already if it has been judged; its workdir may have been lost all the same.
    needless = known - {(FULL, seed) for name, seed in wanted if name == TERNARISED}
    runs = [(name, seed) for name, seed in runs if (name, seed) not in needless or not workdir(name, seed).exists()]
    folder = pathlib.Path(_FOLDER.value)
    folder.mkdir(parents=True, exist_ok=True)
    if _CLASSIFIER.value:
        take_classifier(pathlib.Path(_CLASSIFIER.value), folder / _CLASSIFIER_FILE)
    for rows in run_all(["classifier", *(f"{name}:{seed}" for name, seed in runs)] if runs else []):
        for row in rows:
            if "failed" not in row and (row["variant"], row["seed"]) not in known:
                content["rows"].append(row)
                path.write_text(json.dumps(content, indent=1) + "\n")
            print(json.dumps({k: v for k, v in row.items() if k != "curve"}), flush=True)
    print(table(content["rows"]), flush=True)
    if _GRID.value:
        seed = _SEEDS.value[0]
        files = {name: _images_file(name, seed) for name in names_of(content["rows"])}
        grid({name: np.load(file) for name, file in files.items() if file.exists()}, _GRID.value)
    if _PLOT.value:
        plot(content["rows"], _PLOT.value)


def take_classifier(given: pathlib.Path, place: pathlib.Path) -> None:
    """Copies a trained judge to where all runs look for theirs.

    Raises:
      UserError: there is none, or the runs there have been judged by another.
    """
    if not given.is_file():
        raise UserError(f"--classifier={given}: no such file")
    if not place.exists():
        shutil.copyfile(given, place)
    elif place.read_bytes() != given.read_bytes():
        raise UserError(f"--classifier={given}: runs in {place.parent} have another judge, give a new --folder")


def runs_for(name: str, seed: str) -> list[tuple[str, str]]:
    """The runs (variant, seed) that a row comes of, each after those that it needs."""
    needed = dict.fromkeys(run for need in needs(name) for run in runs_for(need, seed))
    return [*needed] if name == TERNARISED else [*needed, (name, seed)]


def run_all(jobs: list[str]) -> Iterator[list[dict]]:
    """Gives the rows of each job as it ends. A job begins when those that it needs have ended, on the device that has
    fewest; one whose need has failed fails too."""
    begin, lock = time.monotonic(), threading.Lock()
    at_work = [0] * _DEVICES.value

    def run(job: str) -> list[dict]:
        if _MINUTES.value and time.monotonic() - begin > 60 * _MINUTES.value:
            return [{"run": job, "failed": f"not begun within --minutes={_MINUTES.value}"}]
        with lock:
            device = min(range(len(at_work)), key=at_work.__getitem__)
            at_work[device] += 1
        try:
            return _in_own_process(job, device)
        finally:
            with lock:
                at_work[device] -= 1

    waiting, running, failed = list(jobs), {}, set()
    with concurrent.futures.ThreadPoolExecutor(_DEVICES.value * _RUNS_PER_DEVICE.value) as pool:
        while waiting or running:
            unfinished = {*waiting, *running.values()}
            for job in [job for job in waiting if not unfinished.intersection(_needed(job))]:
                waiting.remove(job)
                if lost := failed.intersection(_needed(job)):
                    failed.add(job)
                    yield [{"run": job, "failed": f"needs {lost.pop()}, which failed"}]
                else:
                    running[pool.submit(run, job)] = job
            for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
                job, rows = running.pop(future), future.result()
                if any("failed" in row for row in rows):
                    failed.add(job)
                yield rows


def _needed(job: str) -> list[str]:
    name, _, seed = job.partition(":")
    return [f"{need}:{seed}" for need in needs(name)] if seed else []


def _in_own_process(job: str, device: int) -> list[dict]:
    shared = ("config", "data", "steps", "drop", "num_samples", "folder")
    command = [sys.executable, "-m", "benchmarks.ablations", f"--one={job}", f"--set={','.join(_SET.value)}"]
    command += [f"--{name}={','.join(flags.FLAGS[name].value or [])}" for name in ("calls", "variants")]
    command += [f"--{name}={flags.FLAGS[name].value}" for name in shared]
    log = pathlib.Path(_FOLDER.value) / f"{job.replace(':', '-')}.log"
    environment = on_devices([device]) if _DEVICES.value * _RUNS_PER_DEVICE.value > 1 else None
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    lines = log.read_text().splitlines()
    rows = [json.loads(line[4:]) for line in lines if line.startswith("row ")]
    if done.returncode:
        rows.append({"run": job, "failed": lines[-1][:300] if lines else "no output"})
    return rows


def make_rows(job: str) -> Iterator[dict]:
    """The rows of VARIANT:SEED; no row of "classifier", which is only made."""
    if job == "classifier":
        make_judge()
        return
    name, _, seed = job.partition(":")
    trained = train(name, seed)
    judge = make_judge()
    ternarises = name == FULL and TERNARISED in (_VARIANTS.value or VARIANTS)
    for variant in (name, TERNARISED) if ternarises else (name,):
        row = {"variant": variant, "seed": seed, "steps": _STEPS.value, "device": jax.devices()[0].device_kind}
        model = load(variant, seed)
        scores, images = judge(model)
        np.save(_images_file(variant, seed), images)
        place = pathlib.Path(_FOLDER.value) / f"{variant}-{seed}-calls.json"
        yield row | (trained if variant == name else {}) | scores | by_calls(model, judge, place)


def by_calls(model: Denoiser, judge: Callable[..., tuple[dict, np.ndarray]], place: pathlib.Path) -> dict:
    """Scores of images drawn with each number of --calls, by each sampler that is made for it. They are written
    to `place` as they come; those that are there already are not made again."""
    scores = json.loads(place.read_text()) if place.exists() else {}
    for calls in map(int, _CALLS.value):
        for method, calls_a_step, fewest, most in SAMPLERS[model.description.diffusion.objective]:
            if fewest <= calls <= most and f"{method} {calls}" not in scores:
                settings = {"method": method, "num_steps": calls // calls_a_step}
                scores[f"{method} {calls}"] = judge(model, **settings)[0]
                place.write_text(json.dumps(scores))
    return {"by_calls": scores} if scores else {}


def workdir(name: str, seed: str) -> pathlib.Path:
    """The folder of a run."""
    return pathlib.Path(_FOLDER.value) / f"{name}-{seed}"


def train(name: str, seed: str) -> dict:
    """Trains a variant, unless it has been, and returns its curves and its speed."""
    steps = _steps(name, seed)
    fields = {
        "seed": seed,
        "data.dir": _DATA.value,
        "train.num_steps": steps,
        "optimizer.drop_step": round(_DROP.value * steps),
        "checkpoint.every": max(1, steps // 4),
        "log.every": max(1, steps // 40),
        "log.samples_every": 0,
        "log.heldout_every": max(1, steps // 8),
        "log.writers": "",
        **dict(setting.split("=", 1) for setting in _SET.value if setting),
        **overrides(name, lambda other: str(workdir(other, seed)), steps),
    }
    place = workdir(name, seed)
    command = [sys.executable, "-m", "terdit_jax.main", f"--config={_CONFIG.value}", f"--workdir={place}"]
    went_on = (place / "metrics.jsonl").exists()
    begin = time.perf_counter()
    subprocess.run([*command, *(f"--config.{field}={value}" for field, value in fields.items())], check=True)
    seconds = None if went_on else round(time.perf_counter() - begin, 1)
    return {"steps": steps, "train_seconds": seconds} | _measured(name, seed)


def _steps(name: str, seed: str) -> int:
    variant, at_equal_time = split_name(name)
    if not at_equal_time:
        return _STEPS.value
    own, reference = (_measured(run, seed)["images_per_second"] for run in (variant, REFERENCE))
    return round(_STEPS.value * own / reference)


def _measured(name: str, seed: str) -> dict:
    """Curves and speed of a run that has ended, of its metrics."""
    lines = [json.loads(line) for line in (workdir(name, seed) / "metrics.jsonl").read_text().splitlines()]
    logs, heldout = ([line for line in lines if key in line] for key in ("loss", "heldout_loss"))
    rates = [line["timing"]["images_per_second"] for line in logs if line.get("timing", {}).get("images_per_second")]
    last = heldout[-1] if heldout else {}
    return {
        "curve": {key: [line.get(key) for line in logs] for key in ("step", "loss", *QUARTERS)},
        "heldout": {
            "step": [line["step"] for line in heldout],
            "loss": [line["heldout_loss"] for line in heldout],
            "loss_ema": [line["heldout_loss_ema"] for line in heldout],
        },
        "heldout_loss": last.get("heldout_loss"),
        "heldout_loss_ema": last.get("heldout_loss_ema"),
        "images_per_second": float(1 / np.mean(1 / np.array(rates))) if rates else None,
        "batch_size": json.loads((workdir(name, seed) / "config.json").read_text())["train"]["batch_size"],
    }


def load(name: str, seed: str) -> Denoiser:
    """The averaged weights of a run, or those of the full-precision one ternarised as they are, as `load_model` has
    them by itself: the trained model's function in bfloat16, whatever the variant; float32 on CPUs."""
    weights = open_weights(workdir(FULL if name == TERNARISED else name, seed))
    description, leaves = weights.description, weights.leaves()
    if name == TERNARISED:
        model = dataclasses.replace(description.model, ternary=True, adaln_rms_norm=False)
        objective = make_objective(description.diffusion, model.learn_sigma)
        params = ternarised_params(model, model.num_classes, objective, master_params(description.model, leaves))
        description, leaves = dataclasses.replace(description, model=model), params_leaves(params)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return load_denoiser(describe_denoiser(description, single_device_mesh(), dtype, "auto"), leaves)


def make_judge():
    """Returns a function from a model to its scores and an image of each class; the classifier is trained once for
    all."""
    dataset = open_dataset(_DATA.value)
    num_classes = dataset.metadata.num_classes
    train, heldout = (read_images(dataset, split) for split in ("train", "heldout"))
    classifier = _shared_classifier(train, num_classes)
    real = classifier.features(heldout.images)
    labels = sample_labels(heldout.labels, _NUM_SAMPLES.value)
    shown = np.searchsorted(labels, np.arange(num_classes)).clip(max=len(labels) - 1)

    def judge(model: Denoiser, **settings: Any) -> tuple[dict, np.ndarray]:
        samples = LabelledImages(np.clip(model.draw(labels, seed=0, **settings), -1, 1), labels)
        scores = proxy_metrics(train, heldout, samples, num_classes, classifier=classifier)
        keep = ("frechet_distance", "frechet_distance_floor", "frechet_ratio", "agreement")
        manifolds = precision_recall(real, classifier.features(samples.images))
        return {name: scores[f"classifier_{name}"] for name in keep} | manifolds._asdict(), to_uint8(
            samples.images[shown]
        )

    return judge


def _shared_classifier(train: LabelledImages, num_classes: int) -> Classifier:
    """Trained by the first who asks: two trainings on a GPU do not give the same bits."""
    path = pathlib.Path(_FOLDER.value) / _CLASSIFIER_FILE
    with locked(f"{path}.lock"):
        if not path.exists():
            steps = classifier_steps(len(train.images))
            trained = train_classifier(train.images, train.labels, num_classes, 0, steps)
            path.write_bytes(serialization.msgpack_serialize(jax.device_get(trained.params)))
        params = serialization.msgpack_restore(path.read_bytes())
        return make_classifier(train.images.shape[1:], num_classes, params)


def _images_file(name: str, seed: str) -> pathlib.Path:
    return pathlib.Path(_FOLDER.value) / f"{name}-{seed}-images.npy"


if __name__ == "__main__":
    run_command(main)
