"""One look for the charts of docs/images: opaque white, light grid, no box, one colour a name, names at line ends.

Figures are 8 inches wide, so 9-point text is 12 pixels high where a page shows the chart 800 pixels wide.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import io
from typing import Any
import zlib

import numpy as np
from PIL import Image
from scipy.optimize import isotonic_regression

from terdit_jax.errors import UserError

INK, MUTED = "#24292f", "#6e7781"
# Okabe and Ito's colours for every kind of colour vision, without the yellow that white swallows.
BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#aa4a8c"
ORANGE, SKY = "#e69f00", "#56b4e9"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
COLOURS = {
    # variants of benchmarks.ablations
    "full_precision": INK,
    "ternary": ORANGE,
    "no_adaln_norm": GREEN,
    "least_squares": BLUE,
    "no_drop": PURPLE,
    "least_squares_no_adaln_norm": SKY,
    "ternarised_afterwards": MUTED,
    "eight_bit": VERMILION,
    "eight_bit_no_adaln_norm": ORANGE,
    "channels": GREEN,
    "threshold_0.7": VERMILION,
    # modes of benchmarks.inference, and PyTorch's
    "exact": BLUE,
    "fast": VERMILION,
    "small": GREEN,
    "small_exact": PURPLE,
    "torch compiled": INK,
    "torch compiled_fp8": SKY,
    "torch public": ORANGE,
    # methods of benchmarks.samplers
    "ddpm": INK,
    "ddim": ORANGE,
    "dpmpp_2m": BLUE,
    "unipc": VERMILION,
    "dpmpp_2m_sde": GREEN,
    "Monte-Carlo floor": MUTED,
}
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
_STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0,
    "savefig.facecolor": "white",
}


@contextlib.contextmanager
def chart(path: str, title: str, layout: Sequence, height: float, **mosaic: Any) -> Iterator[dict[str, Any]]:
    """Yields the empty panels of a chart, by their names in `layout` (as matplotlib's `subplot_mosaic` takes it), and
    writes the chart as a PNG of 256 colours, 1,600 pixels wide, when the block ends.

    Raises UserError without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('charts need matplotlib: pip install -e ".[benchmarks]"') from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8, height), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(h_pad=0.08, w_pad=0.06)
        figure.suptitle(title, x=0.01, ha="left")
        yield figure.subplot_mosaic(layout, **mosaic)
        drawn = io.BytesIO()
        figure.savefig(drawn)
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)


def colour_of(name: str) -> str:
    """Returns the colour that a name has in every chart."""
    return COLOURS.get(name, PALETTE[zlib.crc32(name.encode()) % len(PALETTE)])


def text_colour(name: str) -> tuple[float, ...]:
    """Returns the name's colour, dark enough for letters on white."""
    from matplotlib.colors import to_rgb

    return tuple(0.72 * channel for channel in to_rgb(colour_of(name)))


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns each name's colour, and dashes that tell apart those among the names that share one."""
    colours: list[str] = []
    found = {}
    for name in names:
        colour = colour_of(name)
        found[name] = {"color": colour, "linestyle": _DASHES[colours.count(colour) % len(_DASHES)]}
        colours.append(colour)
    return found


def log_axis(panel: Any, which: str) -> None:
    """Makes the axis "x" or "y" of a panel, whose data are drawn, logarithmic, with plain numbers at its ticks."""
    from matplotlib.ticker import LogLocator, NullLocator

    panel.set(**{f"{which}scale": "log"})
    axis = panel.xaxis if which == "x" else panel.yaxis
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def label_ends(panel: Any, ends: Mapping[str, Sequence[tuple[float, float]]], texts: Mapping[str, str]) -> None:
    """Writes names, or their texts, right of a panel whose limits are final, each as near as there is room to the ends
    (x, y) of its lines, which thin lines join to it. Ends that are not finite have no label."""
    panel.figure.draw_without_rendering()  # gives the panel its limits and its height
    panel.autoscale(False)  # which the lines to the names would move
    to_axes = panel.transData + panel.transAxes.inverted()
    finite = {name: [end for end in mine if np.isfinite(end).all()] for name, mine in ends.items()}
    places = {name: np.clip(to_axes.transform(mine), 0, 1) for name, mine in finite.items() if mine}
    if not places:
        return
    names = sorted(places, key=lambda name: places[name][:, 1].mean())
    line = 10.5 / 72 * panel.figure.dpi / panel.bbox.height  # of text, as a share of the panel's height
    ranks = line * np.arange(len(names))
    # The least moves that leave a line between neighbours: heights less ranks may not fall.
    free = isotonic_regression([places[name][:, 1].mean() for name in names] - ranks).x
    for name, height in zip(names, np.clip(free, 0, max(0, 1 - ranks[-1])) + ranks, strict=True):
        colour = text_colour(name)
        for end in places[name]:
            panel.plot(
                *zip(end, (1.05, height), strict=True), "-", color=colour, linewidth=0.5, transform=panel.transAxes,
                clip_on=False,
            )  # fmt: skip
        panel.text(1.06, height, texts.get(name, name), color=colour, size=8.5, va="center", transform=panel.transAxes)


def name_rows(panel: Any, names: Mapping[str, str]) -> None:
    """Writes texts right of a panel's rows 0, 1, 2, ... from above, each in the colour of the name it stands for."""
    panel.set_yticks(range(len(names)), [*names])
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.yaxis.tick_right()
    for label, name in zip(panel.get_yticklabels(), names.values(), strict=True):
        label.set(color=text_colour(name), size=8.5)
