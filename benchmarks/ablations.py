"""What each choice of the recipe does: one configuration trained in several ways, at equal steps, over several seeds.

python -m benchmarks.ablations --data=data/cifar10 --steps=1200 --seeds=0,1 --devices=4 --runs_per_device=2 \
  --folder=runs/ablations --output=ablations.json --plot=ablations.png --grid=ablations_samples.png

Every run is `terdit_jax.main` on the configuration with the overrides that VARIANTS names, in a process of its own with
a device of its own, and is judged there as `terdit_jax.evaluate` does it, by one classifier for all, on pictures of its
averaged weights. Rows are written as they come; runs and rows that are there already are not made again. Further
overrides for all runs: --set=model.hidden_size=256,model.depth=6. With --calls=10,20,50,250 pictures are also drawn and
judged at so many calls of the network, by the samplers of the run's objective.
"""

from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
import dataclasses
import datetime
import json
import pathlib
import subprocess
import sys
import threading
import time
from typing import Any

from absl import flags
from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import locked, on_devices
from terdit_jax.data.reader import open_dataset
from terdit_jax.errors import UserError, run_command
from terdit_jax.evaluation.classifier import Classifier, make_classifier, train_classifier
from terdit_jax.evaluation.judge import read_images
from terdit_jax.evaluation.proxy import LabelledImages, classifier_steps, proxy_metrics, sample_labels
from terdit_jax.fast.inference_pass import make_inference_operands
from terdit_jax.fast.modes import choose_numerics
from terdit_jax.inference.contact_sheet import make_contact_sheet
from terdit_jax.inference.images import save_png, to_uint8
from terdit_jax.inference.runtime import Denoiser, place_operands
from terdit_jax.interop.published import Leaves
from terdit_jax.interop.weights import open_weights
from terdit_jax.model.plan import PLAIN
from terdit_jax.parallel.mesh import single_device_mesh
from terdit_jax.paths import define_path
from terdit_jax.ternary.quantize import least_squares_alpha
from terdit_jax.versions import versions

_CONFIG = flags.DEFINE_string("config", "configs/cifar10.py", "Configuration of a ternary model of pictures.")
_DATA = define_path("data", "data/cifar10", "Its data set.")
_STEPS = flags.DEFINE_integer("steps", 4000, "Of each run.", lower_bound=10)
_DROP = flags.DEFINE_float("drop", 0.8, "Share of the steps after which the learning rate drops.", 0, 1)
_SEEDS = flags.DEFINE_list("seeds", "0", "Of the runs.")
_VARIANTS = flags.DEFINE_list("variants", None, "Some of VARIANTS; all if left out.")
_SET = flags.DEFINE_list("set", "", "FIELD=VALUE of the configuration, for all runs.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 5000, "Pictures judged, of each run.", lower_bound=2)
_CALLS = flags.DEFINE_list("calls", "", "Calls of the network at which pictures are judged too.")
_FOLDER = define_path("folder", "runs/ablations", "Where the runs' workdirs are.")
_DEVICES = flags.DEFINE_integer("devices", 1, "GPUs that runs are spread over.", lower_bound=1)
_RUNS_PER_DEVICE = flags.DEFINE_integer("runs_per_device", 1, "Runs that share a GPU.", lower_bound=1)
_MINUTES = flags.DEFINE_float("minutes", 0, "After which no run is begun; 0: no limit.", lower_bound=0)
_PLOT = define_path("plot", None, "Picture to make of all rows.")
_GRID = define_path("grid", None, "PNG to make of pictures of each variant's first seed, one a class.")
_OUTPUT = define_path("output", "ablations.json", "JSON file.")
_ONE = flags.DEFINE_string("one", None, "VARIANT:SEED, in this process; prints its rows. Or classifier.")

TERNARISED, FULL = "ternarised_afterwards", "full_precision"
AS_PUBLISHED, LEAST_SQUARES = ({"model.alpha_init": start} for start in ("normal", "least_squares"))
NO_NORM, EIGHT_BIT = {"model.adaln_rms_norm": False}, {"compute.matmul_dtype": "float8_e4m3fn"}
FLOW = {"diffusion.objective": "flow", "model.learn_sigma": False, "sample.method": "heun", "sample.num_steps": 25}
VARIANTS = {
    FULL: {"model.ternary": False},
    "ternary": AS_PUBLISHED,
    "no_adaln_norm": AS_PUBLISHED | NO_NORM,
    "least_squares": LEAST_SQUARES,
    "eight_bit": LEAST_SQUARES | EIGHT_BIT,
    "no_drop": AS_PUBLISHED | {"optimizer.drop_step": 0},
    "least_squares_no_adaln_norm": LEAST_SQUARES | NO_NORM,
    "eight_bit_no_adaln_norm": LEAST_SQUARES | NO_NORM | EIGHT_BIT,
    TERNARISED: None,  # the weights of FULL, judged beside it
    "flow_full_precision": FLOW | {"model.ternary": False},
    "flow_least_squares": FLOW | LEAST_SQUARES,
}
# objective: (sampler, calls of the network a step, fewest calls, most calls)
SAMPLERS = {
    "ddpm": (("dpmpp_2m", 1, 1, 100), ("ddpm", 1, 100, 1000)),
    "flow": (("euler", 1, 1, 1000), ("heun", 2, 1, 100), ("sde", 1, 100, 1000)),
}
QUARTERS = tuple(f"loss_t{k}of4" for k in range(1, 5))
_SPANS = ("0-249", "250-499", "500-749", "750-999")


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    if _ONE.value:
        for row in make_rows(_ONE.value):
            print("row " + json.dumps(row), flush=True)
        return
    names = _VARIANTS.value or list(VARIANTS)
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UserError(f"--variants: no {unknown[0]!r}, give some of {', '.join(VARIANTS)}")
    path = pathlib.Path(_OUTPUT.value)
    content = json.loads(path.read_text()) if path.exists() else {"rows": []}
    content |= {
        "command": " ".join(["python -m benchmarks.ablations", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "versions": versions("jax", "jaxlib", "flax", "optax"),
    }
    known = {(row["variant"], row["seed"]) for row in content["rows"]}
    wanted = [(name, seed) for seed in _SEEDS.value for name in names if (name, seed) not in known]
    runs = dict.fromkeys((FULL if name == TERNARISED else name, seed) for name, seed in wanted)
    pathlib.Path(_FOLDER.value).mkdir(parents=True, exist_ok=True)
    for rows in run_all(["classifier", *(f"{name}:{seed}" for name, seed in runs)] if runs else []):
        for row in rows:
            if "failed" not in row and (row["variant"], row["seed"]) in wanted:
                content["rows"].append(row)
                path.write_text(json.dumps(content, indent=1) + "\n")
            print(json.dumps({k: v for k, v in row.items() if k != "curve"}), flush=True)
    print(table(content["rows"]), flush=True)
    if _GRID.value:
        grid(_SEEDS.value[0], _GRID.value)
    if _PLOT.value:
        plot(content["rows"], _PLOT.value)


def run_all(jobs: list[str]) -> Iterator[list[dict]]:
    """Gives the rows of each job as it ends; a job goes to the device that has fewest."""
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

    with concurrent.futures.ThreadPoolExecutor(_DEVICES.value * _RUNS_PER_DEVICE.value) as pool:
        for future in concurrent.futures.as_completed([pool.submit(run, job) for job in jobs]):
            yield future.result()


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
        scores, pictures = judge(model)
        np.save(_pictures_file(variant, seed), pictures)
        place = pathlib.Path(_FOLDER.value) / f"{variant}-{seed}-calls.json"
        yield row | (trained if variant == name else {}) | scores | by_calls(model, judge, place)


def by_calls(model: Denoiser, judge: Callable[..., tuple[dict, np.ndarray]], place: pathlib.Path) -> dict:
    """Scores of pictures drawn with each number of --calls, by each sampler that is made for so many. They are written
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
    """Of a run."""
    return pathlib.Path(_FOLDER.value) / f"{name}-{seed}"


def train(name: str, seed: str) -> dict:
    """Trains a variant, unless it has been, and returns its curve."""
    every = max(1, _STEPS.value // 40)
    fields = {
        "seed": seed,
        "data.dir": _DATA.value,
        "train.num_steps": _STEPS.value,
        "optimizer.drop_step": round(_DROP.value * _STEPS.value),
        "checkpoint.every": _STEPS.value,
        "log.every": every,
        "log.samples_every": 0,
        "log.heldout_every": _STEPS.value,
        "log.tensorboard": False,
        **dict(setting.split("=", 1) for setting in _SET.value if setting),
        **VARIANTS[name],
    }
    place = workdir(name, seed)
    command = [sys.executable, "-m", "terdit_jax.main", f"--config={_CONFIG.value}", f"--workdir={place}"]
    went_on = (place / "metrics.jsonl").exists()
    begin = time.perf_counter()
    subprocess.run([*command, *(f"--config.{field}={value}" for field, value in fields.items())], check=True)
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    logs = [line for line in lines if "loss" in line]
    rates = [line["timing"]["images_per_second"] for line in logs if line.get("timing", {}).get("images_per_second")]
    heldout = next((line for line in reversed(lines) if "heldout_loss" in line), {})
    return {
        "curve": {key: [line.get(key) for line in logs] for key in ("step", "loss", *QUARTERS)},
        "heldout_loss": heldout.get("heldout_loss"),
        "heldout_loss_ema": heldout.get("heldout_loss_ema"),
        "images_per_second": float(np.median(rates)) if rates else None,
        "train_seconds": None if went_on else round(time.perf_counter() - begin, 1),
    }


def load(name: str, seed: str) -> Denoiser:
    """The averaged weights of a run, or those of the full-precision one ternarised as they are, as `load_model` has
    them by itself: the trained model's function in bfloat16, whatever the variant; float32 on CPUs."""
    weights = open_weights(workdir(FULL if name == TERNARISED else name, seed))
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    config, leaves = dataclasses.replace(weights.model, dtype=dtype), weights.leaves()
    if name == TERNARISED:
        config, leaves = dataclasses.replace(config, ternary=True, adaln_rms_norm=False), ternarised(leaves)
    mesh = single_device_mesh()
    numerics = choose_numerics("auto", config, mesh)
    operands = place_operands(config, leaves, mesh)
    if numerics:
        operands = make_inference_operands(config, numerics, operands)
    return Denoiser(config, weights.description, mesh, PLAIN, numerics, operands)


def ternarised(leaves: Leaves) -> Leaves:
    """A full-precision model's leaves as a ternary model's without an RMSNorm after adaLN: alpha by least squares."""
    matrices = ("attention/w", "feed_forward/w", "adaLN_modulation")
    for path, leaf in leaves:
        yield path, leaf
        if path.startswith("blocks/") and path.endswith("/weight") and any(part in path for part in matrices):
            yield path.removesuffix("weight") + "alpha", np.asarray(jax.vmap(least_squares_alpha)(jnp.asarray(leaf)))


def make_judge():
    """A function from a model to its scores and ten of its pictures; the classifier is trained once for all."""
    dataset = open_dataset(_DATA.value)
    num_classes = dataset.metadata.num_classes
    train, heldout = (read_images(dataset, split) for split in ("train", "heldout"))
    classifier = _shared_classifier(train, num_classes)
    labels = sample_labels(heldout.labels, _NUM_SAMPLES.value)
    shown = np.searchsorted(labels, np.arange(num_classes)).clip(max=len(labels) - 1)

    def judge(model: Denoiser, **settings: Any) -> tuple[dict, np.ndarray]:
        samples = LabelledImages(np.clip(model.draw(labels, seed=0, **settings), -1, 1), labels)
        scores = proxy_metrics(train, heldout, samples, num_classes, classifier=classifier)
        keep = ("frechet_distance", "frechet_distance_floor", "frechet_ratio", "agreement")
        return {name: scores[f"classifier_{name}"] for name in keep}, to_uint8(samples.images[shown])

    return judge


def _shared_classifier(train: LabelledImages, num_classes: int) -> Classifier:
    """Trained by the first who asks: two trainings on a GPU do not give the same bits."""
    path = pathlib.Path(_FOLDER.value) / "classifier.msgpack"
    with locked(f"{path}.lock"):
        if not path.exists():
            steps = classifier_steps(len(train.images))
            trained = train_classifier(train.images, train.labels, num_classes, 0, steps)
            path.write_bytes(serialization.msgpack_serialize(jax.device_get(trained.params)))
        params = serialization.msgpack_restore(path.read_bytes())
        return make_classifier(train.images.shape[1:], num_classes, params)


def _pictures_file(name: str, seed: str) -> pathlib.Path:
    return pathlib.Path(_FOLDER.value) / f"{name}-{seed}-pictures.npy"


def grid(seed: str, path: str) -> None:
    """Pictures of each variant, one a class, side by side: the same noise and label below each other."""
    rows = {name: np.load(file) for name in VARIANTS if (file := _pictures_file(name, seed)).exists()}
    if rows:
        views = np.stack(list(rows.values()), axis=1)  # classes, variants, H, W, C
        save_png(path, make_contact_sheet(list(views), list(rows)))


def table(rows: list[dict]) -> str:
    """Means over seeds, with the spread where there are several; losses are means over the last tenth of the steps."""
    columns = ("Variant", "seeds", "loss", *(f"t {span}" for span in _SPANS), "held-out, EMA", "Frechet distance")
    columns += ("read as the label asked for", "images/s")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name in VARIANTS:
        mine = [row for row in rows if row["variant"] == name]
        if mine:
            cells = [name, str(len(mine))]
            for key in ("loss", *QUARTERS):
                cells.append(_spread([_last(row["curve"][key]) for row in mine if "curve" in row], "{:.4f}"))
            forms = {"heldout_loss_ema": "{:.4f}", "frechet_distance": "{:.2f}", "agreement": "{:.1%}"}
            for key, form in (forms | {"images_per_second": "{:,.0f}"}).items():
                cells.append(_spread([row[key] for row in mine if row.get(key) is not None], form))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _last(values: list[float]) -> float:
    return float(np.mean(values[-max(1, len(values) // 10) :]))


def _spread(values: list[float], form: str) -> str:
    if not values:
        return ""
    text = form.format(np.mean(values))
    return text if len(values) == 1 else f"{text} ± {form.format(np.std(values, ddof=1))}"


def plot(rows: list[dict], path: str) -> None:
    """Loss by quarter of the timesteps, a line a seed, in the colours of the names below; Frechet distances there."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in VARIANTS if any(row["variant"] == name for row in rows)]
    layout = [[*QUARTERS], ["distance"] * 4]
    figure, panels = plt.subplot_mosaic(layout, figsize=(12, 6), dpi=110, layout="constrained")
    for quarter, span in zip(QUARTERS, _SPANS, strict=True):
        for row in rows:
            if "curve" in row:
                values = np.array(row["curve"][quarter], float)
                panels[quarter].plot(row["curve"]["step"], values, color=f"C{names.index(row['variant'])}", linewidth=1)
        panels[quarter].set(title=f"loss, t {span}", xlabel="step", yscale="log")
    bars = panels["distance"]
    for place, name in enumerate(names):
        values = [row["frechet_distance"] for row in rows if row["variant"] == name]
        bars.barh(place, np.mean(values), color=f"C{place}", alpha=0.6)
        bars.plot(values, [place] * len(values), "k.", markersize=4)
    bars.set_yticks(range(len(names)), names)
    for place, label in enumerate(bars.get_yticklabels()):
        label.set_color(f"C{place}")
    bars.invert_yaxis()
    bars.set(title="Frechet distance in a classifier's features: each seed, and their mean", xscale="log")
    figure.savefig(path)


if __name__ == "__main__":
    run_command(main)
