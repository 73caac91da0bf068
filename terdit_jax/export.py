"""Writes a model to deploy, or to exchange with PyTorch.

python -m terdit_jax.export --workdir=runs/digits --format=packed --output=digits.safetensors
python -m terdit_jax.export --model=checkpoints/3B_1180000 --format=packed --output=terdit_4b.safetensors
python -m terdit_jax.export --model=digits.safetensors --report
python -m terdit_jax.export --workdir=runs/digits --format=hub --output=digits_hub --push_to=organisation/digits
"""

from absl import flags

from terdit_jax.choices import FORMATS
from terdit_jax.errors import parse_flags
from terdit_jax.options import define_num_heads, define_objective
from terdit_jax.paths import define_path

_WORKDIR = define_path("workdir", None, "A training run.")
_MODEL = define_path(
    "model", None, "In its place: an artifact, a published checkpoint, safetensors, a name on the Hub."
)
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint of a run; the newest sound one if left out.", 0)
_EMA = flags.DEFINE_bool("ema", True, "The averaged weights; --noema for those of the last step.")
_NUM_HEADS = define_num_heads()
_OBJECTIVE = define_objective()
_FORMAT = flags.DEFINE_enum("format", "packed", FORMATS, "packed: the artifact of docs/format.md; torch, hub: folders.")
_MASTERS = flags.DEFINE_bool("masters", False, "float32 master weights instead of ternary ones (torch, safetensors).")
_COMPRESS = flags.DEFINE_bool("compress", False, "Deflate the 2-bit planes (packed).")
_PUSH_TO = flags.DEFINE_string("push_to", None, "Upload the folder to this ORGANISATION/NAME of Hugging Face (hub).")
_SCORES = define_path("scores", None, "JSON that terdit_jax.evaluate wrote, for the model card (hub).")
_LICENSE = flags.DEFINE_string("license", None, "Of the weights, such as apache-2.0, for the model card (hub).")
_OUTPUT = define_path("output", None, "What to write; must not exist.")
_REPORT = flags.DEFINE_bool("report", False, "Print how large the model is, part by part, and write nothing.")

parse_flags(__name__)  # answers --help and wrong flags before the imports below, which take seconds

from collections.abc import Mapping, Sequence
import contextlib
import ctypes
import dataclasses
import sys
from typing import Any

from etils import epath
import jax

from terdit_jax.errors import UserError, run_command
from terdit_jax.files import check_output
from terdit_jax.interop.exports import check_options, export
from terdit_jax.interop.hub import check_push, push
from terdit_jax.interop.model_card import CardFacts, read_scores
from terdit_jax.interop.report import size_report
from terdit_jax.interop.weights import Weights, open_weights
from terdit_jax.labels import can_be_kept
from terdit_jax.options import refuse_unused
from terdit_jax.paths import local_path

_M_MMAP_THRESHOLD = -3  # malloc.h


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    if bool(_WORKDIR.value) == bool(_MODEL.value):
        raise UserError("give either --workdir (a run) or --model (an artifact or a published checkpoint)")
    output = _OUTPUT.value
    if not output and not _REPORT.value:
        raise UserError("--output is missing: name what to write, e.g. --output=model.safetensors")
    if output and _REPORT.value:
        raise UserError("--report writes nothing: leave out --output")
    if not output:
        refuse_unused((_FORMAT, _MASTERS, _COMPRESS, _PUSH_TO, _SCORES, _LICENSE), "with --report")
    else:
        check_output(output)
        if _FORMAT.value != "hub":
            refuse_unused((_PUSH_TO, _SCORES, _LICENSE), "without --format=hub")
        check_options(_FORMAT.value, masters=_MASTERS.value, compress=_COMPRESS.value)
    if _PUSH_TO.value is not None:
        check_push(_PUSH_TO.value)
        local_path(output, "--output")
    facts = CardFacts(
        name=_PUSH_TO.value or epath.Path(output or "").name,
        licence=_LICENSE.value,
        scores=read_scores(_SCORES.value) if _SCORES.value else None,
    )
    if _WORKDIR.value and not (epath.Path(_WORKDIR.value) / "checkpoints").is_dir():
        raise UserError(f"--workdir={_WORKDIR.value} holds no run: give the --workdir of a training run that has saved")
    jax.config.update("jax_platforms", "cpu")  # conversion is host work, also where there are accelerators
    _return_freed_memory()
    source = _WORKDIR.value or _MODEL.value
    weights = open_weights(
        source,
        ema=_EMA.value,
        step=_STEP.value,
        masters=_MASTERS.value,
        num_heads=_NUM_HEADS.value,
        objective=_OBJECTIVE.value,
    )
    if not output:
        print(size_report(weights.model, file.stat().length if (file := epath.Path(source)).is_file() else None))
        return
    if weights.run is not None and not weights.description.class_names:
        weights = _with_class_names(weights, weights.run)
    masters, compress = _MASTERS.value, _COMPRESS.value
    for remark in export(weights, output, _FORMAT.value, masters=masters, compress=compress, facts=facts):
        print(remark)
    print(_say_what(weights, epath.Path(output)), flush=True)
    if _PUSH_TO.value:
        print(f"pushed to {push(output, _PUSH_TO.value)}")


def _with_class_names(weights: Weights, run: Mapping[str, Any]) -> Weights:
    """A run's weights with the names of its data set's classes, if that is where it was: checkpoints from before they
    held them have none."""
    from terdit_jax.data.schema import read_metadata  # here, for both import TFDS
    from terdit_jax.training.resume import data_dir

    with contextlib.suppress(UserError):
        metadata = read_metadata(data_dir(run, weights.source))
        if metadata.fingerprint == run["data_fingerprint"] and can_be_kept(metadata.class_names):
            description = dataclasses.replace(weights.description, class_names=metadata.class_names)
            return dataclasses.replace(weights, description=description)
    return weights


def _return_freed_memory() -> None:
    """Has glibc give every large block back at once: it would keep those up to 32 MB, a layer each, for later."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _say_what(weights: Weights, output: epath.Path) -> str:
    description = weights.description
    files = [output] if output.is_file() else sorted(output.iterdir())
    size = sum(file.stat().length for file in files)
    step = "" if description.step is None else f", step {description.step:,}"
    which = "averaged" if description.ema else "raw"
    return f"{description.name}{step}, {which} weights: {size / 1e6:,.1f} MB in {output}"


if __name__ == "__main__":
    run_command(main)
