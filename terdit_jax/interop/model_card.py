"""The model card of a folder for the Hugging Face Hub: what the weights' description, their run and given scores say.

Nothing else is said: what is not known is named as such. Format: https://huggingface.co/docs/hub/model-cards.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import json
import os
from pathlib import PurePath
import re
from typing import Any

from terdit_jax.config import FIELDS, PATHS
from terdit_jax.config_rules import flatten, shown
from terdit_jax.errors import UserError, printable
from terdit_jax.interop.report import size_report
from terdit_jax.interop.weights import Weights
from terdit_jax.untrusted import is_number, parse_json, reading, short

_MAX_SCORES_BYTES = 1 << 20
_NAMES_SHOWN = 10  # of classes
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{1,40}")  # as the Hub writes them: apache-2.0, cc-by-nc-4.0, other
_RECIPE = ("optimizer.", "train.", "diffusion.", "compute.dtype", "compute.grad", "compute.matmul", "data.horizontal")
_TERDIT, _DIT, _SIT = (
    f"[{name}](https://arxiv.org/abs/{number})"
    for name, number in (("TerDiT", "2405.14854"), ("DiT", "2212.09748"), ("SiT", "2401.08740"))
)
_USE = """\
In PyTorch with diffusers, which runs `terdit.py` of this repository:

```python
from diffusers import AutoModel{and_vae}

model = AutoModel.from_pretrained({name}, trust_remote_code=True){torch_vae}
images = model.draw([0, 1]{vae}{method})  # (2, H, W, C) uint8, of classes 0 and 1
```

In JAX with terdit_jax:

```python
import terdit_jax{and_load}

model = terdit_jax.load_model({name})
images = model.draw([0, 1]{jax_vae})  # (2, H, W, C) float32, about -1 to 1
```"""
_STABILITY = ("sd-vae-ft-ema", "sd-vae-ft-mse")
_TORCH_METHODS = {"ddpm": ("ddpm", "ddim"), "flow": ("sde", "euler", "heun")}  # of `pytorch.sample`
_IN_PLACE = {"ddpm": ', method="ddim", num_steps=50', "flow": ', method="heun", num_steps=25'}  # of a solver


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """Facts on a card that the weights do not hold. Attributes:

    name: of the repository, or of the folder.
    licence: of the weights, as the Hub writes it; None if unknown.
    scores: what `terdit_jax.evaluate` wrote, or another flat JSON of numbers; None if there are none.
    """

    name: str
    licence: str | None = None
    scores: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.licence is not None and not _LICENCE.fullmatch(self.licence):
            raise UserError(f"--license={self.licence}: give one as the Hub writes it, such as apache-2.0 or other")


def read_scores(path: str | os.PathLike) -> dict[str, Any]:
    """The scores in a JSON file. Raises UserError for a file that cannot be read or holds no number."""
    with reading(f"--scores={os.fspath(path)}: cannot be read"), open(path, "rb") as file:
        content = file.read(_MAX_SCORES_BYTES + 1)
    if len(content) > _MAX_SCORES_BYTES:
        raise UserError(f"--scores={os.fspath(path)}: is too long for scores")
    scores = parse_json(content, f"--scores={os.fspath(path)}", dict)
    if not _numbers(scores):
        raise UserError(f"--scores={os.fspath(path)}: holds no numbers: give what terdit_jax.evaluate wrote")
    return scores


def make_card(weights: Weights, facts: CardFacts, file_bytes: int) -> str:
    """The card, as Markdown after the front matter that the Hub reads.

    Args:
      weights: of the model, of which nothing is read but the description and the run.
      facts: what else is known.
      file_bytes: of the file of weights.

    Raises:
      UserError: a run whose JSON describes none.
    """
    sections = {
        "Use": _use(weights, facts),
        "Model": _table(_model(weights)),
        "Data": _table(_data(weights)),
        "Recipe": _recipe(weights),
        "Scores": _scores(facts.scores),
        "Size": f"```text\n{size_report(weights.model, file_bytes)}\n```",
        "Licence": _licence(facts.licence),
    }
    title = f"{_front(weights, facts.licence)}\n# {_plain(weights.description.name) or 'A model'}\n"
    return "\n".join([title, *(f"## {heading}\n\n{text}\n" for heading, text in sections.items())])


def _kind(weights: Weights) -> str:
    model = weights.model
    if model.family == "large_dit":
        return "TerDiT" if model.ternary else "Large-DiT"
    kind = "SiT" if weights.description.diffusion.objective == "flow" else "DiT"
    return f"ternary {kind}" if model.ternary else kind


def _front(weights: Weights, licence: str | None) -> str:
    tags = ["diffusion", "class-conditional", "diffusers", "jax", "pytorch", *["ternary"] * weights.model.ternary]
    lines = [f"license: {licence}"] if licence else []
    lines += ["library_name: terdit_jax", "pipeline_tag: unconditional-image-generation", "tags:"]
    return "\n".join(["---", *lines, *(f"- {tag}" for tag in tags), "---", ""])


def _use(weights: Weights, facts: CardFacts) -> str:
    description = weights.description
    objective = description.diffusion.objective
    method = "" if description.sample.method in _TORCH_METHODS[objective] else _IN_PLACE[objective]
    words = dict.fromkeys(("and_vae", "and_load", "torch_vae", "vae", "jax_vae"), "")
    if description.codec != "none" or weights.model.in_channels not in (1, 3):
        codec = _plain(description.codec)
        vae = f"stabilityai/{codec}" if codec in _STABILITY else f"FOLDER_OF_THE_AUTOENCODER_{codec}"
        words = {
            "and_vae": ", AutoencoderKL",
            "and_load": "\nfrom terdit_jax.interop.vae_weights import load_vae",
            "torch_vae": f'\nvae = AutoencoderKL.from_pretrained("{vae}")',
            "vae": ", vae=vae",
            "jax_vae": f', vae=load_vae("{vae}")',
        }
    return _USE.format(name=json.dumps(facts.name), method=method, **words)


def _model(weights: Weights) -> Iterator[tuple[str, str]]:
    model, description, sample = weights.model, weights.description, weights.description.sample
    flow = description.diffusion.objective == "flow"
    yield "Kind", f"{_kind(weights)}, class-conditional diffusion transformer"
    yield "Parameters", f"{model.num_params:,}"
    yield "Layers, width, heads", f"{model.depth}, {model.hidden_size}, {model.num_heads}"
    yield "Input", f"{model.input_size} x {model.input_size} x {model.in_channels}, patches of {model.patch_size}"
    names = description.class_names
    named = [_code(", ".join(names[:_NAMES_SHOWN])), "..." * (len(names) > _NAMES_SHOWN)] if names else []
    yield "Classes", " ".join([f"{model.num_classes:,}", *named]).strip()
    yield "Predicts", "the velocity of a flow" if flow else "the noise (DDPM)"
    yield "Weights", "averaged (EMA)" if description.ema else "of the last step"
    yield "Drawn by", f"{sample.method}, {sample.num_steps} steps, guidance {sample.cfg_scale:g}, or as asked for"
    yield "Papers", ", ".join([_TERDIT] * model.ternary + [_DIT] + [_SIT] * flow)


def _data(weights: Weights) -> Iterator[tuple[str, str]]:
    description = weights.description
    yield "Data set", _code(_run_field(weights, "data.dir")) or "not recorded in the weights"
    if _run_field(weights, "data.synthetic") == "True":
        yield "Synthetic", "yes: random numbers in place of images"
    if fingerprint := description.provenance.get("data_fingerprint"):
        yield "Fingerprint", _code(fingerprint)
    yield "Encoded by", "nothing, pixels" if description.codec == "none" else _code(description.codec)
    yield "Multiplied by", f"{description.latent_scale:g}"


def _recipe(weights: Weights) -> str:
    description = weights.description
    rows = [("Steps", "not recorded" if description.step is None else f"{description.step:,}")]
    batch = _run_field(weights, "train.batch_size")
    if batch and description.step is not None:
        rows.append(("Images seen", f"{int(batch) * description.step:,}, {int(batch):,} a step"))
    for field, label in (("train.init_from", "Started from"), ("train.teacher", "Taught by")):
        if value := _run_field(weights, field):
            rows.append((label, _code(value)))
    rows += [(_plain(key), _code(value)) for key, value in description.provenance.items() if key != "data_fingerprint"]
    if weights.run is None:
        return f"{_table(rows)}\n\nThese weights come from a file that records no more of the training."
    names = [name for name in FIELDS if name.startswith(_RECIPE) and name not in PATHS]
    fields = "\n".join(f"{name}={_run_field(weights, name)}" for name in names)
    return f"{_table(rows)}\n\n<details><summary>All settings</summary>\n\n```text\n{fields}\n```\n\n</details>"


def _scores(scores: Mapping[str, Any] | None) -> str:
    if scores is None:
        return "None were given."
    rows = [
        (_code(name), f"{value:,}" if isinstance(value, int) else f"{value:.4f}") for name, value in _numbers(scores)
    ]
    flags = scores.get("flags")
    asked = {name: value for name, value in flags.items() if value is not None} if isinstance(flags, dict) else {}
    how = ", ".join(f"{name}={value if is_number(value, -1e9, 1e9) else _base(value)}" for name, value in asked.items())
    return _table(rows) + (f"\n\nMeasured with {_code(how)}." if how else "")


def _licence(licence: str | None) -> str:
    code = "`terdit.py` is part of terdit_jax, Apache 2.0."
    return f"The weights: {licence}. {code}" if licence else f"None was given for the weights. {code}"


def _numbers(scores: Mapping[str, Any]) -> list[tuple[str, int | float]]:
    return [(name, value) for name, value in scores.items() if is_number(value, -1e12, 1e12) and name != "seconds"]


def _run_field(weights: Weights, name: str) -> str:
    """A field of the run's configuration as text, of a path its last part alone; "" where it is not known."""
    if weights.run is None:
        return ""
    with reading(f"{weights.source}: its checkpoint does not describe a run"):
        value = dict(flatten(weights.run["config"])).get(name, FIELDS[name].default)
        FIELDS[name].check_type(value, f"{weights.source}: its checkpoint's config.{name}")
    return _base(value) if name in PATHS else shown(value)


def _base(value: object) -> str:
    """The last part of a path: where it lay is nobody's business."""
    return PurePath(value).name if isinstance(value, str) else short(value)


def _table(rows: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)])


def _code(text: str) -> str:
    """Text of others as Markdown shows it, in a table too."""
    return f"`{printable(text[:300]).replace('`', chr(39)).replace('|', '/')}`" if text else ""


def _plain(text: str) -> str:
    return re.sub(r"[^\w .,+/()-]", "", text)[:100].strip()
