"""Imports go one way: a package of terdit_jax imports only from the packages above it in LAYERS."""

import ast
from pathlib import Path
import subprocess
import sys

import pytest

PACKAGE = Path(__file__).parents[1] / "terdit_jax"
LAYERS = (
    "ternary", "diffusion", "parallel", "model", "fast", "data", "checkpoints", "training", "interop", "inference",
    "evaluation", "aot", "page",
)  # fmt: skip
# Imported by anyone, and by those after them.
FOUNDATIONS = (
    "__version__", "choices", "versions", "streams", "progress", "interrupts", "reproducible", "errors", "paths",
    "files", "untrusted", "labels", "options", "memory", "programs", "batches", "config_rules", "config_sections",
    "config", "config_file",
)  # fmt: skip
SOURCES = sorted(PACKAGE.rglob("*.py"))


def layer_of(module: str) -> str:
    """The part of terdit_jax that a module path `terdit_jax.part.rest` belongs to; "" for terdit_jax itself."""
    return (module.split(".") + [""])[1]


def imported_layers(source: str, module: str, is_package: bool = False) -> set[str]:
    """The parts of terdit_jax that a module's source imports anywhere, inside functions included."""
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            base = parts[: len(parts) - node.level + is_package] if node.level else []  # one dot: its own package
            base += [node.module] if node.module else []
            imported |= {".".join([*base, alias.name]) for alias in node.names}
    return {layer_of(name) for name in imported if name.split(".")[0] == "terdit_jax"}


def violations(source: str, module: str, is_package: bool = False) -> set[str]:
    """The parts of terdit_jax that a module imports and must not."""
    own = layer_of(module)
    if own in LAYERS:
        allowed = {*LAYERS[: LAYERS.index(own) + 1], *FOUNDATIONS}
    elif own in FOUNDATIONS:
        allowed = set(FOUNDATIONS[: FOUNDATIONS.index(own)])
    elif own:  # a command
        allowed = {*LAYERS, *FOUNDATIONS}
    else:  # terdit_jax itself, which offers load_model
        allowed = {"inference", "interrupts"}
    return imported_layers(source, module, is_package) - allowed


def test_every_package_has_its_place():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(LAYERS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_come_from_above(path):
    is_package = path.name == "__init__.py"
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    module = ".".join(parts[:-1] if is_package else parts)
    assert not violations(path.read_text(), module, is_package), f"{module} imports from below itself"


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("terdit_jax.ternary.linear", "from terdit_jax.model.config import DiTConfig", {"model"}),
        ("terdit_jax.ternary.linear", "import terdit_jax.model.config", {"model"}),
        ("terdit_jax.ternary.linear", "from terdit_jax import training, errors", {"training"}),
        ("terdit_jax.ternary.linear", "from ..training import loop", {"training"}),
        ("terdit_jax.ternary.linear", "from . import packing", set()),
        ("terdit_jax.data.reader", "def f():\n    from terdit_jax.training import loop", {"training"}),
        ("terdit_jax.training.loop", "from terdit_jax.main import main", {"main"}),
        ("terdit_jax.training.loop", "from terdit_jax.data.reader import make_batches\nimport jax", set()),
        ("terdit_jax.sample", "from terdit_jax import main\nfrom terdit_jax.interop import published", {"main"}),
        ("terdit_jax.errors", "from terdit_jax.config import base_config", {"config"}),
        ("terdit_jax.config", "from terdit_jax.errors import UserError", set()),
        ("terdit_jax.interop.weights", "from terdit_jax.inference.runtime import load_model", {"inference"}),
        ("terdit_jax", "def f():\n    from terdit_jax.inference.runtime import load_model", set()),
        ("terdit_jax", "from terdit_jax.main import main", {"main"}),
    ],
)
def test_a_violation_is_caught(module, source, found):
    assert violations(source, module) == found


def test_a_violation_in_a_package_file_is_caught():
    assert violations("from ..model import block", "terdit_jax.ternary", is_package=True) == {"model"}
    assert violations("from . import packing", "terdit_jax.ternary", is_package=True) == set()


@pytest.mark.parametrize("module", ["terdit_jax", "terdit_jax.interop.pytorch"])
def test_who_runs_a_model_in_pytorch_needs_no_jax(module):
    """Not even installed."""
    if module.endswith("pytorch"):
        pytest.importorskip("torch")
    code = f"import sys; sys.modules['jax'] = None; import {module}; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "'terdit_jax'" in done.stdout and "'flax'" not in done.stdout and "'jaxlib'" not in done.stdout


@pytest.mark.parametrize("command", ["sample", "export", "prepare", "evaluate", "main"])
def test_what_a_command_may_not_need_is_imported_when_it_is(command):
    """tensorboardX imports PyTorch where that is installed, which takes seconds."""
    rare = {"tensorboardX", "torch", "sklearn"}
    rare |= {"grain", "tensorflow_datasets"} if command in ("sample", "export") else set()
    code = f"import sys, terdit_jax.{command}; found = {rare} & set(sys.modules); assert not found, found"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


TESTS = sorted(Path(__file__).parent.rglob("*.py"))
COMMANDS = {path.stem for path in PACKAGE.glob("*.py") if "    run_command(main" in path.read_text()}


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_a_module_of_tests_imports_commands_without_their_flags(path):
    """Two commands define a flag of the same name, and one process collects all tests; test_export reads its flags."""
    imported = set()
    for node in ast.parse(path.read_text()).body:  # not within `with no_flags()` or a function
        if isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    found = imported & {f"terdit_jax.{command}" for command in COMMANDS}
    assert found <= ({"terdit_jax.export"} if path.name == "test_export.py" else set())
