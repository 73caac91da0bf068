"""What each choice of the recipe does: one configuration trained in several ways, at equal steps, over several seeds.

python -m benchmarks.ablations --data=data/cifar10 --steps=4000 --seeds=0,1 --folder=runs/ablations \
  --output=docs/benchmarks/ablations.json --plot=docs/images/ablations.png

Every run is `terdit_jax.main` on the configuration with the overrides that VARIANTS names, and is judged as
`terdit_jax.evaluate` does it, by one classifier for all, on pictures of its averaged weights. Runs and rows that are
there already are not made again. Further overrides for all runs: --set=model.hidden_size=256,model.depth=6.
"""

from collections.abc import Sequence
import dataclasses
import datetime
import functools
import json
import pathlib
import subprocess
import sys
import time

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import versions
from terdit_jax.data.reader import open_dataset
from terdit_jax.errors import UserError, run_command
from terdit_jax.evaluation.classifier import train_classifier
from terdit_jax.evaluation.judge import read_pictures
from terdit_jax.evaluation.proxy import Pictures, classifier_steps, proxy_metrics, sample_labels
from terdit_jax.inference.runtime import Denoiser, load_model, place_operands
from terdit_jax.interop.weights import open_weights
from terdit_jax.parallel.mesh import single_device_mesh
from terdit_jax.ternary.quantize import least_squares_alpha

_CONFIG = flags.DEFINE_string("config", "configs/cifar10.py", "Configuration of a ternary model of pictures.")
_DATA = flags.DEFINE_string("data", "data/cifar10", "Its data set.")
_STEPS = flags.DEFINE_integer("steps", 4000, "Of each run.", lower_bound=10)
_DROP = flags.DEFINE_float("drop", 0.8, "Share of the steps behind which the learning rate drops.", 0, 1)
_SEEDS = flags.DEFINE_list("seeds", "0", "Of the runs.")
_VARIANTS = flags.DEFINE_list("variants", None, "Some of VARIANTS; all if left out.")
_SET = flags.DEFINE_list("set", "", "FIELD=VALUE of the configuration, for all runs.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 5000, "Pictures judged, of each run.", lower_bound=2)
_FOLDER = flags.DEFINE_string("folder", "runs/ablations", "Where the runs' workdirs are.")
_PLOT = flags.DEFINE_string("plot", None, "Picture to make of all rows.")
_OUTPUT = flags.DEFINE_string("output", "ablations.json", "JSON file.")

TERNARISED = "ternarised_afterwards"
VARIANTS = {
    "full_precision": {"model.ternary": False},
    "ternary": {"model.alpha_init": "normal"},  # as published
    "no_adaln_norm": {"model.alpha_init": "normal", "model.adaln_rms_norm": False},
    "least_squares": {"model.alpha_init": "least_squares"},
    "least_squares_no_adaln_norm": {"model.alpha_init": "least_squares", "model.adaln_rms_norm": False},
    "no_drop": {"model.alpha_init": "normal", "optimizer.drop_step": 0},
    TERNARISED: None,  # the weights of "full_precision"
}
QUARTERS = tuple(f"loss_t{k}of4" for k in range(1, 5))


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    names = _VARIANTS.value or list(VARIANTS)
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UserError(f"--variants: no {unknown[0]!r}, give some of {', '.join(VARIANTS)}")
    path = pathlib.Path(_OUTPUT.value)
    content = json.loads(path.read_text()) if path.exists() else {"rows": []}
    known = {(row["variant"], row["seed"]) for row in content["rows"]}
    content |= {
        "command": " ".join(["python -m benchmarks.ablations", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "versions": versions("jax", "jaxlib", "flax", "optax"),
    }
    judge = functools.cache(make_judge)
    for seed in _SEEDS.value:
        for name in names:
            if (name, seed) in known:
                continue
            row = {"variant": name, "seed": seed, "steps": _STEPS.value}
            if name != TERNARISED:
                row |= train(name, seed)
            content["rows"].append(row | judge()(load(name, seed)))
            print(json.dumps({k: v for k, v in content["rows"][-1].items() if k != "curve"}), flush=True)
            path.write_text(json.dumps(content, indent=1) + "\n")
    print(table(content["rows"]))
    if _PLOT.value:
        plot(content["rows"], _PLOT.value)


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
        **dict(setting.split("=", 1) for setting in _SET.value if setting),
        **VARIANTS[name],
    }
    place = workdir(name, seed)
    command = [sys.executable, "-m", "terdit_jax.main", f"--config={_CONFIG.value}", f"--workdir={place}"]
    begin = time.perf_counter()
    subprocess.run([*command, *(f"--config.{field}={value}" for field, value in fields.items())], check=True)
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    curve = {key: [line.get(key) for line in lines if "loss" in line] for key in ("step", "loss", *QUARTERS)}
    return {"curve": curve, "train_seconds": round(time.perf_counter() - begin, 1)}


def load(name: str, seed: str) -> Denoiser:
    """The averaged weights of a run, or those of the full-precision one ternarised as they are."""
    return ternarised(workdir("full_precision", seed)) if name == TERNARISED else load_model(workdir(name, seed))


def ternarised(place: pathlib.Path) -> Denoiser:
    """A full-precision run as a ternary model: absmean codes, least-squares alpha, no RMSNorm behind adaLN."""
    full = load_model(place)
    config = dataclasses.replace(full.config, ternary=True, adaln_rms_norm=False)
    matrices = ("attention/w", "feed_forward/w", "adaLN_modulation")

    def leaves():
        for path, leaf in open_weights(place).leaves():
            yield path, leaf
            if path.startswith("blocks/") and path.endswith("/weight") and any(part in path for part in matrices):
                yield (
                    path.removesuffix("weight") + "alpha",
                    np.asarray(jax.vmap(least_squares_alpha)(jnp.asarray(leaf))),
                )

    operands = place_operands(config, leaves(), single_device_mesh())
    return dataclasses.replace(full, config=config, operands=operands, numerics=None)


def make_judge():
    """A function from a model to its scores; the classifier is trained once."""
    dataset = open_dataset(_DATA.value)
    num_classes = dataset.metadata.num_classes
    train, heldout = (read_pictures(dataset, split) for split in ("train", "heldout"))
    classifier = train_classifier(train.images, train.labels, num_classes, 0, classifier_steps(len(train.images)))
    labels = sample_labels(heldout.labels, _NUM_SAMPLES.value)

    def judge(model: Denoiser) -> dict:
        samples = Pictures(np.clip(model.draw(labels, seed=0), -1, 1), labels)
        scores = proxy_metrics(train, heldout, samples, num_classes, classifier=classifier)
        keep = ("frechet_distance", "frechet_distance_floor", "frechet_ratio", "agreement")
        return {name: scores[f"classifier_{name}"] for name in keep}

    return judge


def table(rows: list[dict]) -> str:
    """Means over seeds, with the spread where there are several."""
    lines = ["| Variant | seeds | last loss | Frechet distance | read as the label asked for |", "|---" * 5 + "|"]
    for name in VARIANTS:
        mine = [row for row in rows if row["variant"] == name]
        if mine:
            last = [np.mean(row["curve"]["loss"][-4:]) for row in mine if "curve" in row]
            distance, agreement = ([row[key] for row in mine] for key in ("frechet_distance", "agreement"))
            cells = [name, str(len(mine)), _spread(last, "{:.4f}"), _spread(distance, "{:.2f}")]
            lines.append("| " + " | ".join([*cells, _spread(agreement, "{:.1%}")]) + " |")
    return "\n".join(lines)


def _spread(values: list[float], form: str) -> str:
    if not values:
        return ""
    text = form.format(np.mean(values))
    return text if len(values) == 1 else f"{text} ± {form.format(np.std(values, ddof=1))}"


def plot(rows: list[dict], path: str) -> None:
    """Loss by quarter of the timesteps, relative to the first variant's; Frechet distances beside."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in VARIANTS if any(row["variant"] == name for row in rows)]
    figure, panels = plt.subplots(1, 5, figsize=(17, 3.6), dpi=110, width_ratios=[1, 1, 1, 1, 1.3])
    for panel, quarter, span in zip(panels, QUARTERS, ("0-249", "250-499", "500-749", "750-999"), strict=False):
        for name in names:
            curves = [row["curve"] for row in rows if row["variant"] == name and "curve" in row]
            if curves:
                mean = np.mean([np.array(curve[quarter], float) for curve in curves], axis=0)
                panel.plot(curves[0]["step"], mean, label=name, color=f"C{names.index(name)}", linewidth=1.2)
        panel.set(title=f"loss, t {span}", xlabel="step", yscale="log")
    panels[0].legend(fontsize=6)
    for place, name in enumerate(names):
        values = [row["frechet_distance"] for row in rows if row["variant"] == name]
        panels[-1].barh(place, np.mean(values), color=f"C{place}", alpha=0.6)
        panels[-1].plot(values, [place] * len(values), "k.", markersize=4)
    panels[-1].set_yticks(range(len(names)), names, fontsize=7)
    panels[-1].invert_yaxis()
    panels[-1].set(title="Frechet distance, classifier features", xscale="log")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    run_command(main)
