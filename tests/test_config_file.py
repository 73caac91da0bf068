"""Configuration files: what cannot be one is refused in one line, and the config.json of a run is one."""

import json
import sys

from absl import flags
import pytest

from terdit_jax.config import RunConfig
from terdit_jax.config_file import define_config, load_config, read_config
from terdit_jax.config_rules import flatten
from terdit_jax.errors import UserError

HEAD = "from ml_collections import ConfigDict, FieldReference, config_dict\nfrom terdit_jax.config import base_config\n"
RETURNS = HEAD + "def get_config():\n    config = base_config()\n    {}\n    return config\n"
SAVED = RunConfig().to_dict()


def changed(**fields):
    changes = {name.replace("__", "."): value for name, value in fields.items()}
    return json.dumps(RunConfig().with_fields(changes).to_dict())


def without(section, *names):
    left = {name: value for name, value in SAVED[section].items() if name not in names}
    return json.dumps(SAVED | {section: left})


BAD = {
    "a syntax error": ("a.py", "def get_config(:\n", r"a.py, line 1: SyntaxError"),
    "a failing import": ("a.py", "\nimport no_such_module\n", "a.py, line 2: ModuleNotFoundError"),
    "a failing body": ("a.py", "1 / 0\n", "a.py, line 1: ZeroDivisionError"),
    "a failing get_config": ("a.py", "def get_config():\n    raise OSError('a\\nb')\n", "OSError: a b"),
    "an exit": ("a.py", "import sys\nsys.exit(3)\n", "line 2: SystemExit: 3"),
    "a field that is not there": ("a.py", RETURNS.format("config.train.epochs = 3"), "line 5: AttributeError"),
    "a wrong type in Python": ("a.py", RETURNS.format("config.train.num_steps = '3'"), "line 5: TypeError"),
    "no get_config": ("a.py", "config = 3\n", r"defines no get_config\(\)"),
    "a get_config that is no function": ("a.py", "get_config = 3\n", r"defines no get_config\(\)"),
    "None": ("a.py", "def get_config(): pass\n", r"get_config\(\) returned NoneType, not a ConfigDict"),
    "a dict": ("a.py", "def get_config(): return {'a': 1}\n", r"get_config\(\) returned dict, not a ConfigDict"),
    "a module's own dict": ("a.py", HEAD + "def get_config(): return base_config().to_dict()\n", "returned dict"),
    "needs an argument": ("a.py", "def get_config(size): pass\n", "missing 1 required positional argument: 'size'"),
    "an empty file": ("a.py", "", r"defines no get_config\(\)"),
    "an empty ConfigDict": ("a.py", HEAD + "def get_config(): return ConfigDict()\n", "lacks checkpoint.every"),
    "a section missing": ("a.py", RETURNS.format("config.unlock(); del config.log"), "lacks log.every"),
    "an unknown section": (
        "a.py", RETURNS.format("config.unlock(); config.log.evry = 3"), "field log.evry; did you mean log.every",
    ),
    "a number for a section": (
        "a.py", RETURNS.format("config = ConfigDict({**config.to_dict(), 'log': 3})"), "there is no field log;",
    ),
    "a binary": ("a.py", b"\x89PNG\xff\x00", "is no text in UTF-8"),
    "null bytes": ("a.py", "\0\0", "a.py.*: (SyntaxError|ValueError)"),
    "another suffix": ("a.yaml", "name: x\n", r"give a Python file \(.py\)"),
    "no suffix": ("a", "name: x\n", r"give a Python file \(.py\)"),
    "JSON that is none": ("a.json", "{'a': 1}", "is not sound JSON"),
    "half of it": ("a.json", json.dumps(SAVED)[:99], "is not sound JSON"),
    "an empty JSON file": ("a.json", "", "is not sound JSON"),
    "a list": ("a.json", "[1]", "is not a JSON dict"),
    "other JSON": ("a.json", "{}", "holds no field of a configuration"),
    "a deep nest": ("a.json", '{"a":' * 10_000 + "1" + "}" * 10_000, "is not sound JSON|there is no field"),
    "an unknown field": ("a.json", json.dumps(SAVED | {"epochs": 3}), "there is no field epochs; docs/configs.md"),
    "a model's field missing": ("a.json", without("model", "depth"), "lacks model.depth"),
    "the model missing": ("a.json", json.dumps({"seed": 3}), "lacks model."),
    "a string for a number": ("a.json", json.dumps(SAVED | {"seed": "0"}), "seed='0': must be of type int"),
    "true for a number": ("a.json", json.dumps(SAVED | {"seed": True}), "must be of type int, not bool"),
    "a number for true": ("a.json", changed().replace('"ternary": true', '"ternary": 1'), "ternary=1: must be"),
    "null": ("a.json", json.dumps(SAVED | {"name": None}), "config.name=None: must be of type str"),
    "a list for a number": ("a.json", json.dumps(SAVED | {"seed": [1]}), r"config.seed=\[1\]: must be of type int"),
    "nan": ("a.json", json.dumps(SAVED | {"seed": float("nan")}), "is not sound JSON"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BAD.values(), ids=BAD)
def test_what_is_no_configuration_is_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert [child.name for child in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("value", ["", " ", ".", "/", "/dev/null", "x" * 300 + ".py", "ftp://a/b.py", "~nobody7/x.py"])
def test_a_path_that_names_no_file_is_refused(value):
    with pytest.raises(UserError, match="--config"):
        load_config(value)


def test_a_folder_of_a_run_is_answered_with_its_config(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"is a folder; did you mean {tmp_path}/config.json"):
        load_config(tmp_path)


def test_the_saved_configuration_of_a_run_is_a_configuration(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(changed(train__num_steps=7, optimizer__learning_rate=1.0, name="seven"))
    config = load_config(path)
    assert dict(flatten(config)) == dict(flatten(json.loads(path.read_text())))
    assert type(config.optimizer.learning_rate) is float and capsys.readouterr().err == ""


def test_what_an_older_run_lacks_has_its_default_and_is_said(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(without("compute", "layers", "passes"))
    assert load_config(path).compute.layers == "auto"
    (line,) = capsys.readouterr().err.splitlines()
    assert "lacks 2 fields, which have their defaults: compute.layers='auto', compute.passes='auto'" in line


def test_whole_numbers_in_json_are_floats_where_fields_are(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SAVED | {"sample": SAVED["sample"] | {"cfg_scale": 4}}))
    assert type(load_config(path).sample.cfg_scale) is float


def test_an_argument_follows_the_file(tmp_path):
    path = tmp_path / "sized.py"
    path.write_text(RETURNS.format("config.name = name").replace("get_config()", "get_config(name)"))
    assert load_config(f"{path}:large").name == "large"


def test_a_file_read_twice_is_read_anew_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "a.py"
    for seed in (1, 2):
        path.write_text(RETURNS.format(f"config.seed = {seed}"))
        assert load_config(path).seed == seed
    assert [child.name for child in tmp_path.iterdir()] == ["a.py"]


@pytest.fixture
def command(monkeypatch):
    """Parses arguments as a command does that takes --config; returns the configuration."""

    def parse(*arguments):
        parsed = flags.FlagValues()
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        holder = define_config("A configuration.", parsed)
        parsed(sys.argv)
        return read_config(holder)

    return parse


def test_references_follow_overrides_and_placeholders_wait_for_them(tmp_path, command):
    path = tmp_path / "a.py"
    body = "config.log.score_samples = config.sample.get_ref('num_images'); "
    body += "config.train.batch_size = config_dict.placeholder(int)"
    path.write_text(RETURNS.format(body))
    config = command(f"--config={path}", "--config.sample.num_images=5", "--config.train.batch_size=8")
    assert (config.log.score_samples, config.train.batch_size) == (5, 8)


def test_a_placeholder_that_nothing_fills_is_named(tmp_path, command):
    path = tmp_path / "a.py"
    path.write_text(RETURNS.format("config.train.batch_size = config_dict.placeholder(int)"))
    with pytest.raises(UserError, match="config.train.batch_size is a placeholder .* --config.train.batch_size=VALUE"):
        command(f"--config={path}")
    path.write_text(RETURNS.format("config.train.batch_size = config_dict.required_placeholder(int)"))
    with pytest.raises(UserError, match="config.train.batch_size has no value .*: set it in the file"):
        command(f"--config={path}", "--config.train.batch_size=8")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.epochs=3", "--config.epochs: there is no such field; docs/configs.md"),
        ("--config.train.num_step=3", "--config.train.num_step: there is no such field; did you mean train.num_steps?"),
        ("--config.batch_size=3", "did you mean train.batch_size?"),
        ("--config.train={'num_steps': 3}", "--config.train is a section: give its fields"),
        ("--noconfig.data.synthetc", "did you mean data.synthetic?"),
        ("--config.=3", "there is no such field"),
        ("--config.train.num_steps.x=3", "there is no such field"),
        ("--config.train.num_steps=-3", r"config.train.num_steps=-3: must lie in \[1, 2147483647\]"),
        ("--config.data.dir=ftp://x/y", "config.data.dir=ftp://x/y: ftp:// is not supported"),
    ],
)
def test_an_override_that_cannot_be_is_named(command, override, message):
    with pytest.raises(UserError, match=message) as caught:
        command("--config=configs/digits.py", override)
    assert "\n" not in str(caught.value)


def test_a_configuration_is_read_with_its_overrides_and_home(command, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(SAVED))
    config = command("--config=~/config.json", "--config.train.num_steps=5", "--config.data.dir=~/data")
    assert config.train.num_steps == 5 and config.data.dir == str(tmp_path / "data")


def test_no_configuration_is_none(command):
    assert command() is None
