"""Every shipped configuration makes a model, lies on a pod, and says how it is run; docs/configs.md has every field."""

import importlib.util
from pathlib import Path
import re

import jax
from jax.sharding import AbstractMesh
import pytest

from terdit_jax.config import RunConfig, freeze
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.transformer import count_params, packed_bytes
from terdit_jax.parallel.mesh import AXES, mesh_shape
from terdit_jax.parallel.sharding import tree_shardings
from terdit_jax.training.optimizer import make_optimizer
from terdit_jax.training.state import init_state
from tests import config_page

ROOT = Path(__file__).parents[1]
PATHS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.py"))}
NAMES = list(PATHS)

# Parameters, ternary ones among them, and images seen in training: the published models.
PUBLISHED = {
    "terdit_600m": (609_984_160, 603_979_776, 448e6),
    "terdit_4b": (4_238_414_112, 4_227_858_432, 604e6),
    "terdit_4b_512": (4_238_414_112, 4_227_858_432, 696e6),
    "large_dit_600m": (609_836_576, 0, 448e6),
    "large_dit_4b": (4_237_824_032, 0, 604e6),
    "dit_xl_2": (674_834_720, 0, 1792e6),
    "terdit_dit_xl_2": (675_028_452, 668_860_416, 448e6),
}


def load(name):
    spec = importlib.util.spec_from_file_location(name, PATHS[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_of(name) -> RunConfig:
    return freeze(load(name).get_config())


def model_of(name):
    return DiTConfig.from_config(config_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_config_is_sound(name):
    config = config_of(name)
    DiTConfig.from_config(config)
    assert config.name == name and config.data.dir
    assert config.optimizer.drop_step < config.train.num_steps
    assert not config.optimizer.drop_step or config.optimizer.drop_learning_rate < config.optimizer.learning_rate
    assert config.checkpoint.keep_every % config.checkpoint.every == 0, "only a step that is saved can be kept"


@pytest.mark.parametrize("name", NAMES)
def test_config_file_is_flat_and_says_how_it_is_run(name):
    source, module = PATHS[name].read_text(), load(name)
    assert len(source.splitlines()) < 90
    assert not re.search(r"^\s*(if|for|while|def (?!get_config))\b", source, re.MULTILINE), "a config has no logic"
    workdir = f"--workdir=runs/{name}"
    assert f"\npython -m terdit_jax.main --config=configs/{name}.py {workdir}\n" in module.__doc__


def test_every_published_config_is_there():
    assert set(PUBLISHED) | {"digits", "cifar10", "images_small"} == set(NAMES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_size_and_number_of_images(name):
    total, ternary, images = PUBLISHED[name]
    config = config_of(name)
    assert count_params(model_of(name)) == {"total": total, "ternary": ternary}
    assert config.train.num_steps * config.train.batch_size == pytest.approx(images, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_docstring_and_table_give_the_right_sizes(name):
    model = model_of(name)
    total, packed = f"{count_params(model)['total']:,}", f"{packed_bytes(model) / 1e6:,.1f} MB packed"
    (row,) = re.findall(rf"^\| `configs/{name}.py` \|.*$", (ROOT / "configs/README.md").read_text(), re.MULTILINE)
    assert f"| {total} |" in row
    assert not model.ternary or f"| {packed} |" in row
    assert set(re.findall(r"([\d,]+) parameters", load(name).__doc__)) <= {total}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("devices", [1, 8, 64])
def test_batch_and_state_divide_over_the_mesh(name, devices):
    config = config_of(name)
    devices = 32 if (name, devices) == ("digits", 64) else devices  # 96 images do not divide by 64
    shape = mesh_shape(config.mesh, devices)
    mesh = AbstractMesh(shape, AXES)
    assert config.train.batch_size % (config.train.accumulation_steps * shape[0] * shape[1]) == 0
    model, optimizer = model_of(name), make_optimizer(config.optimizer)
    state = jax.eval_shape(lambda: init_state(model, optimizer, 0))
    tree_shardings(state, mesh)  # raises where a dimension is not divisible


def test_docs_list_the_fields_as_they_are_defined():
    text = config_page.PAGE.read_text()
    assert config_page.with_tables(text) == text, "run python -m tests.config_page"
