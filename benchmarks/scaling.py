"""Times training and drawing on one device and on more of this machine, and counts what a training step sends.

python -m benchmarks.scaling --devices=1,2,4 --at_once=8 --output=scaling.json \
  --configs=configs/terdit_600m.py:64:dots:data,configs/terdit_4b.py:32:dots:fsdp \
  --losses=configs/terdit_600m.py:64:dots --sample_configs=configs/terdit_4b.py

- `--configs`, path[@FIELD=VALUE...]:batch a device[:remat[:layout+layout[:gather+gather]]] each: the training step on
  each number of devices, with copied parameters (`data`) and with cut ones (`fsdp`) for each gather, the batch a device
  the same. Bytes are read from the compiled program (`terdit_jax.aot.collectives`): what one device sends, of
  weights gathered and of gradients reduced. "Beyond one device" is the share of a step that one device with the same
  batch does not need: what communication costs after all that is hidden, less what FSDP saves by updating a part of
  the parameters.
- `--losses`, path:global batch[:remat] each: the first 20 losses on one device and on all, of the same examples. Beside
  them stands one device that sums the gradient of as many parts as there are devices: what rounding alone does.
- `--sample_configs`: pictures drawn in `fast` from random codes, with --sample_steps steps of the schedule; pictures a
  second of a longer schedule are proportionally fewer, their ratios the same.

Every row is a process of its own, written as soon as it is known. With --at_once, rows of one device run beside each
other on devices of their own; of the others one is timed while the rest wait, compiled.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import concurrent.futures
import datetime
import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading
import time

from absl import flags

from benchmarks.machine import on_devices, share_devices, take_turn
from benchmarks.scaling_rows import measure, measure_losses, measure_sampling
from terdit_jax.errors import UserError, run_command
from terdit_jax.paths import define_path
from terdit_jax.versions import versions

_CONFIGS = flags.DEFINE_list("configs", "", "path[@FIELD=VALUE...]:batch a device[:remat[:layouts[:gathers]]] each.")
_DEVICES = flags.DEFINE_list("devices", None, "Numbers of devices, the first of them 1; 1 and all if left out.")
_GATHER = flags.DEFINE_list("gather", ["codes", "bfloat16"], "Of config.mesh.gather, for FSDP, where none is named.")
_LAYOUTS = flags.DEFINE_list("layouts", ["data", "fsdp"], "Mesh axes that take the devices, where a config names none.")
_STEPS = flags.DEFINE_integer("steps", 10, "Steps a round.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds, of which the median counts.", lower_bound=1)
_LOSSES = flags.DEFINE_list("losses", "", "path:global batch[:remat] each.")
_SAMPLE_CONFIGS = flags.DEFINE_list("sample_configs", "", "Configuration files of models to draw with.")
_SAMPLE_BATCH = flags.DEFINE_integer("sample_batch", 32, "Pictures that a device draws at once.", lower_bound=1)
_SAMPLE_STEPS = flags.DEFINE_integer("sample_steps", 10, "Steps of their schedule.", lower_bound=1)
_PICTURES = flags.DEFINE_integer("pictures", 1024, "Pictures drawn.", lower_bound=1)
_AT_ONCE = flags.DEFINE_integer("at_once", 1, "Processes beside each other.", lower_bound=1)
_MINUTES = flags.DEFINE_float("minutes", 0, "After which rows are ended, or not begun; 0: no limit.", lower_bound=0)
_OUTPUT = define_path("output", "scaling.json", "JSON file.")
_ONE = flags.DEFINE_string("one", None, "A single row in this process, as JSON; prints JSON.")
_TURN = flags.DEFINE_list("turn", "", "Its open files of `machine.share_devices`.")

_BEGIN = time.monotonic()


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    if _ONE.value:
        print(json.dumps(_measure(json.loads(_ONE.value))))
        return
    counts = [int(count) for count in _DEVICES.value or sorted({1, _count_devices()})]
    rows = plan(_CONFIGS.value, _LAYOUTS.value, _GATHER.value, counts)
    rows += plan_sampling(_SAMPLE_CONFIGS.value, counts, _SAMPLE_BATCH.value, _SAMPLE_STEPS.value, _PICTURES.value)
    rows += plan_losses(_LOSSES.value, counts)  # the shortest last: what is left waits for the longest
    if not rows:
        raise UserError("--configs is missing, e.g. --configs=configs/terdit_600m.py:64:dots")
    content = {
        "command": " ".join(["python -m benchmarks.scaling", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "python": sys.version.split()[0],
        "versions": versions("jax", "jaxlib", "flax", "optax"),
    }
    done = []
    for row in run_rows(rows, max(counts)):
        done.append(row)
        print(json.dumps(row), flush=True)
        done.sort(key=lambda row: (row["kind"], row["path"], row["batch"], row["layout"], row["devices"]))
        compare(done)
        pathlib.Path(_OUTPUT.value).write_text(json.dumps({**content, "rows": done}, indent=1) + "\n")
    print(table(done), flush=True)


def plan(configs: list[str], layouts: list[str], gathers: list[str], counts: Sequence[int] = (1, 2)) -> list[dict]:
    """The rows of each config's training step: one device, then more of them in each layout."""
    rows = []
    for written in configs:
        form = "path:batch a device[:remat[:layout+layout[:gather+gather]]]"
        path, batch, remat, *own = _parse(written, "--configs", form)
        own_layouts = own[0].split("+") if own else layouts
        own_gathers = own[1].split("+") if len(own) > 1 else gathers
        common = {"kind": "step", "path": path, "batch": batch, "remat": remat}
        for layout in own_layouts:
            if layout not in ("data", "fsdp"):
                raise UserError(f"--layouts={layout}: choose of data, fsdp")
        for count in counts:
            if count == 1:
                rows.append({**common, "layout": "one", "gather": "codes", "devices": 1})
                continue
            for layout in own_layouts:
                for gather in own_gathers if layout == "fsdp" else ["codes"]:
                    rows.append({**common, "layout": layout, "gather": gather, "devices": count})
    return rows


def plan_losses(configs: list[str], counts: Sequence[int]) -> list[dict]:
    """The rows of each config's first losses; the batch is that of a device."""
    rows = []
    for written in configs:
        path, batch, remat, *_ = _parse(written, "--losses", "path:global batch[:remat]")
        most = max(counts)
        if batch % most:
            raise UserError(f"--losses={written}: a batch of {batch} is not divisible by {most} devices")
        common = {"kind": "losses", "path": path, "remat": remat, "gather": "codes", "global_batch": batch}
        rows += [
            {**common, "layout": "one", "batch": batch, "devices": 1, "accumulation": parts} for parts in (1, most)
        ]
        rows += [
            {**common, "layout": layout, "batch": batch // most, "devices": most, "accumulation": 1}
            for layout in ("data", "fsdp")
        ]
    return rows


def plan_sampling(paths: list[str], counts: Sequence[int], batch: int, steps: int, pictures: int) -> list[dict]:
    """The rows of pictures drawn."""
    common = {"kind": "sampling", "batch": batch, "steps": steps, "pictures": pictures, "gather": "codes"}
    return [
        {**common, "path": path, "layout": "one" if count == 1 else "data", "devices": count}
        for path in paths
        for count in counts
    ]


def deal(rows: list[dict], num_devices: int) -> list[list[int]]:
    """Devices for each row: rows of equal device counts take turns among the groups of that size."""
    seen: dict[int, int] = {}
    dealt = []
    for row in rows:
        count = row["devices"]
        group = seen.setdefault(count, 0) % (num_devices // count)
        seen[count] += 1
        dealt.append(list(range(group * count, (group + 1) * count)))
    return dealt


def _parse(written: str, flag: str, form: str) -> list:
    path, *rest = written.split(":")
    if not rest or not rest[0].isdigit():
        raise UserError(f"{flag}={written}: give {form}")
    return [path, int(rest[0]), (rest[1:] or [None])[0] or None, *rest[2:]]


def _measure(run: dict) -> dict:
    turn = lambda: take_turn([int(file) for file in _TURN.value if file])  # noqa: E731
    if run["kind"] == "sampling":
        return measure_sampling(run, turn)
    return measure_losses(run, turn) if run["kind"] == "losses" else measure(run, _STEPS.value, _ROUNDS.value, turn)


def _count_devices() -> int:
    """Asked of another process: one that has seen the devices has taken memory of them."""
    command = [sys.executable, "-c", "import jax; print(jax.device_count())"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def run_rows(rows: list[dict], num_devices: int) -> Iterator[dict]:
    """Measures rows, those of one device first, and gives each as it is known.

    XLA chooses kernels by timing them when it compiles: rows of one device have theirs to themselves, and with
    JAX_COMPILATION_CACHE_DIR the others find the choices there.
    """
    free: queue.Queue[int] = queue.Queue()
    for device in range(num_devices):
        free.put(device)

    def alone(run: dict) -> dict:
        device = free.get()
        try:
            return _in_own_process(run, [device], [])
        finally:
            free.put(device)

    def together(run: dict, devices: list[int]) -> dict:
        with lock:  # one at a time asks for its devices, so that none is kept waiting by those who came later
            files = share_devices(folder, devices)
        try:
            return _in_own_process(run, devices, files)
        finally:
            for file in files:
                os.close(file)

    one = [row for row in rows if row["devices"] == 1]
    more = [row for row in rows if row["devices"] > 1]
    lock = threading.Lock()
    with tempfile.TemporaryDirectory() as folder:
        with concurrent.futures.ThreadPoolExecutor(min(_AT_ONCE.value, num_devices)) as pool:
            yield from _as_they_come(pool.submit(alone, row) for row in one)
        with concurrent.futures.ThreadPoolExecutor(_AT_ONCE.value) as pool:
            yield from _as_they_come(
                pool.submit(together, row, devices) for row, devices in zip(more, deal(more, num_devices), strict=True)
            )


def _as_they_come(futures: Iterable[concurrent.futures.Future]) -> Iterator[dict]:
    for future in concurrent.futures.as_completed(list(futures)):
        yield future.result()


def _in_own_process(run: dict, devices: list[int], turn: list[int]) -> dict:
    left = None
    if _MINUTES.value:
        left = _BEGIN + 60 * _MINUTES.value - time.monotonic()
        if left <= 0:
            return {**run, "failed": f"not begun within --minutes={_MINUTES.value}"}
    command = [sys.executable, "-m", "benchmarks.scaling", f"--one={json.dumps(run)}"]
    command += [f"--steps={_STEPS.value}", f"--rounds={_ROUNDS.value}", f"--turn={','.join(map(str, turn))}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=on_devices(devices), pass_fds=turn, timeout=left
        )
    except subprocess.TimeoutExpired:
        return {**run, "failed": f"not done within --minutes={_MINUTES.value}"}
    if done.returncode:
        return {**run, "failed": done.stderr.strip().splitlines()[-1][:300] if done.stderr else "no output"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(rows: list[dict]) -> None:
    """Adds to each row what it is against others of its config and batch.

    scaling: times as fast as one device. beyond_one_device: share of its time that one device does not need.
    over_codes: how much longer a step takes than with gathers of codes, a share. largest_difference: of its losses from
    one device's, relative.
    """
    good = [row for row in rows if "failed" not in row]

    def find(row: dict, **other) -> dict | None:
        """The row that differs in nothing but these."""
        wanted = row | other
        fields = ("kind", "path", "remat", "global_batch" if row["kind"] == "losses" else "batch", *other)
        return next((r for r in good if all(r.get(name) == wanted.get(name) for name in fields)), None)

    for row in good:
        if row["kind"] == "losses":
            if one := find(row, layout="one", accumulation=1):
                pairs = zip(row["losses"], one["losses"], strict=True)
                row["largest_difference"] = max(abs(loss / expected - 1) for loss, expected in pairs)
            continue
        if one := find(row, layout="one"):
            row["scaling"] = row["images_per_second"] / one["images_per_second"]
            row["beyond_one_device"] = 1 - row["scaling"] / row["devices"]
        codes = find(row, layout=row["layout"], devices=row["devices"], gather="codes")
        if codes and codes is not row:
            row["over_codes"] = row["seconds"] / codes["seconds"] - 1


def table(rows: list[dict]) -> str:
    """The rows for people, each kind in a table of its own."""
    return "\n\n".join(
        _table([row for row in rows if row["kind"] == kind], columns)
        for kind, columns in _COLUMNS.items()
        if any(row["kind"] == kind for row in rows)
    )


def _cell(form: str, *names: str) -> Callable[[dict], str]:
    """Writes a value, which may lie in a dict in the row, or nothing where there is none."""

    def write(row: dict) -> str:
        value = row
        for name in names:
            value = value.get(name) if value else None
        return "" if value is None else form.format(value)

    return write


_SHAPE = {
    "config": lambda row: row.get("config", row["path"]),
    "batch a device": _cell("{}", "batch"),
    "devices": _cell("{}", "devices"),
    "layout": _cell("{}", "layout"),
}
_SPEED = {
    "images/s": _cell("{:.1f}", "images_per_second"),
    "x one device": _cell("{:.2f}", "scaling"),
    "beyond one device": _cell("{:.1%}", "beyond_one_device"),
}
_PEAK = {"peak GB": _cell("{:.1f}", "peak_gb")}
_COLUMNS = {
    "step": {
        **_SHAPE,
        "gather": lambda row: row["gather"] if row["layout"] == "fsdp" else "",
        **_SPEED,
        "longer than codes": _cell("{:+.1%}", "over_codes"),
        "MB gathered": lambda row: f"{row['sent']['gathered'] / 1e6:,.1f}",
        "MB reduced": lambda row: f"{row['sent']['reduced'] / 1e6:,.1f}",
        **_PEAK,
    },
    "losses": {
        **_SHAPE,
        "parts summed": _cell("{}", "accumulation"),
        "first loss": lambda row: f"{row['losses'][0]:.5f}",
        "last loss": lambda row: f"{row['losses'][-1]:.5f}",
        "largest relative difference": _cell("{:.1e}", "largest_difference"),
    },
    "sampling": {**_SHAPE, "steps": _cell("{}", "steps"), "pictures": _cell("{}", "pictures"), **_SPEED, **_PEAK},
}


def _table(rows: list[dict], columns: dict[str, Callable[[dict], str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        failed = "failed" in row
        cells = [write(row) for name, write in columns.items() if not failed or name in _SHAPE or name == "gather"]
        lines.append("| " + " | ".join([*cells, f"failed: {row['failed']}"] if failed else cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
