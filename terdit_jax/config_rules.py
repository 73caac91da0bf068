"""How a field of the configuration is written and checked: default, meaning, rule for its values, use on resume.

Which fields there are is in `config`.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
from typing import Any, NamedTuple

from ml_collections import ConfigDict
import numpy as np

from terdit_jax.errors import UserError


class Rule(NamedTuple):
    """The values that a field accepts, as a predicate on its type and in words."""

    accepts: Callable[[Any], bool]
    words: str


def whole(low: int, high: int = 2**31 - 1) -> Rule:
    """Steps, counts and sizes; they meet int32 arithmetic on devices, so that is the limit where no lower one is."""
    return Rule(lambda value: low <= value <= high, f"must lie in [{low}, {high}]")


def one_of(*choices: str) -> Rule:
    return Rule(lambda value: value in choices, f"choose one of {', '.join(choices)}")


def any_of(*choices: str) -> Rule:
    words = f"must be any of {', '.join(choices)}, separated by commas, or empty"
    return Rule(lambda value: all(name in choices for name in value.split(",") if value), words)


def _in_float32(value: float) -> float:
    """The value as devices hold it: infinite above float32's range, 0 below its normal range."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = float(np.float32(value))
    return rounded if abs(rounded) >= np.finfo(np.float32).tiny else 0.0


# Limits are far beyond any sensible value: they keep a mistyped digit from asking for memory or hours nobody has.
POSITIVE = Rule(lambda value: 0 < _in_float32(value) < np.inf, "must be positive and finite in float32")
FINITE = Rule(lambda value: value == value and abs(_in_float32(value)) < np.inf, "must be finite in float32")
NOT_NEGATIVE = Rule(lambda value: 0 <= value and _in_float32(value) < np.inf, "must be finite and not negative")
SHIFT = Rule(lambda value: 1e-3 <= value <= 1e3, "must lie in [0.001, 1000]")
THRESHOLD = Rule(lambda value: 1e-3 <= value < 1, "must lie in [0.001, 1): from 1 on, weights of one size are all 0")
SHARE = Rule(lambda value: 0 <= value and _in_float32(value) < 1, "must be in [0, 1), in float32 too")
AXIS = Rule(lambda value: value == -1 or 1 <= value <= 2**20, "must be -1 (what the others leave) or in [1, 1048576]")
NAME = Rule(lambda value: 0 < len(value) <= 100 and value.isprintable() and value.strip() == value,
             "must be 1 to 100 printable characters, without spaces around them")  # fmt: skip
TEXT = Rule(lambda value: len(value) <= 10_000 and value.isprintable(), "must be at most 10000 printable characters")
PATH = Rule(lambda value: value == value.strip(), "must not begin or end with a space")


def setting(
    default: Any,
    meaning: str,
    rule: Rule | None = None,
    *,
    free: bool = False,
    added: bool = False,
    omitted: bool = False,
) -> Any:
    """A field of a section.

    Args:
      default: its value, of the field's type.
      meaning: one line for docs/configs.md, in Markdown.
      rule: what it accepts; booleans need none.
      free: a resumed run may change it. It always may where the whole section is free.
      added: models were written to files before there was this field, and have its default.
      omitted: files do not mention it at its default, so that readers from before it open them, and refuse others.
    """
    metadata = {"meaning": meaning, "rule": rule, "free": free, "added": added, "omitted": omitted}
    return dataclasses.field(default=default, metadata=metadata)


class Field(NamedTuple):
    """A field as `setting` has it, with its section's word on resuming."""

    default: Any
    meaning: str
    rule: Rule | None
    free: bool
    added: bool
    omitted: bool = False

    def check(self, value: Any, name: str) -> None:
        """Raises UserError, which names the field so, for a value that its rule does not accept."""
        if self.rule and not self.rule.accepts(value):
            raise UserError(f"{name}={shown(value)}: {self.rule.words}")

    def check_type(self, value: Any, name: str) -> None:
        """Raises UserError for a value of another type than the default has; whole numbers are floats too."""
        kind = type(self.default)
        if type(value) is not kind and not (kind is float and type(value) is int and abs(value) < 2**53):
            raise UserError(f"{name}={value!r:.60}: must be of type {kind.__name__}, not {type(value).__name__}")


def flatten(tree: Mapping[str, Any] | ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a nested mapping as (dotted name, value)."""
    for name, value in tree.items():
        if isinstance(value, (dict, ConfigDict)):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def shown(value: Any) -> str:
    """A value as it stands in errors: strings in quotes, and nothing longer than a line."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-15:]}"
