"""Turns the rows of `benchmarks.ablations` into a table, a picture of curves and distances, and a grid of images."""

from collections import defaultdict

import numpy as np

from benchmarks.ablation_variants import REFERENCE, VARIANTS, split_name
from benchmarks.charts import chart, colour_of, label_ends, log_axis, name_rows, styles, text_colour
from terdit_jax.inference.contact_sheet import make_contact_sheet
from terdit_jax.inference.images import save_png

QUARTERS = tuple(f"loss_t{k}of4" for k in range(1, 5))
_SPANS = ("0-249", "250-499", "500-749", "750-999")
_DASH = " ± "


def names_of(rows: list[dict]) -> list[str]:
    """The variants among the rows, in the order of VARIANTS, each with its run of equal time after it."""
    order = list(VARIANTS)
    return sorted({row["variant"] for row in rows}, key=lambda name: (order.index(split_name(name)[0]), name))


def table(rows: list[dict]) -> str:
    """Means over seeds, with the spread where there are several; losses are means over the last tenth of the steps, the
    time a step is relative to REFERENCE's."""
    columns = ("Variant", "seeds", "steps", "loss", *(f"t {span}" for span in _SPANS), "held-out, EMA")
    columns += ("Frechet distance", "precision", "recall", "agreement", "time a step")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    rates = _means(rows, REFERENCE, "images_per_second")
    for name in names_of(rows):
        mine = [row for row in rows if row["variant"] == name]
        cells = [name, str(len(mine)), "/".join(sorted({f"{row['steps']:,}" for row in mine if "steps" in row}))]
        for key in ("loss", *QUARTERS):
            cells.append(_spread([_last(row["curve"][key]) for row in mine if "curve" in row], "{:.4f}"))
        forms = {"heldout_loss_ema": "{:.4f}", "frechet_distance": "{:.2f}", "precision": "{:.3f}", "recall": "{:.3f}"}
        for key, form in (forms | {"agreement": "{:.1%}"}).items():
            cells.append(_spread([row[key] for row in mine if row.get(key) is not None], form))
        own = _means(rows, name, "images_per_second")
        cells.append(f"{rates / own:.2f}" if rates and own else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _means(rows: list[dict], name: str, key: str) -> float | None:
    values = [row[key] for row in rows if row["variant"] == name and row.get(key)]
    return float(np.mean(values)) if values else None


def _last(values: list[float]) -> float:
    return float(np.mean(values[-max(1, len(values) // 10) :]))


def _spread(values: list[float], form: str) -> str:
    if not values:
        return ""
    text = form.format(np.mean(values))
    return text if len(values) == 1 else f"{text}{_DASH}{form.format(np.std(values, ddof=1))}"


def grid(pictures: dict[str, np.ndarray], path: str) -> None:
    """Writes images (classes, H, W, C) uint8 of each variant, those of the same noise and label below each other."""
    if pictures:
        views = np.stack(list(pictures.values()), axis=1)  # classes, variants, H, W, C
        save_png(path, make_contact_sheet(list(views), list(pictures)))


def plot(rows: list[dict], path: str) -> None:
    """Draws held-out loss against steps and against hours where it was measured, loss by quarter of the timesteps, and
    Frechet distances: one colour a variant, a line or a point a seed."""
    names = names_of(rows)
    looks = styles(names)
    runs = [row for row in rows if row.get("heldout") and np.isfinite(_losses(row)).any()]
    grid_of = [["steps", "hours"]] * bool(runs) + [[*QUARTERS[:2]], [*QUARTERS[2:]], ["distance"] * 2]
    low_panel = 0.5 + 0.19 * len(names)
    heights = [max(1.9, low_panel)] * (len(grid_of) - 1) + [low_panel]
    steps = "/".join(sorted({f"{row['steps']:,}" for row in rows if "steps" in row}))
    seeds = len({row["seed"] for row in rows})
    title = f"Ablations: {steps} training steps" + f", {seeds} seeds, a line each" * (seeds > 1)
    with chart(path, title, grid_of, sum(heights) + 0.5, height_ratios=heights) as panels:
        if runs:
            _plot_heldout(runs, looks, panels["steps"], panels["hours"])
        for quarter, span in zip(QUARTERS, _SPANS, strict=True):
            panel, ends = panels[quarter], defaultdict(list)
            for row in rows:
                if "curve" in row:
                    values = np.array(row["curve"][quarter], float)
                    panel.plot(row["curve"]["step"], values, **looks[row["variant"]], linewidth=1)
                    ends[row["variant"]].append((row["curve"]["step"][-1], values[-1]))
            panel.set(title=f"Training loss, timesteps {span}")
            panel.margins(x=0.02)
            _few_steps(panel)
            log_axis(panel, "y")
            if quarter in QUARTERS[1::2]:
                label_ends(panel, ends, {})
        for quarter in QUARTERS[2:]:
            panels[quarter].set_xlabel("step")
        _plot_distances(rows, names, panels["distance"])


def _losses(row: dict) -> np.ndarray:
    return np.array(row["heldout"]["loss_ema"], float)


def _few_steps(panel) -> None:
    panel.locator_params(axis="x", nbins=5)
    panel.xaxis.set_major_formatter("{x:,.0f}")


def _plot_heldout(runs: list[dict], looks: dict, *panels) -> None:
    """By steps and by hours. Shows the range in which runs end, and as much again above it; a peak that is cut off has
    its value at the panel's upper edge."""
    losses = [_losses(row) for row in runs]
    low, high = np.nanmin(np.concatenate(losses)), max(run[np.isfinite(run)][-1] for run in losses)
    more = high - low + 0.02 * low
    ends, last = defaultdict(list), defaultdict(list)
    for row, run in zip(runs, losses, strict=True):
        steps = np.array(row["heldout"]["step"])
        hours = steps * row["batch_size"] / row["images_per_second"] / 3600
        peak = np.nanargmax(run)
        for panel, x in zip(panels, (steps, hours), strict=True):
            panel.plot(x, run, **looks[row["variant"]], marker=".")
            if peak and run[peak] > high + 1.5 * more:
                panel.annotate(
                    f"↑ {run[peak]:.2g}", (x[peak], 1), xycoords=("data", "axes fraction"), va="top",
                    color=text_colour(row["variant"]), size=8.5,
                )  # fmt: skip
        ends[row["variant"]].append((hours[-1], run[-1]))
        last[row["variant"]].append(run[-1])
    for panel, title in zip(panels, ("Held-out loss, averaged weights", "The same by training time"), strict=True):
        panel.set(title=title, ylim=(low - 0.05 * more, high + 1.5 * more))
    panels[0].set_xlabel("step")
    panels[1].set_xlabel("hours")
    panels[1].locator_params(axis="x", nbins=5)
    _few_steps(panels[0])
    label_ends(panels[1], ends, {name: f"{name}  {np.mean(mine):.4f}" for name, mine in last.items()})


def _plot_distances(rows: list[dict], names: list[str], panel) -> None:
    """A row of points a variant, its name at the right, where the other panels have names."""
    for place, name in enumerate(names):
        values = sorted(row["frechet_distance"] for row in rows if row["variant"] == name)
        panel.plot(values, [place] * len(values), "o-", color=colour_of(name), markersize=5)
        text = " / ".join(f"{value:#.3g}".rstrip(".") for value in values)
        panel.annotate(text, (values[-1], place), (6, 0), textcoords="offset points", va="center", size=8.5)
    log_axis(panel, "x")
    low, high = panel.get_xlim()
    panel.set_xlim(right=high * (high / low) ** 0.16)  # room for the last numbers
    name_rows(panel, {name: name for name in names})
    panel.set(title="Frechet distance in a classifier's features (lower is better)")
