"""Configurations and the flag that names one: shipped with the package, or a file with `get_config()`, or a run's JSON.

Fields, types and rules live in `config`. Whatever is wrong with a file or an override is a UserError of one line.
"""

from collections.abc import Collection, Iterator
import difflib
import os
from pathlib import Path
import re
import sys
import traceback
import types
from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict, FieldReference, FrozenConfigDict, config_flags

from terdit_jax.config import FIELDS, PATHS, RunConfig, base_config, freeze
from terdit_jax.config_rules import flatten
from terdit_jax.errors import UserError, in_a_line
from terdit_jax.paths import as_path
from terdit_jax.untrusted import parse_json

flags.disclaim_key_flags()  # --config belongs to the command that defines it, and to its --helpshort

_UNSET = object()  # the value of a placeholder
_SUFFIXES = (".py", ".json")
# By name, those that come with the package: in a checkout, the files of its folder configs/.
SHIPPED = {path.stem: path for path in sorted(Path(__file__).parent.joinpath("configs").glob("*.py"))}


def define_config(help: str, flag_values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder[ConfigDict | None]:
    """The flag --config, with --config.section.field=value for every field; read it with `read_config`."""
    holder = config_flags.DEFINE_config_file("config", None, help, flag_values)
    flag_values["config"].parser = _ConfigParser()
    return holder


def read_config(holder: flags.FlagHolder[ConfigDict | None]) -> RunConfig | None:
    """The configuration that the flags describe, valid field by field; None without --config.

    Raises:
      UserError: a field that is still a placeholder, of another type or against its rule, or a path that cannot be one.
    """
    if holder.value is None:
        return None
    given = dict(_fields(holder.value))
    for name, value in sorted(given.items()):
        if value is _UNSET:
            raise UserError(f"config.{name} is a placeholder that nothing fills: give --config.{name}=VALUE")
    config = freeze(given)
    return config.with_fields(
        {name: os.fspath(as_path(given[name], f"config.{name}")) for name in PATHS if given[name]}
    )


def load_config(path: epath.PathLike) -> ConfigDict:
    """The configuration in a file, with all fields and no other; a Python file may leave placeholders and references.

    Args:
      path: the name of a shipped configuration, as digits, a Python file whose `get_config()` returns a ConfigDict,
        or a JSON file such as a run's config.json. The text after a colon that follows .py is given to `get_config` as
        its argument.

    Raises:
      UserError: with one line that says what is wrong with it.
    """
    text = os.fspath(path)
    file, colon, argument = text.partition(".py:")
    place = as_path(SHIPPED.get(text) or (file + ".py" if colon else text), "--config")
    content = _read(place)
    if place.suffix == ".json":
        return _from_json(place, content)
    config = _call(place, content, [argument] if colon else [])
    _check_fields(place, dict(_fields(config)))
    return config


class _ConfigParser(flags.ArgumentParser):
    """Loads the file, and looks through the overrides on the command line before ml_collections does."""

    def parse(self, argument: str) -> ConfigDict:
        if not argument:
            raise UserError("--config is empty: name a configuration, as --config=digits")
        config = load_config(argument)
        _check_overrides()
        return config.lock()

    def flag_type(self) -> str:
        return "a configuration file"


def _read(place: epath.Path) -> str:
    if place.is_dir():
        inside = place / "config.json"
        meant = f"did you mean {inside}?" if inside.exists() else "give a file, as configs/digits.py"
        raise UserError(f"--config={place}: is a folder; {meant}")
    if place.exists() and place.suffix not in _SUFFIXES:
        raise UserError(f"--config={place}: give a Python file (.py) with get_config(), or a run's config.json")
    try:
        return place.read_text()
    except OSError as error:
        hint = f"; by name there are {', '.join(SHIPPED)}" if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"--config={place} cannot be read: {error.strerror or error}{hint}") from error
    except ValueError as error:
        raise UserError(f"--config={place}: is no text in UTF-8 ({in_a_line(error)})") from error


def _call(place: epath.Path, source: str, arguments: list[str]) -> ConfigDict:
    """Calls get_config() of a Python file and returns its result."""
    name = os.fspath(place)
    module = types.ModuleType("config_file")
    module.__file__ = name
    sys.modules[module.__name__] = module  # where dataclasses and pickle look for it
    try:
        exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise UserError(f"--config={name}: defines no get_config(); configs/digits.py is an example")
        config = get_config(*arguments)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"--config={name}{_line_of(error, name)}: {in_a_line(error)}") from error
    if isinstance(config, FrozenConfigDict):
        config = ConfigDict(config)
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config={name}: get_config() returned {type(config).__name__}, not a ConfigDict: start from "
            "terdit_jax.config.base_config() and return it"
        )
    return config


def _line_of(error: BaseException, file: str) -> str:
    """`, line N` of the file that an error arose in, as far as it can be told."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return f", line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f", line {lines[-1]}" if lines else ""


def _from_json(place: epath.Path, content: str) -> ConfigDict:
    """`base_config()` with the values of a JSON file.

    Fields that the file of an older run lacks have their defaults, which a line on standard error says. Those of
    `model` may be missing only if they came later (`added`): with another default it would be another model.
    """
    tree = parse_json(content, f"--config={place}", dict)
    given, config = dict(flatten(tree)), base_config()
    missing = sorted(FIELDS.keys() - given.keys())
    if len(missing) == len(FIELDS):
        raise UserError(f"--config={place}: holds no field of a configuration; a run's WORKDIR/config.json does")
    late = [field for field in missing if FIELDS[field].added or not field.startswith("model.")]
    _check_fields(place, given | dict.fromkeys(late))
    for field, value in given.items():
        FIELDS[field].check_type(value, f"config.{field}")
        section, _, name = field.rpartition(".")
        (config[section] if section else config)[name] = value
    if late:
        filled = ", ".join(f"{field}={FIELDS[field].default!r}" for field in late)
        print(f"--config={place} lacks {len(late)} fields, which have their defaults: {filled}", file=sys.stderr)
    return config


def _check_fields(place: epath.Path, given: dict[str, Any]) -> None:
    """Raises UserError unless the fields of a file are those of `base_config`."""
    for field in given:
        if field not in FIELDS:
            raise UserError(f"--config={place}: there is no field {field}; {nearest(field, sorted(FIELDS))}")
    for field in sorted(FIELDS):
        if field not in given:
            raise UserError(f"--config={place}: lacks {field}; terdit_jax.config.base_config() has every field")


def _check_overrides() -> None:
    """Raises UserError for an override of a field that is unknown: ml_collections would print the bare name."""
    for argument in sys.argv[1:]:
        match = re.match(r"--?(no)?config\.([^=]*)", argument)
        if match is None or match[2] in FIELDS:
            continue
        section = [field for field in sorted(FIELDS) if field.startswith(f"{match[2]}.")]
        if section:
            raise UserError(f"--config.{match[2]} is a section: give its fields, as --config.{section[0]}=VALUE")
        raise UserError(f"--config.{match[2]}: there is no such field; {nearest(match[2], sorted(FIELDS))}")


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flattens as `flatten` does, with references resolved and `_UNSET` for placeholders that hold nothing yet."""
    for name, value in config.items(preserve_field_references=True):
        if isinstance(value, FieldReference):
            try:
                value = value.get()
            except Exception as error:  # what a reference is computed by may raise anything
                raise UserError(
                    f"config.{prefix}{name} has no value ({in_a_line(error)}): set it in the file, or make it a "
                    f"config_dict.placeholder, which --config.{prefix}{name}=VALUE fills"
                ) from error
            value = _UNSET if value is None else value
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def nearest(field: str, known: Collection[str]) -> str:
    """The end of an error about an unknown field: the names that may have been meant, or those there are."""
    section, _, name = field.rpartition(".")
    beside = {one.rpartition(".")[2]: one for one in known if one.rpartition(".")[0] == section}
    close = [one for one in known if one.rpartition(".")[2] == name]
    if section and beside:
        close += [beside[one] for one in difflib.get_close_matches(name, beside, 3, 0.6)]
    else:
        close += difflib.get_close_matches(field, known, 3, 0.6)
    if close:
        return f"did you mean {' or '.join(dict.fromkeys(close))}?"
    if section and beside:
        return f"config.{section} has {', '.join(beside)}"
    return "docs/configs.md has them all"
