"""Saved reports as Markdown tables: one of training steps, one of drawings, one beside what has been measured."""

from collections.abc import Iterable, Iterator

from etils import epath

from terdit_jax.errors import UserError
from terdit_jax.parallel.chips import GIB
from terdit_jax.untrusted import parse_json, reading

_TRAIN = (
    ("Machine", lambda r: f"`{r['topology']}`"),
    ("Chips", lambda r: f"{r['chips']:,}"),
    ("data x fsdp x tensor", lambda r: " x ".join(str(size) for size in r["mesh"].values())),
    ("State, GiB a chip", lambda r: _gib(sum(r["memory"]["arguments"].values()))),
    ("Temporaries", lambda r: _gib(r["memory"]["temporaries"])),
    ("Total of memory", lambda r: f"{_gib(r['memory']['total'])} of {_gib(r['memory']['limit'])}"),
    ("Sent, GiB a chip and step", lambda r: _gib(r["sent"])),
    ("Compute / memory / network, ms", lambda r: _times(r["roofline"], 1)),
    ("Step, ms: overlapped, in turn", lambda r: _step(r["roofline"], 1)),
    ("MFU at best", lambda r: f"{r['roofline']['mfu_bound']:.0%}"),
    ("Images/s at best", lambda r: f"{r['roofline']['images_per_second']:,.0f}"),
    ("Hours at best", lambda r: f"{r['roofline']['hours']:,.0f}"),
)
_SAMPLE = (
    ("Machine", lambda r: f"`{r['topology']}`"),
    ("Mode", lambda r: r["options"]["mode"]),
    ("Images at once", lambda r: str(r["images"])),
    ("Weights, GiB a chip", lambda r: _gib(r["memory"]["arguments"]["weights"])),
    ("Total of memory", lambda r: f"{_gib(r['memory']['total'])} of {_gib(r['memory']['limit'])}"),
    ("TFLOPs a denoising step", lambda r: f"{r['flops']['compiled'] / r['steps'] / 1e12:.2f}"),
    ("Compute / memory, ms a step", lambda r: _times(r["roofline"], r["steps"], ("compute", "memory"))),
    ("Step, ms: overlapped, in turn", lambda r: _step(r["roofline"], r["steps"])),
    ("Bound", lambda r: r["roofline"]["bound"]),
    ("Images/s at best", lambda r: f"{r['roofline']['images_per_second']:.2f}"),
)


def make_tables(folder: epath.Path) -> str:
    """The tables of all reports in a folder that have a roofline, by number of chips within a family.

    Raises:
      UserError: no reports, or files that are none.
    """
    with reading(f"--table={folder}: holds a report that is damaged"):
        reports = sorted(_read(folder), key=lambda r: (r["topology"].partition(":")[0], r["chips"], r["images"]))
        tables = [
            _table(columns, [r for r in reports if r["what"] == what and r["roofline"]])
            for what, columns in (("train", _TRAIN), ("sample", _SAMPLE))
        ]
    if not any(tables):
        raise UserError(f"--table={folder}: holds no report (*.json) of a training step or a drawing")
    return "\n\n".join(table for table in tables if table)


def compare(folder: epath.Path, measured: epath.Path) -> str:
    """Reports of training steps on one chip beside steps measured there, as a table.

    `measured` is JSON of benchmarks/training.py, whose runs are found by configuration, batch size and remat policy.

    Raises:
      UserError: files that cannot be read, or no run that a report is of.
    """
    with reading(f"--measured={measured}: is no result of benchmarks/training.py"):
        runs = parse_json(
            measured.read_bytes(), f"--measured={measured}: is no result of benchmarks/training.py: it", dict
        )["rows"]
        of = {(run["config"], run["batch_size"], run["remat"]): run for run in runs if run["devices"] == 1}
    with reading(f"--table={folder} or --measured={measured}: holds a result that is damaged"):
        rows = [
            _compare(report, run)
            for report in _read(folder)
            if (run := of.get((report["config"], report["images"], report["options"].get("remat"))))
            and report["chips"] == 1
        ]
    if not rows:
        raise UserError(f"--measured={measured}: holds no run on one device that a report in {folder} is of")
    head = (
        "| Configuration | Images | Remat | Memory compiled, GB | Peak measured, GB "
        "| Step compiled, ms: overlapped, in turn | Step measured, ms | Measured / in turn |"
    )
    return "\n".join([head, "| --- " * 8 + "|", *rows])


def _compare(report: dict, run: dict) -> str:
    speed, memory = report["roofline"], report["memory"]["total"]
    took = run["batch_size"] / run["images_per_second"]
    return (
        f"| `{report['config']}` | {report['images']} | {run['remat']} "
        f"| {memory / 1e9:.1f} | {run['peak_gb']:.1f} "
        f"| {_step(speed, 1)} | {took * 1e3:.0f} | {took / speed['in_turn']:.2f} |"
    )


def _read(folder: epath.Path) -> Iterator[dict]:
    for path in sorted(folder.glob("*.json")):
        report = parse_json(path.read_bytes(), f"--table={folder}: {path.name}: it", object)
        if isinstance(report, dict) and "what" in report:  # suggestions and others lie beside them
            yield report


def _table(columns: tuple, reports: list[dict]) -> str:
    if not reports:
        return ""
    rows = [[name for name, _ in columns], ["---"] * len(columns)]
    rows += [[cell(report) for _, cell in columns] for report in reports]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _times(speed: dict, steps: int, parts: Iterable[str] = ("compute", "memory", "network")) -> str:
    return " / ".join(f"{speed[part] / steps * 1e3:.1f}" for part in parts)


def _step(speed: dict, steps: int) -> str:
    return ", ".join(f"{speed[name] / steps * 1e3:.1f}" for name in ("overlapped", "in_turn"))
