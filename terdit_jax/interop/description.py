"""The description of a deployed model: architecture, which weights, of which run, and how its images are drawn.

Every file that we write carries one, as JSON; `known` works it out for checkpoints published without one, `shapes`
compares it with the tensors beside it.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, TypeVar

from terdit_jax.config import FIELDS, RunConfig
from terdit_jax.config_sections import DiffusionConfig, ModelConfig, SampleConfig
from terdit_jax.diffusion.objective import make_objective
from terdit_jax.errors import UserError
from terdit_jax.labels import can_be_kept
from terdit_jax.model.config import DiTConfig
from terdit_jax.untrusted import is_number, reading, short

_MAX_EXACT = 1 << 53  # integers up to here are floats without rounding
MAX_SIZE = 1 << 20  # no field comes near it; beyond it arithmetic on shapes would be an attack
_MAX_TOKENS = 1 << 16  # images of 4096 px; as many positions are tabulated

_Section = TypeVar("_Section", ModelConfig, DiffusionConfig, SampleConfig)


@dataclasses.dataclass(frozen=True)
class Description:
    """A description of a model in a file. Attributes:

    name: of the configuration.
    model: the architecture; how it is computed is the reader's choice.
    ema: averaged weights, or those of the last step.
    step: optimizer steps trained, if known.
    codec: what made the latents, "none" where the model draws pixels.
    latent_scale: what training multiplied latents by.
    sample: the run's settings for drawing.
    provenance: where it comes from, in words.
    diffusion: what it learned to predict; files from before there was a choice say nothing, which means DDPM.
    class_names: in the order of the labels; empty if they are not known, as of older files, and then not written.
    """

    name: str
    model: DiTConfig
    ema: bool
    step: int | None
    codec: str
    latent_scale: float
    sample: SampleConfig
    provenance: Mapping[str, str]
    diffusion: DiffusionConfig = DiffusionConfig()
    class_names: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        model = {field.name: getattr(self.model, field.name) for field in dataclasses.fields(ModelConfig)}
        unsaid = {field.name: field.default for field in dataclasses.fields(ModelConfig) if field.metadata["omitted"]}
        model = {name: value for name, value in sorted(model.items()) if (name, value) not in unsaid.items()}
        sections = {name: dict(sorted(vars(fields[name]).items())) for name in ("sample", "diffusion")}
        if names := fields.pop("class_names"):
            fields["class_names"] = list(names)
        return fields | {"model": model, **sections, "provenance": dict(self.provenance)}

    @classmethod
    def from_dict(cls, fields: object, source: str) -> "Description":
        """Reads untrusted JSON; `source` names it in errors.

        Raises:
          UserError: a field that is missing, unknown, of the wrong type, or that makes no model.
        """
        expected = {
            "name": str, "model": dict, "ema": bool, "step": int | None, "codec": str, "latent_scale": float | int,
            "sample": dict, "provenance": dict, "diffusion": dict, "class_names": list,
        }  # fmt: skip
        if isinstance(fields, dict):
            fields = {"diffusion": {}, "class_names": []} | fields
        if not isinstance(fields, dict) or fields.keys() != expected.keys():
            raise UserError(f"{source}: its description must have exactly the fields {', '.join(expected)}")
        for name, kind in expected.items():
            same_kind = isinstance(fields[name], kind) and (kind is bool or not isinstance(fields[name], bool))
            if not same_kind or _is_long(fields[name]):
                raise UserError(f"{source}: description.{name}={short(fields[name])} is of the wrong type or too long")
        if not is_number(fields["latent_scale"], 1e-6, 1e6):
            raise UserError(f"{source}: description.latent_scale={short(fields['latent_scale'])} must be positive")
        if not 0 <= (fields["step"] or 0) < _MAX_EXACT:
            raise UserError(f"{source}: description.step={short(fields['step'])} must not be negative")
        if not all(isinstance(value, str) for value in fields["provenance"].values()):
            raise UserError(f"{source}: description.provenance must hold text only")
        described = _parse(ModelConfig, fields["model"], f"{source}: description.model", complete=True)
        sample = _parse(SampleConfig, fields["sample"], f"{source}: description.sample", complete=False)
        diffusion = _parse(DiffusionConfig, fields["diffusion"], f"{source}: description.diffusion", complete=False)
        for name, value in vars(diffusion).items():
            FIELDS[f"diffusion.{name}"].check(value, f"{source}: description.diffusion.{name}")
        try:
            model = architecture(described)
            make_objective(diffusion, described.learn_sigma)
        except UserError as error:
            raise UserError(f"{source}: its description makes no model: {str(error)[:200]}") from error
        if model.num_tokens > _MAX_TOKENS:
            raise UserError(f"{source}: description.model.input_size={model.input_size} is too large")
        names = tuple(fields["class_names"])
        if names and not (len(names) == model.num_classes and can_be_kept(names)):
            raise UserError(
                f"{source}: its description does not name {model.num_classes} classes, or at too great length"
            )
        return cls(**fields | {"model": model, "sample": sample, "diffusion": diffusion, "class_names": names})


def architecture(model: ModelConfig) -> DiTConfig:
    """The model with `compute` at its defaults, so that equal models compare equal."""
    return DiTConfig.from_config(RunConfig(model=model))


def describe_run(run: Mapping[str, Any], ema: bool, source: str) -> Description:
    """Describes a run by the JSON in its checkpoint (`terdit_jax.training.resume.describe_run`), which may be forged.

    Raises:
      UserError: as `Description.from_dict`.
    """
    with reading(f"{source}: its newest checkpoint does not describe a run"):
        config = run["config"]
        fingerprint, seed = run["data_fingerprint"], run["seed"]
        if type(seed) is not int or not isinstance(fingerprint, str) or _is_long(fingerprint):
            raise ValueError(f"its data fingerprint is {short(fingerprint)}, its seed {short(seed)}")
        teacher = {"teacher": run["teacher"]} if "teacher" in run else {}
        if any(not isinstance(weights, str) or _is_long(weights) for weights in teacher.values()):
            raise ValueError(f"its teacher's fingerprint is {short(teacher['teacher'])}")
        fields = {
            "name": config["name"],
            "model": {**vars(ModelConfig()), **config["model"]},
            "ema": ema,
            "step": run["step"],
            "codec": run["codec"],
            "latent_scale": run["latent_scale"],
            "sample": {**vars(SampleConfig()), **config["sample"]},
            "provenance": {"data_fingerprint": fingerprint, "seed": str(seed)} | teacher,
            "diffusion": config.get("diffusion", {}),
            "class_names": run.get("class_names", []),
        }
    return Description.from_dict(fields, source)


def _parse(kind: type[_Section], fields: Mapping[str, Any], source: str, *, complete: bool) -> _Section:
    """The section of a configuration that untrusted fields describe."""
    known = vars(kind())
    if unknown := sorted(map(str, fields.keys() - known.keys())):
        raise UserError(f"{source} has the unknown field {short(unknown[0])}: a newer version may be needed")
    added = {field.name for field in dataclasses.fields(kind) if field.metadata["added"]}
    if complete and (missing := sorted(known.keys() - fields.keys() - added)):
        raise UserError(f"{source} lacks {missing[0]}")
    values = {}
    for name, value in fields.items():
        as_float = type(value) is int and type(known[name]) is float and abs(value) < _MAX_EXACT
        same_kind = type(value) is type(known[name]) or as_float
        if not same_kind or _is_long(value) or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"{source}.{name}={short(value)} is of the wrong type or too long")
        if type(value) is int and abs(value) >= MAX_SIZE:
            raise UserError(f"{source}.{name}={short(value)} is too large")
        values[name] = type(known[name])(value)
    return kind(**values)


def _is_long(value: object) -> bool:
    """Whether a text is more than a line of a message."""
    return isinstance(value, str) and (len(value) > 200 or not value.isprintable())
