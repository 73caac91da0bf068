"""Checkpoints of TerDiT, Large-DiT, DiT and SiT as published: which shapes there are, and what describes a file.

Such a file has no description. `shapes` reads what its tensors tell; the rest follows from the tables here, from its
name, from `model_args.pth` beside it, or is asked of the caller.
"""

from collections.abc import Mapping
import dataclasses
from pathlib import Path
import re
from typing import Any

from terdit_jax.config import FIELDS
from terdit_jax.config_sections import DiffusionConfig, ModelConfig, SampleConfig
from terdit_jax.errors import UserError, printable
from terdit_jax.interop.description import MAX_SIZE, Description, architecture
from terdit_jax.interop.published import Layout
from terdit_jax.interop.shapes import read_facts
from terdit_jax.untrusted import is_count, short

SD_LATENT_SCALE = 0.18215  # of the Stable Diffusion autoencoder
SD_DOWNSAMPLING = 8
VAES = ("ema", "mse")
# The shapes that TerDiT's sampler can build: name -> (hidden_size, depth); each has 32 heads and patches of 2.
PUBLISHED_SHAPES = {
    "DiT_Llama_600M_patch2": (1536, 16),
    "DiT_Llama_3B_patch2": (3072, 32),
    "DiT_Llama_7B_patch2": (4096, 32),
}
PUBLISHED_HEADS = 32
DIT_SIZES = {"S": (384, 12), "B": (768, 12), "L": (1024, 24), "XL": (1152, 28)}  # DiT's and SiT's, as above
DIT_HEADS = {"S": 6, "B": 12, "L": 16, "XL": 16}
DIT_PATCHES = (2, 4, 8)
_PROJECTS = {"ddpm": "DiT", "flow": "SiT"}  # objective -> whose checkpoints have it
_DIT_NAME = re.compile(r"(DiT|SiT)-(S|B|L|XL)-[248](?!\d)")  # how their file names begin
_PROVENANCE = {"source": "a checkpoint in the published layout"}


@dataclasses.dataclass(frozen=True)
class Told:
    """Facts of a checkpoint that the caller gives because the file may lack them; None: not given. Attributes:

    num_heads: of attention.
    objective: "ddpm" or "flow".
    """

    num_heads: int | None = None
    objective: str | None = None

    def check(self) -> None:
        """Raises UserError for values that no model has."""
        for name, field in (("num_heads", "model.num_heads"), ("objective", "diffusion.objective")):
            if (value := getattr(self, name)) is not None:
                FIELDS[field].check_type(value, name)
                FIELDS[field].check(value, name)

    def check_agrees(self, description: Description, source: str) -> None:
        """Raises UserError if the file says something else."""
        said = {"num_heads": description.model.num_heads, "objective": description.diffusion.objective}
        for name, value in said.items():
            if (given := getattr(self, name)) not in (None, value):
                raise UserError(f"{source}: has {name}={value}, but {name}={given} was given: leave it out")


def describe_published(
    layout: Layout, model_args: Mapping[str, Any], ema: bool, source: str, told: Told = Told()
) -> Description:
    """Describes a published checkpoint: what shapes do not tell comes from its surroundings, or is as published.

    Args:
      layout: of the state dict.
      model_args: attributes of the Namespace beside it; those looked at are model, image_size and vae.
      ema: whether the weights are averaged.
      source: its path, which errors name; a DiT's or SiT's says which of the two it is.
      told: of a DiT or SiT, what neither shapes nor the name tell.

    Raises:
      UserError: tensors of none of the four, a TerDiT or Large-DiT of a shape that was never published, or a DiT or SiT
        of which something is missing.
    """
    facts = read_facts(layout, source)
    if facts["family"] == "dit":
        return _describe_dit(facts, ema, source, told)
    return _describe_large_dit(facts, model_args, ema, source)


def _describe_large_dit(facts: Mapping[str, Any], model_args: Mapping[str, Any], ema: bool, source: str) -> Description:
    shape = facts["hidden_size"], facts["depth"]
    if not (name := _find(PUBLISHED_SHAPES, shape)):
        raise UserError(
            f"{source}: width {shape[0]} with {shape[1]} layers is none of the published models, and the file says "
            "nothing of the number of heads: give an export of terdit_jax, which does"
        )
    image_size, vae = model_args.get("image_size", 256), model_args.get("vae", "ema")
    if not is_count(image_size, 1, MAX_SIZE - 1) or vae not in VAES:
        raise UserError(f"{source}: model_args has image_size={short(image_size)}, vae={short(vae)}")
    read = ("ternary", "hidden_size", "depth", "num_classes", "qk_norm", "adaln_rms_norm")
    model = ModelConfig(
        **{field: facts[field] for field in read},
        input_size=image_size // SD_DOWNSAMPLING,
        num_heads=PUBLISHED_HEADS,
        num_kv_heads=facts["kv_width"] * PUBLISHED_HEADS // facts["hidden_size"],
    )
    return Description(
        name=name,
        model=architecture(model),
        ema=ema,
        step=None,
        codec=f"sd-vae-ft-{vae}",
        latent_scale=SD_LATENT_SCALE,
        sample=SampleConfig(),
        provenance=_PROVENANCE,
    )


def _describe_dit(facts: Mapping[str, Any], ema: bool, source: str, told: Told) -> Description:
    path, shape = Path(source), (facts["hidden_size"], facts["depth"])
    size, named = _find(DIT_SIZES, shape), _DIT_NAME.match(path.name)
    num_heads = DIT_HEADS[size] if size else told.num_heads
    objective = _find(_PROJECTS, named[1]) if named else told.objective
    missing = []
    if num_heads is None:
        missing.append(f"--num_heads (no size with width {shape[0]} and {shape[1]} layers is published)")
    if objective is None:
        missing.append("--objective=ddpm for DiT or flow for SiT (its name does not begin as DiT-XL-2 or SiT-XL-2)")
    if num_heads is None or objective is None:
        raise UserError(f"{source}: give what it does not tell, in Python as an argument: {', '.join(missing)}")
    if objective == "ddpm" and not facts["learn_sigma"]:
        raise UserError(f"{source}: a DiT has output channels for the variance, and this has none: is it a SiT?")
    latents = facts["in_channels"] == 4
    model = ModelConfig(**facts, num_heads=num_heads, num_kv_heads=num_heads, positions="sincos_2d", qk_norm=False)
    try:
        return Description(
            name=printable(path.stem)[:100],
            model=architecture(model),
            ema=ema,
            step=None,
            codec="sd-vae-ft-ema" if latents else "none",
            latent_scale=SD_LATENT_SCALE if latents else 1.0,
            sample=SampleConfig() if objective == "ddpm" else SampleConfig(method="sde"),
            provenance=_PROVENANCE,
            diffusion=DiffusionConfig(objective=objective),
        )
    except UserError as error:
        raise UserError(f"{source}: makes no model: {error}") from error


def public_model_args(description: Description) -> dict[str, Any]:
    """The attributes of `model_args.pth` that the public sampler reads, named after its flags."""
    model, codec = description.model, description.codec
    latents = codec.startswith("sd-vae-ft-")
    return {
        "model": public_name(description) or description.name,
        "image_size": model.input_size * (SD_DOWNSAMPLING if latents or model.in_channels == 4 else 1),
        "num_classes": model.num_classes,
        "qk_norm": model.qk_norm,
        "vae": codec.removeprefix("sd-vae-ft-") if latents else "ema",
    }


def public_name(description: Description) -> str | None:
    """The public sampler's name for a model's shape, such as DiT_Llama_3B_patch2 or DiT-XL/2; None if it has none."""
    model = description.model
    shape = model.hidden_size, model.depth
    if model.family == "large_dit":
        return _find(PUBLISHED_SHAPES, shape)
    size = _find(DIT_SIZES, shape)
    return f"{_PROJECTS[description.diffusion.objective]}-{size}/{model.patch_size}" if size else None


def public_remark(description: Description, file: Path) -> str | None:
    """A line to read before giving an exported state dict to the public code; None if there is nothing to note."""
    model, project = description.model, _PROJECTS[description.diffusion.objective]
    if model.family == "large_dit":
        if _is_public_large_dit(description):
            return None
        known = "sampler knows three shapes only, all of DDPM models"
    elif _is_public_dit(description):
        if project == "SiT" and model.learn_sigma:  # with --ckpt it wants a model without the variance
            return f"note: the public sampler of SiT takes a copy of {file} as pretrained_models/SiT-XL-2-256x256.pt"
        flags = f"--model={public_name(description)} --image-size={SD_DOWNSAMPLING * model.input_size} --ckpt={file}"
        return f"note: the public sampler of {project} takes it by {flags}"
    else:
        known = "samplers of DiT and SiT know S, B, L and XL in full precision, of 256 or 512 px and 1,000 classes"
    return (
        f"note: the public {known}, and this is none of them; "
        "terdit_jax reads it, in JAX and in PyTorch (docs/pytorch.md)"
    )


def _is_public_large_dit(description: Description) -> bool:
    model = description.model
    return (
        public_name(description) is not None
        and description.diffusion.objective == "ddpm"
        and (model.num_heads, model.num_kv_heads) == (PUBLISHED_HEADS, PUBLISHED_HEADS)
        and (model.patch_size, model.in_channels, model.ffn_multiple_of) == (2, 4, 256)
        and model.positions == "rope_1d"
        and model.adaln_rms_norm
        and model.num_classes == 1000  # its null label is written out as 1000
    )


def _is_public_dit(description: Description) -> bool:
    model, diffusion = description.model, description.diffusion
    size = _find(DIT_SIZES, (model.hidden_size, model.depth))
    if not size or model.ternary or model.num_heads != DIT_HEADS[size]:
        return False
    if (model.in_channels, model.num_classes) != (4, 1000) or model.patch_size not in DIT_PATCHES:
        return False
    if model.input_size * SD_DOWNSAMPLING not in (256, 512):
        return False
    if diffusion.objective == "ddpm":
        return model.learn_sigma
    by_name = (size, model.patch_size, model.input_size) == ("XL", 2, 32)
    return (diffusion.path, diffusion.shift) == ("linear", 1.0) and (by_name or not model.learn_sigma)


def _find(table: Mapping[str, Any], value: object) -> str | None:
    """The key of a value."""
    return next((key for key, known in table.items() if known == value), None)
