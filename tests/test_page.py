"""The page of a report: what it shows of workdirs that are whole, empty, damaged or hostile, and in a browser."""

import contextlib
import hashlib
from html import escape
from html.parser import HTMLParser
import json
from pathlib import Path
import re
import shutil
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import pytest

from terdit_jax.checkpoints.layout import BEST, DAMAGED, ITEMS, RUN
from terdit_jax.checkpoints.manifest import MANIFEST, write_manifest
from terdit_jax.config import RunConfig
from terdit_jax.errors import UserError
from terdit_jax.page import curves
from terdit_jax.page.html import make_page
from terdit_jax.page.pictures import budget, choose, data_uri
from terdit_jax.page.workdir import SOUND, UNCHECKED, UNDER_WAY, Run, read_runs
from tests.runs import ROOT, execute

ASSETS = ROOT / "terdit_jax" / "page" / "assets"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECTIONS = (
    "runs", "loss", "loss-by-timestep", "rates", "where-the-time-went", "samples", "scores", "checkpoints",
    "configuration", "further-figures",
)  # fmt: skip
UNCLOSED = {"meta", "link", "input", "img", "br"}


def make_run(path: Path, steps: int = 8, *, side: int = 8, **fields) -> Path:
    """A workdir as a run leaves it: killed after step 4 of `steps` and resumed, with all that a page shows."""
    config = RunConfig().with_fields({"train.num_steps": steps, **fields})
    (path / "samples").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    lines = []
    for step in range(1, steps + 1):
        kinds = {"seconds_train": 2.0 * step, "seconds_start": 5.0, "seconds_down": 100.0 if step > 4 else 0.0}
        lines.append(
            {
                "step": step, "loss": 1 / step, "grad_norm": 0.5, "learning_rate": 1e-3, "zero_share/attention": 0.3,
                **{f"loss_t{quarter}of4": quarter / step for quarter in (1, 2, 3, 4)},
                "timing": {"images_per_second": 64.0 + step, "restarts": int(step > 4), **kinds},
            }
        )  # fmt: skip
    lines += [{"step": step, "heldout_loss": 2 / step, "heldout_loss_ema": 1.5 / step} for step in (4, steps)]
    lines += [{"step": step, "classifier_frechet_distance": 9.0 - step} for step in (4, steps)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    generator = np.random.default_rng(0)
    for step in (4, steps):
        grid = generator.integers(0, 256, (side, 2 * side, 3), np.uint8)
        Image.fromarray(grid).save(path / "samples" / f"step_{step:08d}.png")
        make_checkpoint(path / "checkpoints" / str(step), ITEMS)
    make_checkpoint(path / BEST / "checkpoints" / str(steps), ["ema_params"])
    (path / DAMAGED / "2").mkdir(parents=True)
    (path / "proxy_metrics.json").write_text(json.dumps({"classifier_agreement": 0.75, "num_samples": 9, "flags": {}}))
    return path


def make_checkpoint(path: Path, items) -> None:
    for item in (*items, RUN):
        (path / item).mkdir(parents=True)
        (path / item / "data").write_bytes(item.encode())
    write_manifest(path)


def read(*paths: Path, check: bool = True) -> list[Run]:
    return read_runs([str(path) for path in paths], check=check, say=print)


class Parsed(HTMLParser):
    """A page whose elements are closed in order; `text` is what a reader sees, without scripts and styles."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in UNCLOSED:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += data

    def attributes(self, name: str) -> list[str]:
        return [given[name] or "" for _, given in self.elements if name in given]


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])


def curve(page: str, runs: list[Run], title: str) -> list[dict]:
    """The curves of a chart by its title."""
    number = re.search(f"{re.escape(escape(title))}<label>.*?data-chart=([0-9]+)", page)[1]
    return data_of(page)["charts"][int(number)]


def test_a_page_has_every_section_and_needs_no_network(tmp_path):
    runs = read(make_run(tmp_path / "a"), make_run(tmp_path / "b", 6))
    page = make_page(runs, "python -m terdit_jax.report a b")
    parsed = Parsed(page)
    ids = parsed.attributes("id")
    assert len(ids) == len(set(ids)) and set(SECTIONS) < set(ids)
    assert [link.removeprefix("#") for link in parsed.attributes("href")[1:]] == list(SECTIONS)
    assert all(source.startswith("data:") for source in parsed.attributes("src"))
    assert {tag for tag, given in parsed.elements if "src" in given} == {"img"}
    assert "default-src 'none'" in parsed.attributes("content")[0]
    for word in (
        "done, 8 steps",
        "train.num_steps",
        "classifier_agreement",
        "0.75",
        "damaged, set aside",
        "best score",
    ):
        assert word in parsed.text, word
    sources = (ASSETS / "page.js").read_text() + (ASSETS / "page.css").read_text()
    assert not re.search(r"https?://|@import|url\(|fetch\(", sources)


def test_curves_are_the_figures_by_step_and_by_time_at_work(tmp_path):
    """Time leaves out what was `down`; the lines of held-out losses tell no time and have that of their step."""
    runs = read(make_run(tmp_path / "a"))
    page = make_page(runs, "")
    assert data_of(page)["unit"] == "minutes"
    (loss,) = curve(page, runs, "Training loss")
    assert loss["step"] == list(range(1, 9)) and loss["value"] == [float(f"{1 / step:.6g}") for step in range(1, 9)]
    assert loss["time"] == pytest.approx([(5 + 2 * step) / 60 for step in range(1, 9)], rel=1e-5)
    averaged, raw = curve(page, runs, "Held-out loss, averaged weights")
    assert (averaged["step"], averaged["value"]) == ([4, 8], [0.375, 0.1875])
    assert averaged["time"] == [loss["time"][3], loss["time"][7]]
    assert raw["dashed"] and not averaged["dashed"] and raw["value"] == [0.5, 0.25]
    assert curve(page, runs, "Images a second")[0]["value"][0] == 65.0
    assert runs[0].seconds == {"train": 16.0, "start": 5.0, "down": 100.0} and "13.2% of 2.02 minutes" in page


def test_quarters_of_timesteps_are_compared_by_their_noise(tmp_path):
    """t = 0 is nearly clean under ddpm, and noise under flow."""
    paths = make_run(tmp_path / "a"), make_run(tmp_path / "b", **{"diffusion.objective": "flow"})
    runs = read(*paths)
    page = make_page(runs, "")
    for title, ddpm, flow in (("Timesteps of least noise", 1, 4), ("Timesteps of more noise", 3, 2)):
        assert [series["value"][0] for series in curve(page, runs, title)] == [ddpm, flow]


def test_thinning_keeps_the_peaks(tmp_path):
    values = np.random.default_rng(1).standard_normal(50_000).tolist()
    values[31_337], values[4_242], values[17] = 99.0, -99.0, None
    run = Run("a", tmp_path, lines=[{"step": step, "loss": value} for step, value in enumerate(values)])
    figures = [curves.figures_of(run)] * 3
    (chart,) = curves.make_charts([run] * 3, figures, 1.0)
    for series in chart.series:
        assert len(series.step) <= 600 and series.step == sorted(set(series.step)) and not series.time
        assert (series.step[0], series.step[-1]) == (0, 49_999) and {99.0, -99.0} < set(series.value)


def test_a_page_of_three_long_runs_stays_small(tmp_path):
    """2,000 lines of 25 figures each, and the bytes that pictures may have."""
    names = [f"rms/{i}" for i in range(25)]
    values = np.random.default_rng(2).standard_normal((2000, 25))
    lines = [{"step": step, **dict(zip(names, row, strict=True))} for step, row in enumerate(values.tolist())]
    page = make_page([Run(name, tmp_path, lines=lines) for name in "abc"], "")
    assert len(page) + budget(1) * 4 / 3 < 5e6


def test_pictures_are_chosen_and_shrunk_to_their_budget(tmp_path):
    paths = [(step, tmp_path / str(step)) for step in range(100)]
    chosen = choose(paths)
    assert len(chosen) == 12 and chosen[0] == paths[0] and chosen[-1] == paths[-1] and choose(paths[:5]) == paths[:5]
    grid = np.random.default_rng(3).integers(0, 256, (600, 600, 3), np.uint8)
    Image.fromarray(grid).save(tmp_path / "noise.png")
    uri, *size = data_uri(tmp_path / "noise.png", 30_000)
    assert uri.startswith("data:image/webp;base64,") and len(uri) < 30_000 * 4 / 3 + 100 and size == [600, 600]
    Image.fromarray(grid[:8, :8]).save(tmp_path / "small.png")
    assert data_uri(tmp_path / "small.png", 30_000)[0].startswith("data:image/png;base64,")


def test_the_state_of_checkpoints(tmp_path):
    path = make_run(tmp_path / "a")
    (path / "checkpoints" / "8" / "params" / "data").write_bytes(b"flipped")
    (path / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    make_checkpoint(path / "checkpoints" / "10", ITEMS)
    (path / "checkpoints" / "10" / MANIFEST).unlink()
    (run,) = read(path)
    states = {(one.step, one.folder): one.state for one in run.checkpoints}
    assert states[4, "checkpoints"] == states[8, BEST] == SOUND and len(states) == 4 and run.set_aside == ["2"]
    assert states[8, "checkpoints"] == "params/data does not match its SHA-256"
    assert states[10, "checkpoints"] == "its SHA-256 manifest is missing"
    assert "damaged: params/data does not match its SHA-256" in Parsed(make_page([run], "")).text
    assert {one.state for one in read(path, check=False)[0].checkpoints} == {UNCHECKED}
    (path / "heartbeat.json").write_text(json.dumps({"time": time.time()}))
    assert [one.state for one in read(path)[0].checkpoints if one.step == 10] == [UNDER_WAY]


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [make_run(tmp_path / name) for name in ("one/digits", "two/digits", "cifar10")]
    assert [run.name for run in read(*paths, paths[0])] == ["one/digits", "two/digits", "cifar10"]


def test_differences_of_configurations(tmp_path):
    def rows(*paths: Path) -> str:
        text = Parsed(make_page(read(*paths), "")).text
        return text[text.index("Fields that differ") : text.index("The whole configuration")]

    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", **{"optimizer.learning_rate": 0.5})
    assert "optimizer.learning_rate0.00050.5" in rows(first, second) and "train.num_steps" not in rows(first, second)
    assert "train.num_steps" in rows(first) and "learning_rate" not in rows(first)  # alone: against the defaults
    older = json.loads((first / "config.json").read_text())
    del older["optimizer"]["spike_window"]  # of a run from before the field, which has its default
    (first / "config.json").write_text(json.dumps(older))
    assert "spike_window" not in rows(first, second)


@pytest.mark.parametrize("missing", ["config.json", "metrics.jsonl", "samples", "checkpoints", "all but one"])
def test_what_a_run_lacks_is_left_out(tmp_path, missing):
    path = make_run(tmp_path / "a")
    if missing == "all but one":
        shutil.rmtree(path)
        path.mkdir()
        (path / "metrics.jsonl").touch()
    else:
        with contextlib.suppress(NotADirectoryError):
            shutil.rmtree(path / missing)
        (path / missing).unlink(missing_ok=True)
    ids = set(Parsed(make_page(read(path), "")).attributes("id"))
    gone = {"config.json": "configuration", "metrics.jsonl": "loss", "samples": "samples", "all but one": "rates"}
    assert "runs" in ids and gone.get(missing) not in ids


def test_damaged_files_are_left_out_and_named(tmp_path):
    path = make_run(tmp_path / "a")
    whole = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text("\0\n[1]\n" + whole + '{"step": 9, "lo')  # the end was cut by a kill
    (path / "config.json").write_text("{")
    (path / "samples" / "step_00000006.png").write_text("no picture")
    (path / "goodput.json").write_text('{"seconds": {"train": 1e999, "down": "long", "save": 3}}')
    (run,) = read(path)
    parsed = Parsed(make_page([run], ""))
    assert len(run.lines) == whole.count("\n") and len(run.notes) == 3
    for note in ("2 of 14 lines are damaged", "config.json is not sound JSON", "step_00000006.png: not an image"):
        assert note in parsed.text
    assert parsed.attributes("data-step") == ["4", "8"]


def test_values_in_a_workdir_cannot_become_part_of_the_page(tmp_path):
    evil = "</script><script>alert(1)</script><b onclick='x'>\"'"
    half = json.loads('"\\ud800"')  # of a character
    path = make_run(tmp_path / "<b>a&amp;\"'")
    lines = [
        {"step": 2, "loss": 1.0, evil: 3.0, "rms/x": 10**400, "grad_norm": float("nan"), "learning_rate": "high"},
        {"step": 3, evil: 4.0, "timing": {f"seconds_{evil}": 5, "restarts": evil, "images_per_second": [1]}},
        {"step": 10**30, "loss": 0.5}, {"step": True}, {"step": -1}, {"step": 5, half: 1.0}, {"step": 4, "timing": 7},
    ]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.json").write_text(json.dumps({"name": evil, evil: {evil: [evil]}, "train": {"num_steps": evil}}))
    (path / "proxy_metrics.json").write_text(json.dumps({evil: 1, "num_samples": 1, "flags": {}}))
    (path / "heartbeat.json").write_text('{"time": "now"}')
    page = make_page(read(path), evil)
    assert page.encode()
    parsed = Parsed(page)
    assert sum(tag == "script" for tag, _ in parsed.elements) == 3 and not parsed.attributes("onclick")
    assert evil in parsed.text and data_of(page)["charts"]


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("absent", "there is no such folder"),
        ("file", "is no folder"),
        ("empty", "holds no run"),
        (".", "give the runs below it, as "),
    ],
)
def test_a_place_without_a_run_is_refused(tmp_path, place, said):
    make_run(tmp_path / "run")
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / place}") + ".*" + said):
        read(tmp_path / "run", tmp_path / place)


def test_the_command(tmp_path):
    first, second, output = make_run(tmp_path / "a"), make_run(tmp_path / "b"), tmp_path / "new" / "report.html"
    out, _ = execute("report", str(first), f"--output={output}", str(second))
    assert f"report of 2 runs written to {output}" in out
    execute("report", str(first), "--nocheck", f"--output={output}")  # replaces it
    assert "not checked" in output.read_text() and "Report of a" in output.read_text()
    for arguments, said in (
        ([], "name the workdirs"),
        ([str(first), f"--output={tmp_path / 'report.pdf'}"], "must end in .html"),
        ([str(first), f"--output={first}"], "must end in .html"),
        ([str(tmp_path), f"--output={output}"], "holds no run"),
        ([str(first), "--outptu=a.html"], "Unknown command line flag"),
    ):
        _, err = execute("report", *arguments, status=2)
        assert said in err and err.count("\n") == 1, err


def test_the_command_needs_no_jax():
    code = (
        "import sys; sys.modules |= dict.fromkeys(['jax', 'flax', 'torch', 'sklearn', 'tensorboardX', 'orbax'])\n"
        "import terdit_jax.report"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_plotting_library_is_as_published():
    """uPlot 1.6.32 of the npm registry."""
    published = {
        "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
        "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
        "uPlot.LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
    }
    assert {name: hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() for name in published} == published


# Presses what there is to press, then tells what is drawn and whether anything is wider than the window.
PROBE = """<script>
const press = element => { element.click(); };
addEventListener("load", () => setTimeout(() => {
  const plots = () => [...document.querySelectorAll(".plot canvas")];
  const inked = () => plots().filter(one => {
    const {width, height} = one;
    return width && one.getContext("2d").getImageData(0, 0, width, height).data.some(value => value);
  }).length;
  const {scrollWidth, clientWidth} = document.documentElement;
  const facts = {width: innerWidth, beyond: scrollWidth - clientWidth, before: inked()};
  document.querySelectorAll("details").forEach(one => { one.open = true; });
  for (const selector of ["[value=time]", "[name=logx]", ".log", ".shown"]) press(document.querySelector(selector));
  const slider = document.getElementById("step");
  slider.value = 0;
  slider.dispatchEvent(new Event("input"));
  facts.grids = [...document.querySelectorAll(".grid img")].filter(one => !one.hidden).map(one => one.dataset.step);
  facts.said = document.querySelector(".slider output").textContent;
  setTimeout(() => {
    facts.after = inked();
    facts.plots = document.querySelectorAll(".plot").length;
    facts.legend = document.querySelectorAll(".u-legend").length;
    parent.postMessage(JSON.stringify(facts), "*");
  }, 2000);
}, 1000));
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="there is no Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_the_page(tmp_path, width):
    """In a frame of this width: a window of its own is at least 500 pixels wide."""
    runs = read(make_run(tmp_path / "a", side=200), make_run(tmp_path / "b", 6, **{"name": "x" * 90}))
    (tmp_path / "page.html").write_text(make_page(runs, "command " * 20).replace("</body>", PROBE + "</body>"))
    (tmp_path / "frame.html").write_text(
        f'<body style="margin:0"><iframe src="page.html" style="border:0;width:{width}px;height:900px"></iframe>'
        "<pre id=facts></pre><script>onmessage = event => { facts.textContent = event.data; };</script></body>"
    )
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
        "--virtual-time-budget=10000", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,900",
        (tmp_path / "frame.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    facts = json.loads(re.search("<pre id=.facts.>(.*?)</pre>", done.stdout)[1])
    assert facts["width"] == width and facts["beyond"] == 0
    assert facts["grids"] == ["4", "4"] and facts["said"] == "step 4"
    assert 10 <= facts["before"] <= facts["after"] == facts["plots"] == facts["legend"], facts
