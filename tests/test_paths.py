"""Paths as people write them."""

import os
from pathlib import Path
import re

from absl import flags
import pytest

from terdit_jax.config import FIELDS, PATHS
from terdit_jax.errors import UserError
from terdit_jax.paths import absolute, as_path, define_path, is_remote, local_path

ROOT = Path(__file__).parents[1]
# Flags of the commands and benchmarks that take text which names no place.
NO_PLACES = {"worker", "topology", "profile", "one", "steps", "until", "device", "config", "turn", "push_to", "license"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    return tmp_path / "me"


@pytest.mark.parametrize("text", ["runs/x", "./runs/x", "../x", ".", "a b/ü", "data/~x", "x~", "/tmp/x", "runs:1"])
def test_local_paths_stay_as_they_are(text):
    assert as_path(text) == Path(text) and not is_remote(text)


@pytest.mark.parametrize("text, rest", [("~", ""), ("~/", ""), ("~/runs/x", "runs/x"), ("~/a b", "a b")])
def test_home_is_expanded_at_the_beginning(home, text, rest):
    assert as_path(text) == home / rest == local_path(text)


def test_a_home_that_there_is_not_is_named():
    with pytest.raises(UserError, match=r"--output=~nobody-here/x: there is no home directory ~nobody-here"):
        as_path("~nobody-here/x", "--output")


@pytest.mark.parametrize("text", ["gs://bucket/runs/x", "gs://bucket/~/x", "gs://b/a b"])
def test_addresses_stay_as_they_are(text, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert os.fspath(as_path(text)) == text == os.fspath(absolute(text)) and is_remote(text)


@pytest.mark.parametrize(
    "text, why",
    [
        ("http://host/x", "not supported"), ("file:///x", "not supported"), ("gs://", "names no bucket"),
        ("gs:///x", "needs the package|names no bucket"), ("a\0b", "null character"), ("x" * 256, "too long"),
        ("a/" * 2100, "too long"),
    ],
)  # fmt: skip
def test_what_no_file_system_takes_is_refused_in_a_line(text, why):
    with pytest.raises(UserError, match=why) as raised:
        as_path(text, "--output")
    assert "\n" not in str(raised.value) and str(raised.value).startswith("--output=")


def test_absolute_follows_no_links(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert absolute("link/x") == Path.cwd() / "link" / "x"


def test_a_flag_of_a_place_expands_home(home):
    values = flags.FlagValues()
    define_path("place", None, "", flag_values=values)
    values(["x", "--place=~/x"])
    assert values.place == str(home / "x")
    with pytest.raises(UserError, match="--place=: is empty"):
        values(["x", "--place="])


def test_a_flag_is_defined_by_the_module_that_asks_for_it():
    values = flags.FlagValues()
    define_path("place", None, "Where.", flag_values=values)
    assert list(values.flags_by_module_dict()) == [__name__]


def test_every_flag_that_names_a_place_is_one_of_define_path():
    sources = [*(ROOT / "terdit_jax").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    named = {
        (path.stem, name)
        for path in sources
        for name in re.findall(r'DEFINE_string\(\s*"(\w+)"', path.read_text())
        if name not in NO_PLACES
    }
    assert not named, "take define_path, or say in NO_PLACES that they name no place"


def test_every_field_that_names_a_place_is_expanded():
    """A new field of text whose meaning is a folder shows up here: docs/configs.md and `PATHS` have to know it."""
    text_fields = {name for name, field in FIELDS.items() if field.default == ""}
    assert text_fields - set(PATHS) == {"train.compiler_options"}
