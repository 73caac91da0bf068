"""The description of a deployed model: architecture, which weights, of which run, and how its images are drawn.

Every file that we write carries one, as JSON; for checkpoints published without one it is worked out from their
`model_args` and the shapes of their tensors.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, TypeVar

import numpy as np

from terdit_jax.config import FIELDS, RunConfig
from terdit_jax.config_sections import DiffusionConfig, ModelConfig, SampleConfig
from terdit_jax.diffusion.objective import make_objective
from terdit_jax.errors import UserError
from terdit_jax.interop.published import POSITIONS, Layout
from terdit_jax.model.config import DiTConfig
from terdit_jax.untrusted import is_count, is_number, reading, short

SD_LATENT_SCALE = 0.18215  # of the Stable Diffusion autoencoder
SD_DOWNSAMPLING = 8
# The shapes that the public sampler can build: name -> (hidden_size, depth); each has 32 heads and patches of 2.
PUBLISHED_SHAPES = {
    "DiT_Llama_600M_patch2": (1536, 16),
    "DiT_Llama_3B_patch2": (3072, 32),
    "DiT_Llama_7B_patch2": (4096, 32),
}
PUBLISHED_HEADS = 32
VAES = ("ema", "mse")
_MAX_EXACT = 1 << 53  # integers up to here are floats without rounding
_MAX_SIZE = 1 << 20  # no field comes near it; beyond it arithmetic on shapes would be an attack
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
    diffusion: what it learned to predict; files from before there was a choice say nothing, and are DDPM's.
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

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        names = sorted(field.name for field in dataclasses.fields(ModelConfig))
        model = {name: getattr(self.model, name) for name in names}
        sections = {name: dict(sorted(vars(fields[name]).items())) for name in ("sample", "diffusion")}
        return fields | {"model": model, **sections, "provenance": dict(self.provenance)}

    @classmethod
    def from_dict(cls, fields: object, source: str) -> "Description":
        """Reads untrusted JSON; `source` names it in errors.

        Raises:
          UserError: a field that is missing, unknown, of the wrong type, or that makes no model.
        """
        expected = {
            "name": str, "model": dict, "ema": bool, "step": int | None, "codec": str, "latent_scale": float | int,
            "sample": dict, "provenance": dict, "diffusion": dict,
        }  # fmt: skip
        if isinstance(fields, dict):
            fields = {"diffusion": {}} | fields
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
            make_objective(diffusion)
        except UserError as error:
            raise UserError(f"{source}: its description makes no model: {str(error)[:200]}") from error
        if model.num_tokens > _MAX_TOKENS:
            raise UserError(f"{source}: description.model.input_size={model.input_size} is too large")
        return cls(**fields | {"model": model, "sample": sample, "diffusion": diffusion})


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
        fields = {
            "name": config["name"],
            "model": {**vars(ModelConfig()), **config["model"]},
            "ema": ema,
            "step": run["step"],
            "codec": run["codec"],
            "latent_scale": run["latent_scale"],
            "sample": {**vars(SampleConfig()), **config["sample"]},
            "provenance": {"data_fingerprint": fingerprint, "seed": str(seed)},
            "diffusion": config.get("diffusion", {}),
        }
    return Description.from_dict(fields, source)


def describe_published(layout: Layout, model_args: Mapping[str, Any], ema: bool, source: str) -> Description:
    """Describes a published checkpoint: what shapes do not tell comes from `model_args`, or is as published.

    Args:
      layout: of the state dict.
      model_args: attributes of the Namespace beside it; those looked at are model, image_size and vae.
      ema: as its file name says.
      source: names it in errors.

    Raises:
      UserError: tensors of no TerDiT or Large-DiT, or a shape that was never published.
    """
    facts = _facts(layout, source)
    shape = facts["hidden_size"], facts["depth"]
    names = [name for name, known in PUBLISHED_SHAPES.items() if known == shape]
    if not names:
        raise UserError(
            f"{source}: width {shape[0]} with {shape[1]} layers is none of the published models, and the file says "
            "nothing of the number of heads: give an export of terdit_jax, which does"
        )
    image_size, vae = model_args.get("image_size", 256), model_args.get("vae", "ema")
    if not is_count(image_size, 1, _MAX_SIZE - 1) or vae not in VAES:
        raise UserError(f"{source}: model_args has image_size={short(image_size)}, vae={short(vae)}")
    told = ("ternary", "hidden_size", "depth", "num_classes", "qk_norm", "adaln_rms_norm")
    model = ModelConfig(
        **{name: facts[name] for name in told},
        input_size=image_size // SD_DOWNSAMPLING,
        num_heads=PUBLISHED_HEADS,
        num_kv_heads=facts["kv_width"] * PUBLISHED_HEADS // facts["hidden_size"],
    )
    return Description(
        name=names[0],
        model=architecture(model),
        ema=ema,
        step=None,
        codec=f"sd-vae-ft-{vae}",
        latent_scale=SD_LATENT_SCALE,
        sample=SampleConfig(),
        provenance={"source": "a checkpoint in the published layout"},
    )


def public_model_args(description: Description) -> tuple[dict[str, Any], bool]:
    """The attributes of `model_args.pth` that the public sampler reads, and whether it can build this model."""
    model, codec = description.model, description.codec
    shape = model.hidden_size, model.depth
    names = [name for name, known in PUBLISHED_SHAPES.items() if known == shape]
    latents = codec.startswith("sd-vae-ft-")
    as_published = (
        bool(names)
        and description.diffusion.objective == "ddpm"
        and (model.num_heads, model.num_kv_heads) == (PUBLISHED_HEADS, PUBLISHED_HEADS)
        and (model.patch_size, model.in_channels, model.ffn_multiple_of) == (2, 4, 256)
        and model.positions == "rope_1d"
        and model.adaln_rms_norm
        and model.num_classes == 1000  # its null label is written out as 1000
    )
    arguments = {
        "model": names[0] if names else description.name,
        "image_size": model.input_size * (SD_DOWNSAMPLING if latents or model.in_channels == 4 else 1),
        "num_classes": model.num_classes,
        "qk_norm": model.qk_norm,
        "vae": codec.removeprefix("sd-vae-ft-") if latents else "ema",
    }
    return arguments, as_published


def check_architecture(model: DiTConfig, layout: Layout, source: str) -> None:
    """Compares a described model with the shapes of the tensors, before anything is sized by the description.

    Raises:
      UserError: naming the first field that does not fit.
    """
    facts = _facts(layout, source)
    if not model.ternary:
        facts["adaln_rms_norm"] = model.adaln_rms_norm  # a full-precision model has none, whatever the field says
    for name, value in facts.items():
        described = model.patch_size**2 * model.in_channels if name == "patch_width" else getattr(model, name)
        if described != value:
            raise UserError(f"{source}: describes a model with {name}={described}, its tensors have {value}")


def _facts(layout: Layout, source: str) -> dict[str, Any]:
    """Fields of the architecture that names and shapes alone tell."""
    if POSITIONS in layout:
        return _dit_facts(layout, source)
    try:
        hidden_size, patch_width = layout["x_embedder.weight"][1]
        block = "layers.0."
        return {
            "family": "large_dit",
            "hidden_size": hidden_size,
            "patch_width": patch_width,
            "depth": sum(name.startswith("layers.") and name.endswith(".ffn_norm.weight") for name in layout),
            "num_classes": layout["y_embedder.embedding_table.weight"][1][0] - 1,
            "kv_width": _rows(layout[f"{block}attention.wk.weight"]),
            "mlp_width": _rows(layout[f"{block}feed_forward.w1.weight"]),
            "ternary": f"{block}attention.wq.alphas" in layout,
            "qk_norm": f"{block}attention.q_norm.weight" in layout,
            "adaln_rms_norm": f"{block}adaLN_modulation.2.weight" in layout,
        }
    except (KeyError, ValueError, IndexError) as error:
        missing = f"tensor {error.args[0]!r}" if isinstance(error, KeyError) else "matrices where they belong"
        raise UserError(f"{source}: not a TerDiT or Large-DiT checkpoint, it lacks {missing}") from error


def _dit_facts(layout: Layout, source: str) -> dict[str, Any]:
    try:
        hidden_size, channels, patch_size, _ = layout["x_embedder.proj.weight"][1]
        tokens = layout[POSITIONS][1][1]
        return {
            "family": "dit",
            "hidden_size": hidden_size,
            "in_channels": channels,
            "patch_size": patch_size,
            "input_size": math.isqrt(tokens) * patch_size,
            "learn_sigma": layout["final_layer.linear.weight"][1][0] == 2 * patch_size**2 * channels,
            "depth": sum(name.startswith("blocks.") and name.endswith(".mlp.fc1.weight") for name in layout),
            "num_classes": layout["y_embedder.embedding_table.weight"][1][0] - 1,
            "ternary": "blocks.0.attn.qkv.alphas" in layout,
            "adaln_rms_norm": "blocks.0.adaLN_modulation.2.weight" in layout,
        }
    except (KeyError, ValueError, IndexError) as error:
        missing = f"tensor {error.args[0]!r}" if isinstance(error, KeyError) else "matrices where they belong"
        raise UserError(f"{source}: not a checkpoint of DiT or SiT, it lacks {missing}") from error


def _rows(tensor: tuple[np.dtype, tuple[int, ...]]) -> int:
    dtype, shape = tensor
    return shape[0] * (4 if dtype == np.uint8 else 1)


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
        if type(value) is int and abs(value) >= _MAX_SIZE:
            raise UserError(f"{source}.{name}={short(value)} is too large")
        values[name] = type(known[name])(value)
    return kind(**values)


def _is_long(value: object) -> bool:
    """Whether a text is more than a line of a message."""
    return isinstance(value, str) and (len(value) > 200 or not value.isprintable())
