"""Makes the one page of a report: HTML with its styles, scripts and pictures inside, which needs no network.

The curves are drawn by uPlot (MIT licence, in `assets`) and a script of ours; all else can be read without scripts.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
from html import escape
from importlib import resources
import json
from operator import itemgetter
import time
from typing import Any

from terdit_jax.checkpoints.layout import BEST
from terdit_jax.config import FIELDS
from terdit_jax.config_rules import shown
from terdit_jax.data.image_file import ImageError
from terdit_jax.page import curves, pictures
from terdit_jax.page.curves import LARGEST
from terdit_jax.page.workdir import SOUND, UNCHECKED, UNDER_WAY, Checkpoint, Run
from terdit_jax.untrusted import is_count, is_number

_COLORS = 8  # of runs, in page.css
_NO_VALUE = "–"
_ABSENT = object()
_KINDS_NOTE = (
    "train: steps that still count. lost: steps that a kill undid. compile: first steps. evaluate: held-out losses, "
    "grids, scores and logs. input: waiting for batches. down: between a kill and the next start."
)
# Nothing is loaded from anywhere, whatever the names and values in a workdir hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def make_page(runs: Sequence[Run], command: str) -> str:
    """The page of some runs; `command` is the line that made it."""
    size, unit = curves.unit_of(sum(run.seconds.values()) for run in runs)
    figures = [curves.figures_of(run) for run in runs]
    charts = curves.make_charts(runs, figures, 1 / size)
    samples = _samples(runs)  # first, for it may add notes
    title = f"Report of {runs[0].name}" if len(runs) == 1 else f"Report of {len(runs)} runs"
    sections = (
        ("Runs", _summary(runs, figures)),
        ("Loss", _charts(charts, curves.LOSS)),
        ("Loss by timestep", _charts(charts, curves.QUARTERS)),
        ("Rates", _charts(charts, curves.RATES)),
        ("Where the time went", _goodput(runs)),
        ("Samples", samples),
        ("Scores", _scores(runs) + _charts(charts, curves.SCORES)),
        ("Checkpoints", _checkpoints(runs, figures)),
        ("Configuration", _configuration(runs)),
        ("Further figures", _disclosed("All other figures of metrics.jsonl", _charts(charts, curves.OTHERS))),
    )
    there = [(name, body) for name, body in sections if body]
    links = "".join(f'<a href="#{_id(name)}">{name}</a>' for name, _ in there)
    data = {"unit": unit, "charts": [[dataclasses.asdict(series) for series in chart.series] for chart in charts]}
    page = "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title>",
            f"<style>{_asset('uPlot.min.css')}{_asset('page.css')}</style></head><body>",
            f"<header><h1>{escape(title)}</h1><p>{time.strftime('%Y-%m-%d %H:%M')}, <code>{escape(command)}</code></p>",
            f"<nav>{links}</nav></header>",
            _controls(runs, unit) if charts else "",
            "<main>",
            *(f'<section id="{_id(name)}"><h2>{name}</h2>{body}</section>' for name, body in there),
            f'</main><script type="application/json" id="data">{_json(data)}</script>',
            f"<script>{_asset('uPlot.iife.min.js')}</script><script>{_asset('page.js')}</script></body></html>\n",
        ]
    )
    return page.encode(errors="replace").decode()  # names of files, and of JSON, may hold halves of characters


def _asset(name: str) -> str:
    return (resources.files("terdit_jax.page") / "assets" / name).read_text()


def _json(content: Any) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _id(name: str) -> str:
    return name.lower().replace(" ", "-")


def _number(value: float | None) -> str:
    if value is None:
        return _NO_VALUE
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    size, unit = curves.unit_of([seconds])
    return f"{seconds / size:.3g} {unit}" if seconds else _NO_VALUE


def _color(run: int) -> str:
    return f"--color:var(--run-{run % _COLORS})"


def _named(runs: Sequence[Run], number: int) -> str:
    """A run's name in its colour."""
    return f'<span class="run" style="{_color(number)}">{escape(runs[number].name)}</span>'


def _table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of HTML cells whose first column names the rows; "" without rows."""
    body = "".join(
        f"<tr><th scope=row>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>" for first, *rest in rows
    )
    head = "".join(f"<th scope=col>{cell}</th>" for cell in heads)
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return table if body else ""


def _disclosed(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>{body}</details>" if body else ""


def _controls(runs: Sequence[Run], unit: str) -> str:
    chosen = "".join(
        f'<label style="{_color(number)}"><input type=checkbox class="shown" value={number} checked>'
        f"{_named(runs, number)}</label>"
        for number in range(len(runs))
    )
    return (
        '<form class="controls"><fieldset><label><input type=radio name=x value=step checked>by step</label>'
        f"<label><input type=radio name=x value=time>by time ({unit} at work)</label>"
        f"<label><input type=checkbox name=logx>log x</label></fieldset><fieldset>{chosen}</fieldset></form>"
        "<noscript><p>The curves are drawn by a script, which this browser does not run.</p></noscript>"
    )


def _charts(charts: Sequence[curves.Chart], section: str) -> str:
    found = "".join(
        f'<figure class="chart"><figcaption>{escape(chart.kind.title)}<label><input type=checkbox class="log"'
        f"{' checked' if chart.kind.log else ''}>log y</label></figcaption>"
        f'<div class="plot" data-chart={number}></div></figure>'
        for number, chart in enumerate(charts)
        if chart.kind.section == section
    )
    return f'<div class="charts">{found}</div>' if found else ""


def _summary(runs: Sequence[Run], figures: Sequence[dict[str, curves.Points]]) -> str:
    def seen(name: str, choose: Callable[[list[tuple[int, float]]], tuple[int, float]]) -> list[str]:
        found = ([(step, value) for step, value in of.get(name, {}).items() if value is not None] for of in figures)
        chosen = (choose(points) if points else None for points in found)
        return [f"{_number(one[1])} <small>at {one[0]:,}</small>" if one else _NO_VALUE for one in chosen]

    def last(name: str) -> list[str]:
        return seen(name, itemgetter(-1))

    def lowest(name: str) -> list[str]:
        return seen(name, lambda points: min(points, key=itemgetter(1)))

    rows = [
        ["State", *(_state(run) for run in runs)],
        ["Model", *(escape(str(run.config.get("name", _NO_VALUE))) for run in runs)],
        ["Training loss, last", *last("loss")],
        ["Held-out loss, averaged weights, last", *last("heldout_loss_ema")],
        ["&hellip; lowest", *lowest("heldout_loss_ema")],
        ["Images a second, last", *last("images_per_second")],
        ["Time since its first start", *(_duration(sum(run.seconds.values())) for run in runs)],
        ["Restarts", *(_restarts(run) for run in runs)],
        ["Workdir", *(f"<code>{escape(str(run.place))}</code>" for run in runs)],
    ]
    notes = "".join(f"<li>{_named(runs, i)}: {escape(note)}</li>" for i, run in enumerate(runs) for note in run.notes)
    table = _table(["", *(_named(runs, number) for number in range(len(runs)))], rows)
    return table + (f'<ul class="notes">{notes}</ul>' if notes else "")


def _state(run: Run) -> str:
    step = max((line["step"] for line in run.lines), default=0)
    aim: Any = run.config.get("train.num_steps")
    if not is_count(aim, 1, 2**53):
        return f"at step {step:,}"
    if step >= aim:
        return f"done, {step:,} steps"
    return f"{'at work' if run.is_at_work() else 'stopped'}, logged up to step {step:,} of {aim:,}"


def _restarts(run: Run) -> str:
    count = run.last_timing().get("restarts")
    return f"{count:,}" if is_count(count, 0, 2**53) else _NO_VALUE


def _goodput(runs: Sequence[Run]) -> str:
    bars = []
    for number, run in enumerate(runs):
        if not (whole := sum(run.seconds.values())):
            continue
        parts = sorted(run.seconds.items(), key=itemgetter(1), reverse=True)
        shares = [(escape(kind), f"{value / whole:.1%}", value) for kind, value in parts]
        bar = "".join(
            f'<i class="kind-{kind}" style="flex-grow:{value:.6g}" title="{kind} {share}"></i>'
            for kind, share, value in shares
        )
        words = "".join(
            f'<li><i class="kind-{kind}"></i>{kind} {share} <small>{_duration(value)}</small></li>'
            for kind, share, value in shares
        )
        head = f"{_named(runs, number)}: {run.seconds.get('train', 0) / whole:.1%} of {_duration(whole)}"
        bars.append(f'<div class="goodput"><p>{head}</p><div class="bar">{bar}</div><ul>{words}</ul></div>')
    return "".join(bars) + f'<p class="note">{_KINDS_NOTE}</p>' if bars else ""


def _samples(runs: Sequence[Run]) -> str:
    chosen = [pictures.choose(run.pictures) for run in runs]
    most, found, steps = pictures.budget(sum(map(len, chosen))), [], set()
    for number, (run, grids) in enumerate(zip(runs, chosen, strict=True)):
        images, last = [], 0
        for step, path in grids:
            try:
                uri, width, height = pictures.data_uri(path, most)
            except ImageError as error:
                run.notes.append(f"{path.name}: {error}")
                continue
            size = f"width={width} height={height}"
            images.append(f'<img data-step={step} alt="samples of step {step:,}" {size} src="{uri}" hidden>')
            steps.add(last := step)
        if images:
            images[-1] = images[-1].replace(" hidden>", ">")  # what a reader without scripts sees, and paper
            caption = f"<figcaption>{_named(runs, number)} <output>step {last:,}</output></figcaption>"
            found.append(f'<figure class="grid">{caption}{"".join(images)}</figure>')
    if not found:
        return ""
    slider = (
        f'<p class="slider"><input type=range id="step" min=0 max={len(steps) - 1} value={len(steps) - 1} step=1 '
        f'aria-label="step of the samples" data-steps="{_json(sorted(steps))}"><output></output></p>'
    )
    return f'{slider if len(steps) > 1 else ""}<div class="grids">{"".join(found)}</div>'


def _scores(runs: Sequence[Run]) -> str:
    reports = [
        (number, file, {name: value for name, value in scores.items() if is_number(value, -LARGEST, LARGEST)})
        for number, run in enumerate(runs)
        for file, scores in run.scores.items()
    ]
    heads = [f"{_named(runs, number)}<br><code>{escape(file)}</code>" for number, file, _ in reports]
    names = dict.fromkeys(name for *_, numbers in reports for name in numbers)
    rows = [[escape(name), *(_number(numbers.get(name)) for *_, numbers in reports)] for name in names]
    return _table(["", *heads], rows)


def _checkpoints(runs: Sequence[Run], figures: Sequence[dict[str, curves.Points]]) -> str:
    rows = []
    for number, run in enumerate(runs):
        usable = [one.step for one in run.checkpoints if one.folder == BEST and one.state in (SOUND, UNCHECKED)]
        losses = figures[number].get("heldout_loss_ema", {})
        for one in run.checkpoints:
            held = "best score" if one.step == max(usable, default=-1) else "best score before"
            what, size = "full state" if one.folder != BEST else held, f"{one.size / 1e6:,.1f} MB"
            rows.append(
                [_named(runs, number), f"{one.step:,}", what, _soundness(one), size, _number(losses.get(one.step))]
            )
        for name in run.set_aside:
            bad = '<span class="bad">damaged, set aside</span>'
            rows.append([_named(runs, number), escape(name), "full state", bad, _NO_VALUE, _NO_VALUE])
    return _table(["Run", "Step", "What", "State", "Size", "Held-out loss, averaged"], rows)


def _soundness(checkpoint: Checkpoint) -> str:
    good, state = {SOUND: "good", UNCHECKED: "open", UNDER_WAY: "open"}.get(checkpoint.state), checkpoint.state
    said = state if good or state.startswith("cannot") else f"damaged: {state}"
    return f'<span class="{good or "bad"}">{escape(said)}</span>'


def _configuration(runs: Sequence[Run]) -> str:
    known = [(number, run.config) for number, run in enumerate(runs) if run.config]
    if not known:
        return ""
    defaults = {name: field.default for name, field in FIELDS.items()}
    names = list(dict.fromkeys([*defaults, *(name for _, config in known for name in config)]))
    # A field that an older run does not name has its default. A run alone is compared with the defaults.
    columns = [defaults | config for _, config in known]
    compared = columns if len(columns) > 1 else [defaults, *columns]
    heads, title = [_named(runs, number) for number, _ in known], "Fields that differ"
    if len(columns) == 1:
        heads, title = ["default", *heads], "Fields that differ from their default"

    def cell(config: dict[str, Any], name: str) -> str:
        return f"<code>{escape(shown(config[name]))}</code>" if name in config else _NO_VALUE

    rows = [
        [f"<code>{escape(name)}</code>", *(cell(config, name) for config in compared)]
        for name in names
        if any(config.get(name, _ABSENT) != compared[0].get(name, _ABSENT) for config in compared)
    ]
    whole = "".join(
        f"<h3>{_named(runs, number)}</h3><pre>"
        + escape("\n".join(f"{name:<34} {shown(config[name])}" for name in names if name in config))
        + "</pre>"
        for number, config in known
    )
    table = _table(["", *heads], rows)
    return f"<h3>{title}</h3>{table or '<p>None.</p>'}{_disclosed('The whole configuration', whole)}"
