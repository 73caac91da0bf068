"""The configuration of a run, put together from its sections, each field with default, meaning, rule and use on resume.

All else comes from these fields: the `base_config` that files in `configs/` start from, the checks, what a resumed run
may change, and the tables of docs/configs.md. Files and flags are read by `config_file`.
"""

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any

from ml_collections import ConfigDict

from terdit_jax.config_rules import NAME, PATH, Field, flatten, setting, shown, whole
from terdit_jax.config_sections import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    DiffusionConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
)
from terdit_jax.errors import UserError


def _section(kind: type, *, free: bool = False) -> Any:
    return dataclasses.field(default_factory=kind, metadata={"free": free})


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run; by default TerDiT-600M at 256 px as published. `freeze` makes one of checked values."""

    name: str = setting("terdit_600m", "What the log calls the model.", NAME, free=True)
    seed: int = setting(
        0,
        "Seeds parameters, order of the data, noise, timesteps, label dropout, posterior samples, flips. Below 2^32.",
        whole(0, 2**32 - 1),
    )
    model: ModelConfig = _section(ModelConfig)
    diffusion: DiffusionConfig = _section(DiffusionConfig)
    compute: ComputeConfig = _section(ComputeConfig, free=True)
    mesh: MeshConfig = _section(MeshConfig, free=True)
    data: DataConfig = _section(DataConfig)
    optimizer: OptimizerConfig = _section(OptimizerConfig, free=True)
    train: TrainConfig = _section(TrainConfig)
    checkpoint: CheckpointConfig = _section(CheckpointConfig, free=True)
    log: LogConfig = _section(LogConfig, free=True)
    sample: SampleConfig = _section(SampleConfig, free=True)

    def __str__(self) -> str:
        """One field a line, in the order of docs/configs.md; a star marks those that differ from their default."""
        given, lines = dict(flatten(self.to_dict())), []
        for name, field in FIELDS.items():
            value = given[name]
            mark, default = ("* ", f"   (default {shown(field.default)})") if value != field.default else ("  ", "")
            lines.append(f"{mark}{name:<28} {shown(value)}{default}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON can hold it, names in alphabetical order."""
        return {
            name: dict(sorted(vars(value).items())) if dataclasses.is_dataclass(value) else value
            for name, value in sorted(vars(self).items())
        }

    def with_fields(self, changes: Mapping[str, Any]) -> "RunConfig":
        """The configuration with other values for some fields, named as "train.num_steps"; raises as `freeze` does."""
        return freeze({**dict(flatten(self.to_dict())), **changes})


def _all_fields() -> Iterator[tuple[str, Field]]:
    for top in dataclasses.fields(RunConfig):
        if isinstance(top.default_factory, type):
            for field in dataclasses.fields(top.default_factory):
                free = field.metadata["free"] or top.metadata["free"]
                yield f"{top.name}.{field.name}", Field(field.default, **{**field.metadata, "free": free})
        else:
            yield top.name, Field(top.default, **top.metadata)


FIELDS = dict(_all_fields())  # by dotted name, in the order above
PATHS = tuple(name for name, field in FIELDS.items() if field.rule is PATH)


def base_config() -> ConfigDict:
    """Every field with its default, locked: what files in `configs/` and flags change."""
    return ConfigDict(RunConfig().to_dict()).lock()


def freeze(tree: Mapping[str, Any] | ConfigDict) -> RunConfig:
    """The configuration with the values of a ConfigDict, or of a mapping by section or dotted name.

    Each value is checked for itself. How they go together is checked where that is known: `DiTConfig`,
    `diffusion.objective`, `parallel.mesh`, `inference.sampling`, `training.setup`.

    Raises:
      UserError: naming the first field that is missing, unknown, of another type or against its rule.
    """
    given = dict(flatten(tree))
    if unknown := sorted(given.keys() - FIELDS.keys()):
        raise UserError(f"config.{unknown[0]}: there is no such field")
    sections: dict[str, dict[str, Any]] = {}
    for name, field in sorted(FIELDS.items()):
        if name not in given:
            raise UserError(f"config.{name} is missing: start from terdit_jax.config.base_config()")
        field.check_type(given[name], f"config.{name}")
        field.check(given[name], f"config.{name}")
        section, _, short = name.rpartition(".")
        sections.setdefault(section, {})[short] = type(field.default)(given[name])
    own, default = sections.pop(""), RunConfig()
    parts = {name: dataclasses.replace(getattr(default, name), **values) for name, values in sections.items()}
    return RunConfig(**own, **parts)
