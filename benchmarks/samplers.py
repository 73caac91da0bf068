"""Quality against denoising steps: every sampler, on Gaussian mixtures in closed form and on the digits model.

python -m benchmarks.samplers --parts=line,digits_mixture,digits --workdir=runs/digits --output=samplers.json
python -m benchmarks.samplers --parts= --output=samplers.json --plot=docs/images/samplers.png     # matplotlib
python -m benchmarks.samplers --parts=digits --batch_size=25000 --num_samples=100000 ...          # on a GPU

line: three Gaussians on a line, whose best denoiser is known; the distance (Wasserstein-1) of what a deterministic
  sampler makes of the quantiles of its noise from the quantiles of the truth, without Monte-Carlo error.
digits_mixture: ten Gaussians in 64 dimensions with the digits' means and covariances. The denoiser is the best one of a
  mixture that was estimated from as many draws as there are digits: off the truth as far as data allow, as a trained
  network is. Frechet distance to the truth's exact moments.
digits: the model that launch/quickstart.sh trains; Frechet distance to all digits, training ones included, in the
  features of the proxy's classifier. Both references are fixed, so the Monte-Carlo error is that of the samples alone.
In the two parts in 64 dimensions each run draws several independent sets. Its row has the mean of their distances, the
standard error of that mean, and as the Monte-Carlo floor the distance between the first two sets, the mean of each of
which is off by about half of that. Rows are kept in the output as they come, and those it holds are not measured again.
"""

from collections.abc import Callable, Sequence
import datetime
import functools
import importlib.metadata
import json
import pathlib
import platform
import sys
import time

from absl import flags
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np
from scipy.stats import norm
from sklearn.datasets import load_digits

from benchmarks.charts import chart, colour_of, label_ends, log_axis, name_rows
from terdit_jax.checkpoints.reader import Checkpoints
from terdit_jax.choices import SPACINGS
from terdit_jax.data.reader import open_dataset
from terdit_jax.diffusion.sampler import sample
from terdit_jax.diffusion.schedule import Schedule, linear_schedule, respace
from terdit_jax.diffusion.spacing import choose_timesteps
from terdit_jax.errors import UserError, run_command
from terdit_jax.evaluation.classifier import train_classifier
from terdit_jax.evaluation.frechet import frechet_distance
from terdit_jax.evaluation.judge import read_images
from terdit_jax.evaluation.proxy import sample_labels
from terdit_jax.evaluation.statistics import Moments, Statistics, statistics
from terdit_jax.inference.runtime import load_model
from terdit_jax.paths import define_path

_PARTS = flags.DEFINE_list("parts", "line,digits_mixture,digits", "What to measure.")
_WORKDIR = define_path("workdir", "runs/digits", "Run of configs/digits.py, for the part digits.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 20_000, "A set, of the parts in 64 dimensions.", lower_bound=100)
_NUM_SETS = flags.DEFINE_integer("num_sets", 4, "Independent sets of each run.", lower_bound=2)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 500, "Samples drawn at once.", lower_bound=1)
_RUNS = flags.DEFINE_list(
    "runs",
    "ddpm:250:uniform,dpmpp_2m:20:power,dpmpp_2m:20:quadratic,dpmpp_2m:20:uniform,dpmpp_2m:20:logsnr,unipc:20:power,"
    "unipc:20:quadratic,unipc:20:uniform,dpmpp_2m_sde:20:power,dpmpp_2m_sde:20:uniform,ddim:20:uniform,"
    "dpmpp_2m:10:power,unipc:10:power,dpmpp_2m_sde:10:power,ddim:10:uniform,dpmpp_2m:40:power,unipc:40:power,"
    "dpmpp_2m_sde:40:power,ddim:40:uniform,ddpm:40:uniform",
    "METHOD:STEPS:SPACING of the parts in 64 dimensions.",
)
_PLOT = define_path("plot", None, "Chart to draw of all rows, a PNG.")
_OUTPUT = define_path("output", "samplers.json", "JSON file.")

FULL = linear_schedule()
SOLVERS = ("ddim", "dpmpp_2m", "unipc")
FLOOR = "Monte-Carlo floor"
MANY = 100  # calls, from which a chart has a line across instead of points
BASELINE = ("ddpm", 250, "uniform")  # what published figures are drawn with
Rows = list[dict]
Measure = Callable[[dict, Callable[[], dict]], None]  # a row without its figures, and what works them out
Draw = Callable[[int], Statistics]  # the number of a set to its moments


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    parts = {"line": _line, "digits_mixture": _digits_mixture, "digits": _digits}
    if unknown := set(_PARTS.value) - set(parts) - {""}:
        raise UserError(f"--parts: no {sorted(unknown)[0]!r}, give some of {', '.join(parts)}")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # The mixtures' eps is a difference divided by as little as 0.01, and accelerators round float32 unless told not to.
    jax.config.update("jax_default_matmul_precision", "highest")
    path = pathlib.Path(_OUTPUT.value)
    content = json.loads(path.read_text()) if path.exists() else {"rows": []}
    run = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}",
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy", "scipy")},
        "python": sys.version.split()[0],
    }

    def measure(row: dict, figures: Callable[[], dict]) -> None:
        if any(row.items() <= known.items() for known in content["rows"]):
            return
        begin = time.perf_counter()
        row = row | figures()
        row |= {"seconds": round(time.perf_counter() - begin, 1)} | run
        content["rows"].append(row)
        print(json.dumps(row), flush=True)
        path.write_text(json.dumps(content, indent=1) + "\n")

    for part in filter(None, _PARTS.value):
        parts[part](measure)
    print(table(content["rows"]))
    if _PLOT.value:
        _plot(content["rows"], _PLOT.value)


class Mixture:
    """A mixture of Gaussians: its best denoiser at every noise level, in closed form.

    Component k has weight w_k, mean m_k and covariance V_k diag(l_k) V_k^T, so x_t of it has the same axes and variance
    a^2 l_k + 1 - a^2 along them, with a^2 the schedule's alphas_cumprod.
    """

    def __init__(self, weights: np.ndarray, means: np.ndarray, variances: np.ndarray, axes: np.ndarray):
        """(K,), (K, D), (K, D) and (K, D, D), columns the axes."""
        self.weights, self.means, self.variances, self.axes = weights, means, variances, axes

    @classmethod
    def estimated(cls, points: np.ndarray, component: np.ndarray, floor: float) -> "Mixture":
        """From points (N, D) of known components (N,); `floor` is added to every variance."""
        counts = np.bincount(component)
        groups = [points[component == k] for k in range(len(counts))]
        spectra = [np.linalg.eigh(np.cov(group.T) + floor * np.eye(points.shape[1])) for group in groups]
        means, (variances, axes) = [group.mean(0) for group in groups], zip(*spectra, strict=True)
        return cls(counts / counts.sum(), np.stack(means), np.stack(variances), np.stack(axes))

    def draw(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Points (N, D) and their components (N,)."""
        component = rng.choice(len(self.weights), count, p=self.weights)
        along = rng.standard_normal((count, self.means.shape[1])) * np.sqrt(self.variances[component])
        points = np.empty_like(along)
        for k in range(len(self.weights)):
            points[component == k] = self.means[k] + along[component == k] @ self.axes[k].T
        return points, component

    def moments(self) -> Statistics:
        """Exact."""
        mean = self.weights @ self.means
        centred = self.means - mean
        within = np.einsum("k,kij,kj,klj->il", self.weights, self.axes, self.variances, self.axes)
        return Statistics(mean, within + np.einsum("k,ki,kj->ij", self.weights, centred, centred))

    def denoiser(self, schedule: Schedule) -> Callable[[Array, Array], Array]:
        """x_t (B, 1, 1, D), t (B,) -> (B, 1, 1, 2D): the expected noise, and the variance of each coordinate of the
        reverse step as a learned-range network would give it."""
        low, high = schedule.posterior_log_variance_clipped, np.log(schedule.betas)
        step_of = np.zeros(FULL.num_timesteps, np.int32)
        step_of[schedule.timestep_map] = np.arange(schedule.num_timesteps)

        def denoise(x_t: Array, timesteps: Array) -> Array:
            x, step = x_t[:, 0, 0], jnp.asarray(step_of)[timesteps[0]]  # one timestep for all
            entry = lambda table: jnp.asarray(table, jnp.float32)[step]  # noqa: E731
            signal, noise = entry(schedule.sqrt_alphas_cumprod), entry(schedule.sqrt_one_minus_alphas_cumprod)
            variances = jnp.asarray(self.variances, jnp.float32)
            along = signal**2 * variances + noise**2  # (K, D)
            logits, x0s, x0_variances = [], [], []
            for k, axes in enumerate(jnp.asarray(self.axes, jnp.float32)):
                place = (x - signal * self.means[k]) @ axes
                logit = np.log(self.weights[k]) - 0.5 * (jnp.square(place) / along[k] + jnp.log(along[k])).sum(1)
                logits.append(logit)
                x0s.append(self.means[k] + (place * signal * variances[k] / along[k]) @ axes.T)
                x0_variances.append(jnp.square(axes) @ (variances[k] * noise**2 / along[k]))
            share = jax.nn.softmax(jnp.stack(logits), axis=0)[..., None]  # (K, B, 1)
            x0s = jnp.stack(x0s)
            x0 = (share * x0s).sum(0)
            spread = (share * (jnp.square(x0s - x0) + jnp.stack(x0_variances)[:, None])).sum(0)
            reverse = entry(schedule.posterior_variance) + entry(schedule.posterior_mean_coef1**2) * spread
            fraction = (jnp.log(reverse) - entry(low)) / (entry(high) - entry(low))
            return jnp.concatenate([(x - signal * x0) / noise, 2 * fraction - 1], -1)[:, None, None]

        return denoise


def make_sampler(mixture: Mixture, method: str, num_steps: int, spacing: str) -> Callable[[Array, Array], Array]:
    """Normal noise (N, D) and a key to samples (N, D) by the denoiser of a mixture, jitted."""
    schedule = respace(FULL, choose_timesteps(FULL, num_steps, spacing, method))
    denoise = mixture.denoiser(schedule)

    @jax.jit
    def draw(x_T: Array, key: Array) -> Array:
        noise = lambda i: jax.random.normal(jax.random.fold_in(key, i), x_T[:, None, None].shape)  # noqa: E731
        return sample(denoise, x_T[:, None, None], noise, schedule, method)[:, 0, 0]

    return draw


def three_gaussians() -> Mixture:
    """On a line, with standard deviations of 0.15, 0.3 and 0.1 and about unit variance together."""
    means, stds = np.array([-1.2, 0.3, 1.5]), np.array([0.15, 0.3, 0.1])
    return Mixture(np.array([0.3, 0.5, 0.2]), means[:, None], stds[:, None] ** 2, np.ones((3, 1, 1)))


def line_distance(mixture: Mixture, method: str, num_steps: int, spacing: str, places: int = 4001) -> float:
    """Wasserstein-1 distance of a deterministic sampler to the truth, in one dimension: noise at the midpoints of
    `places` equal shares of probability, in order and so mapped to the same shares of the samples."""
    share = (np.arange(places) + 0.5) / places
    draw = make_sampler(mixture, method, num_steps, spacing)
    x = np.asarray(draw(norm.ppf(share).astype(np.float32)[:, None], jax.random.key(0)))[:, 0]
    grid = np.linspace(-6, 6, 200_001)
    stds = np.sqrt(mixture.variances[:, 0])
    below = sum(w * norm.cdf(grid, m, s) for w, m, s in zip(mixture.weights, mixture.means[:, 0], stds, strict=True))
    return np.abs(np.sort(x.astype(np.float64)) - np.interp(share, below, grid)).mean()


def _line(measure: Measure) -> None:
    mixture = three_gaussians()
    for method in SOLVERS:
        for spacing in SPACINGS:
            for num_steps in (10, 20, 40):
                row = {"part": "line", "method": method, "steps": num_steps, "spacing": spacing}
                distance = functools.partial(line_distance, mixture, method, num_steps, spacing)
                measure(row, lambda distance=distance: {"distance": float(distance())})


def _digits_mixture(measure: Measure) -> None:
    pictures, labels = load_digits(return_X_y=True)
    truth = Mixture.estimated(pictures / 8 - 1, labels, floor=1e-3)
    learnt = Mixture.estimated(*truth.draw(len(labels), np.random.default_rng(0)), floor=0.0)
    reference = truth.moments()

    def drawer(method: str, steps: int, spacing: str) -> Draw:
        sampler = make_sampler(learnt, method, steps, spacing)

        def draw(number: int) -> Statistics:
            moments = Moments(64)
            for start in range(0, _NUM_SAMPLES.value, _BATCH_SIZE.value):
                key = jax.random.fold_in(jax.random.key(number), start)
                x_T = jax.random.normal(key, (min(_BATCH_SIZE.value, _NUM_SAMPLES.value - start), 64))
                moments.add(np.asarray(sampler(x_T, jax.random.fold_in(key, 1))))
            return moments.statistics()

        return draw

    _measure_runs("digits_mixture", measure, drawer, reference)
    row = {"part": "digits_mixture", "method": "learnt", "steps": 0, "spacing": "exact moments"}
    measure(row, lambda: {"distance": frechet_distance(learnt.moments(), reference)})


def _digits(measure: Measure) -> None:
    dataset = open_dataset(Checkpoints(_WORKDIR.value).newest_run()["config"]["data"]["dir"])
    train, heldout = (read_images(dataset, split) for split in ("train", "heldout"))
    classifier = train_classifier(train.images, train.labels, dataset.metadata.num_classes)
    reference = statistics(classifier.features(np.concatenate([train.images, heldout.images])))
    wanted = sample_labels(np.concatenate([train.labels, heldout.labels]), _NUM_SAMPLES.value)
    model = load_model(_WORKDIR.value, dtype="float32")

    def drawer(method: str, steps: int, spacing: str) -> Draw:
        def draw(number: int) -> Statistics:
            # Further pictures of one seed are as independent as those of another, and compiled for once.
            samples = model.draw(
                wanted, seed=0, first=number * len(wanted), num_steps=steps, method=method, spacing=spacing,
                batch_size=_BATCH_SIZE.value,
            )  # fmt: skip
            return statistics(classifier.features(np.clip(samples, -1, 1), _BATCH_SIZE.value))

        return draw

    _measure_runs("digits", measure, drawer, reference)


def _measure_runs(part: str, measure: Measure, drawer: Callable[[str, int, str], Draw], reference: Statistics) -> None:
    def figures(draw: Draw) -> dict:
        sets = [draw(number) for number in range(_NUM_SETS.value)]
        distances = [frechet_distance(drawn, reference) for drawn in sets]
        return {
            "distance": float(np.mean(distances)),
            "standard_error": float(np.std(distances, ddof=1) / np.sqrt(len(distances))),
            "floor": frechet_distance(*sets[:2]),
            "distances": distances,
        }

    for run in _RUNS.value:
        method, steps, spacing = run.split(":")
        row = {"part": part, "method": method, "steps": int(steps), "spacing": spacing}
        row |= {"num_samples": _NUM_SAMPLES.value, "num_sets": _NUM_SETS.value}
        measure(row, lambda key=(method, int(steps), spacing): figures(drawer(*key)))


def table(rows: Rows) -> str:
    """The parts in 64 dimensions as docs/sampling.md has them: distance, and how it stands to the baseline's."""
    parts = ("digits_mixture", "digits")
    found = {(row["part"], row["method"], row["steps"], row["spacing"]): row for row in rows if "floor" in row}
    heads = ["Method", "Spacing", "Calls", "Mixture", "of DDPM's", "Digits model", "of DDPM's"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for run in dict.fromkeys(key[1:] for key in found):
        cells = [f"`{run[0]}`", run[2], str(run[1])]
        for part in parts:
            row, baseline = found.get((part, *run)), found.get((part, *BASELINE))
            cells.append(f"{row['distance']:.4g} ± {row['standard_error']:.2g}" if row else "")
            cells.append(_share(row, baseline) if row and baseline else "")
        lines.append("| " + " | ".join(cells) + " |")
    for part in parts:
        if mine := [row for (of, *_), row in found.items() if of == part]:
            highest = max(row["floor"] for row in mine)
            counts = sorted({(row["num_sets"], row["num_samples"]) for row in mine})
            sets = ", ".join(f"{number} sets of {size:,}" for number, size in counts)
            lines.append(f"{part}: {sets}; Monte-Carlo floor at most {highest:.3g}")
    return "\n".join(lines)


def _share(row: dict, baseline: dict) -> str:
    share = row["distance"] / baseline["distance"]
    error = share * np.hypot(*(of["standard_error"] / of["distance"] for of in (row, baseline)))
    return f"{share:.3f}" + ("" if row is baseline else f" ± {error:.3f}")


def _plot(rows: Rows, path: str) -> None:
    """Distances by calls of the network on the mixtures, each method with the spacing that suits it, and below them the
    digits model's for every method and spacing."""
    titles = {"line": "Three Gaussians, exact denoiser", "digits_mixture": "Ten Gaussians, estimated denoiser"}
    distances = {"line": "Wasserstein-1 distance", "digits_mixture": "Frechet distance"}
    found = {part: [row for row in rows if row["part"] == part and row["steps"]] for part in (*titles, "digits")}
    if not any(found.values()):
        raise UserError(f"--plot={path}: there are no rows to draw, give --parts or an --output that has some")
    curves = [part for part in titles if found[part]]
    layout = [curves] * bool(curves) + [["digits"] * max(1, len(curves))] * bool(found["digits"])
    heights = [2.6] * bool(curves) + [0.8 + 0.2 * len(found["digits"])] * bool(found["digits"])
    title = "Samplers: distance to the truth (lower is better)"
    with chart(path, title, layout, sum(heights) + 0.4, height_ratios=heights) as panels:
        for part in curves:
            panels[part].set(title=titles[part], ylabel=distances[part], xlabel="calls of the network (NFE)")
            _plot_curves(found[part], panels[part])
        if found["digits"]:
            panels["digits"].set(title="Digits model: method, spacing, calls of the network")
            panels["digits"].set_xlabel("Frechet distance of classifier features, and its standard error")
            _plot_bars(found["digits"], panels["digits"])


def _plot_curves(rows: Rows, panel) -> None:
    best = {"ddim": "uniform", "ddpm": "uniform", "dpmpp_2m": "power", "unipc": "power", "dpmpp_2m_sde": "power"}
    floors = [row["floor"] for row in rows if "floor" in row]
    levels = {FLOOR: max(floors)} if floors else {}
    ends, texts = {}, {}
    for place, (method, spacing) in enumerate(best.items()):
        mine = {row["steps"]: row["distance"] for row in rows if (row["method"], row["spacing"]) == (method, spacing)}
        if (most := max(mine, default=0)) >= MANY:
            levels[method] = mine.pop(most)
            texts[method] = f"{method} (dashed: {most} calls)"
        if mine:
            points = sorted(mine.items())
            size = 7 - place  # so that a point on another leaves its rim in sight
            panel.plot(*zip(*points, strict=True), marker="o", markersize=size, color=colour_of(method))
            ends[method] = points[-1:]
    log_axis(panel, "x")
    steps = sorted({row["steps"] for row in rows if row["steps"] < MANY})
    panel.set_xticks(steps, map(str, steps))
    right = panel.get_xlim()[1]
    for name, height in levels.items():
        panel.axhline(height, color=colour_of(name), linestyle=":" if name == FLOOR else "--", linewidth=1)
        ends[name] = [*ends.get(name, ()), (right, height)]
    log_axis(panel, "y")
    label_ends(panel, ends, texts)


def _plot_bars(rows: Rows, panel) -> None:
    rows = sorted(rows, key=lambda row: (row["method"], row["distance"]))
    for place, row in enumerate(rows):
        distance = row["distance"]
        panel.barh(place, distance, xerr=row["standard_error"], color=colour_of(row["method"]), height=0.7)
        panel.annotate(f"{distance:.2f}", (distance, place), (8, 0), textcoords="offset points", va="center")
    panel.set_xlim(right=1.12 * max(row["distance"] for row in rows))  # room for the last number
    panel.grid(axis="y", visible=False)
    name_rows(panel, {f"{row['method']}, {row['spacing']}, {row['steps']} calls": row["method"] for row in rows})


if __name__ == "__main__":
    run_command(main)
