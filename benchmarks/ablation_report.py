"""Turns the rows of `benchmarks.ablations` into a table, a picture of curves and distances, and a grid of images."""

import numpy as np

from benchmarks.ablation_variants import REFERENCE, VARIANTS, split_name
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
    """Draws held-out loss against steps and against hours, loss by quarter of the timesteps, and Frechet distances: one
    colour a variant, a line a seed, its name at the line's end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = names_of(rows)
    colours = dict(zip(names, plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(names))), strict=True))
    layout = [["steps"] * 4, ["hours"] * 2 + ["distance"] * 2, [*QUARTERS]]
    figure, panels = plt.subplot_mosaic(
        layout, figsize=(12, 12), dpi=110, layout="constrained", height_ratios=(3, 3, 2)
    )
    runs = [row for row in rows if row.get("heldout")]
    for row in runs:
        steps, losses = row["heldout"]["step"], row["heldout"]["loss_ema"]
        hours = np.array(steps) * row["batch_size"] / row["images_per_second"] / 3600
        for panel, x in (("steps", steps), ("hours", hours)):
            panels[panel].plot(x, losses, color=colours[row["variant"]], linewidth=1.4, marker=".", markersize=4)
    ends = {name: [row["heldout"] for row in runs if row["variant"] == name] for name in names}
    ends = {name: mine for name, mine in ends.items() if mine}
    if ends:
        end = {name: float(np.mean([run["loss_ema"][-1] for run in mine])) for name, mine in ends.items()}
        _zoom(panels["steps"], [loss for row in runs for loss in row["heldout"]["loss_ema"]], end)
        _zoom(panels["hours"], [loss for row in runs for loss in row["heldout"]["loss_ema"]], end)
        _label_ends(panels["steps"], end, colours)
    panels["steps"].set(title="held-out loss of the averaged weights", xlabel="step")
    panels["hours"].set(title="the same by training time", xlabel="hours")
    for quarter, span in zip(QUARTERS, _SPANS, strict=True):
        for row in rows:
            if "curve" in row:
                values = np.array(row["curve"][quarter], float)
                panels[quarter].plot(row["curve"]["step"], values, color=colours[row["variant"]], linewidth=0.8)
        panels[quarter].set(title=f"loss, t {span}", xlabel="step", yscale="log")
    bars = panels["distance"]
    for place, name in enumerate(names):
        values = [row["frechet_distance"] for row in rows if row["variant"] == name]
        bars.barh(place, np.mean(values), color=colours[name], alpha=0.7)
        bars.plot(values, [place] * len(values), "k.", markersize=4)
        bars.annotate(f" {np.mean(values):.2f}", (max(values), place), va="center", fontsize=8)
    bars.set_yticks(range(len(names)), names, fontsize=8)
    bars.invert_yaxis()
    bars.margins(x=0.15)
    bars.set(title="Frechet distance in a classifier's features: each seed, and their mean")
    for panel in panels.values():
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _zoom(panel, losses: list[float], end: dict[str, float]) -> None:
    """Shows the range in which runs end, and as much again above it; steep starts are cut off."""
    low, high = min(losses), max(end.values())
    panel.set_ylim(low - 0.05 * (high - low + low * 0.02), high + 1.5 * (high - low + low * 0.02))


def _label_ends(panel, end: dict[str, float], colours: dict) -> None:
    """Writes each variant's name at the height of its end, lines of text apart."""
    low, high = panel.get_ylim()
    least, height = 0.045 * (high - low), -np.inf
    for name, loss in sorted(end.items(), key=lambda item: item[1]):
        height = max(loss, height + least)
        text = f"{name}  {loss:.4f}"
        panel.annotate(
            text, (1.01, height), xycoords=("axes fraction", "data"), color=colours[name], fontsize=9, va="center",
            annotation_clip=False,
        )  # fmt: skip
