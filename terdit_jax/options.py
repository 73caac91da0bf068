"""Flags of the commands beyond absl's own: numbers that are finite, and none that is given for nothing.

Flags that name a place belong to `paths`, those of the configuration to `config_file`.
"""

from collections.abc import Iterable
import math
from typing import Any, overload

from absl import flags

from terdit_jax.errors import UserError
from terdit_jax.paths import define_path

flags.disclaim_key_flags()  # a flag defined here belongs to the command that asks for it, and to its --helpshort

MAX_IMAGES = 10_000_000  # of one set: two hundred times what scores are published of
MAX_BATCH = 65_536
MAX_HEADS = 4096  # as config.model.num_heads has it
_LARGEST = 3e38  # of float32, rounded down


@overload
def define_float(
    name: str, default: float, help: str, *, low: float = ..., high: float = ...
) -> flags.FlagHolder[float]: ...
@overload
def define_float(
    name: str, default: None, help: str, *, low: float = ..., high: float = ...
) -> flags.FlagHolder[float | None]: ...
def define_float(
    name: str, default: float | None, help: str, *, low: float = -_LARGEST, high: float = _LARGEST
) -> flags.FlagHolder[float] | flags.FlagHolder[float | None]:
    """A flag that holds a number from `low` to `high`. absl's own lets nan pass, and with no bound infinity."""
    return flags.DEFINE(_FloatParser(low, high), name, default, help, serializer=flags.ArgumentSerializer())


def define_num_heads() -> flags.FlagHolder[int | None]:
    """The flag for the heads of a DiT's or SiT's checkpoint, whose file does not tell."""
    return flags.DEFINE_integer(
        "num_heads", None, "Attention heads, for a checkpoint of DiT or SiT of no published size.", 1, MAX_HEADS
    )


def define_objective() -> flags.FlagHolder[str | None]:
    """The flag for what a DiT's or SiT's checkpoint learned to predict, where its name does not tell."""
    return flags.DEFINE_enum(
        "objective", None, ("ddpm", "flow"), "For a checkpoint not named as published: ddpm is DiT, flow is SiT."
    )


def define_compilation_cache() -> flags.FlagHolder[str | None]:
    """The flag for where a command keeps the programs that it compiles (`programs.keep_programs`)."""
    return define_path(
        "compilation_cache", None, "Folder that keeps compiled programs, or off; the user's cache folder if left out."
    )


def refuse_unused(holders: Iterable[flags.FlagHolder[Any]], why: str) -> None:
    """Raises UserError for the first flag that was given though nothing reads it: `why`, as "with --inspect"."""
    for holder in holders:
        if holder.present:
            value = ",".join(holder.value) if isinstance(holder.value, list) else holder.value
            raise UserError(f"--{holder.name}={value}: takes no part {why}, leave it out")


class _FloatParser(flags.ArgumentParser):
    syntactic_help = "a number"

    def __init__(self, low: float, high: float):
        super().__init__()
        self._low, self._high = low, high

    def parse(self, argument: str | float) -> float:
        value = float(argument)
        if not self._low <= value <= self._high or not math.isfinite(value):
            raise ValueError(f"must be a finite number from {self._low:g} to {self._high:g}")
        return value

    def flag_type(self) -> str:
        return "float"
