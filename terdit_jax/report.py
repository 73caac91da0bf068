"""Shows runs on one HTML page: curves, sample grids, scores, checkpoints and configurations side by side.

python -m terdit_jax.report runs/digits --output=report.html
python -m terdit_jax.report runs/* --output=all.html

The page opens from disk, without a network. docs/training.md says what is on it.
"""

from absl import flags

from terdit_jax.errors import parse_flags
from terdit_jax.paths import define_path

_OUTPUT = define_path("output", "report.html", "HTML file to write, replaced if there; local or gs://.")
_CHECK = flags.DEFINE_bool("check", True, "Compare checkpoints with their SHA-256, which reads every file of them.")

parse_flags(__name__, arguments=True)  # answers --help and wrong flags before the imports below

from collections.abc import Sequence
import shlex

from terdit_jax.errors import UserError, printable, run_command
from terdit_jax.files import check_output, refusing, write_text
from terdit_jax.page.html import make_page
from terdit_jax.page.workdir import read_runs


def main(argv: Sequence[str]) -> None:
    """Runs the command; `argv` has the workdirs of the runs after the command's own name."""
    output, places = _OUTPUT.value or "", argv[1:]
    if not places:
        raise UserError("name the workdirs of one or more runs, e.g. runs/digits --output=report.html")
    if not output.endswith(".html"):
        raise UserError(f"--output={output}: must end in .html")
    check_output(output, replace=True)
    runs = read_runs(places, check=_CHECK.value, say=print)
    command = shlex.join(["python", "-m", "terdit_jax.report", *places, f"--output={output}"])
    page = make_page(runs, command)
    for run in runs:
        for note in run.notes:
            print(printable(f"{run.name}: {note}"))
    with refusing(output):
        write_text(output, page)
    size = len(page.encode()) / 1e6
    print(f"report of {len(runs)} run{'s' * (len(runs) > 1)} written to {output} ({size:.1f} MB)")


if __name__ == "__main__":
    run_command(main)
