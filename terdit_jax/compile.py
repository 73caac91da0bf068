"""Compiles a run for a machine that is not here: does it fit, what does it send, how fast could it be?

python -m terdit_jax.compile --config=configs/terdit_4b.py --topology=v5p:8x8x4 --output=report.json
python -m terdit_jax.compile --config=configs/terdit_4b.py --topology=v5e:1x1 --what=sample --mode=small
python -m terdit_jax.compile --table=docs/pods

It runs on a CPU, with the compilers of `pip install 'terdit-jax[aot]'`. docs/pods_compile.md says how to read it.
"""

from absl import flags

from terdit_jax.choices import MODES, TOPOLOGIES
from terdit_jax.config_file import define_config
from terdit_jax.errors import parse_flags
from terdit_jax.options import MAX_BATCH
from terdit_jax.paths import define_path

_CONFIG = define_config("File with get_config(), as configs/terdit_4b.py, or a run's config.json.")
_TOPOLOGY = flags.DEFINE_string("topology", None, f"The machine: {TOPOLOGIES}.")
_MESH = flags.DEFINE_list("mesh", None, "Mesh axes instead of the configuration's, as data=2,fsdp=128,tensor=1.")
_WHAT = flags.DEFINE_enum("what", "train", ["train", "sample"], "A training step, or the drawing of images.")
_MODE = flags.DEFINE_enum("mode", "exact", list(MODES), "Of inference, with --what=sample.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images a chip, with --what=sample.", 1, MAX_BATCH)
_SUGGEST = flags.DEFINE_bool("suggest", False, "Try meshes, remat policies and microbatches, and rank those that fit.")
_TRIES = flags.DEFINE_integer("tries", 4, "How many of them to compile, a minute or more each.", 1, 1000)
_TABLE = define_path("table", None, "Folder of saved reports: prints them as tables, compiles nothing.")
_MEASURED = define_path("measured", None, "With --table: JSON of benchmarks/training.py to compare with.")
_OUTPUT = define_path("output", None, "JSON file for the report, replaced if there; local or gs://.")

parse_flags(__name__)  # answers --help and wrong flags before the imports below, which take seconds

from collections.abc import Iterator, Sequence
import os
import re

from etils import epath
import jax

from terdit_jax.aot.program import lower_sample, lower_train
from terdit_jax.aot.report import describe, make_report
from terdit_jax.aot.suggest import describe_suggestions, suggest
from terdit_jax.aot.table import compare, make_tables
from terdit_jax.aot.topology import Topology, open_devices, parse_topology
from terdit_jax.config import RunConfig
from terdit_jax.config_file import read_config
from terdit_jax.errors import UserError, run_command
from terdit_jax.files import check_output, refusing, write_json
from terdit_jax.options import refuse_unused
from terdit_jax.parallel.mesh import AXES


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    if _TABLE.value:
        refuse_unused((_CONFIG, _TOPOLOGY, _MESH, _WHAT, _MODE, _BATCH_SIZE, _SUGGEST, _TRIES, _OUTPUT), "with --table")
        folder = epath.Path(_TABLE.value)
        print(compare(folder, epath.Path(_MEASURED.value)) if _MEASURED.value else make_tables(folder))
        return
    refuse_unused([_MEASURED], "without --table")
    config = read_config(_CONFIG)
    if config is None or not _TOPOLOGY.value:
        raise UserError(
            "--config and --topology are both needed, e.g. --config=configs/terdit_4b.py --topology=v5e:16x16"
        )
    if _OUTPUT.value:
        if not _OUTPUT.value.endswith(".json"):
            raise UserError(f"--output={_OUTPUT.value}: must end in .json")
        check_output(_OUTPUT.value, replace=True)
    if _WHAT.value == "train":
        refuse_unused((_MODE, _BATCH_SIZE), "with --what=train")
    else:
        refuse_unused([_MESH], "with --what=sample, where every chip holds the whole model")
    if not _SUGGEST.value:
        refuse_unused([_TRIES], "without --suggest")
    else:
        refuse_unused([_MESH], "with --suggest, which tries all meshes")
    topology = parse_topology(_TOPOLOGY.value)
    _be_on_cpu(topology)
    config = config.with_fields(dict(_mesh_sizes()))
    devices = open_devices(topology)

    def compile_one(config: RunConfig) -> dict:
        if _WHAT.value == "train":
            program = lower_train(config, topology, devices)
        else:
            program = lower_sample(config, topology, devices, _MODE.value, _BATCH_SIZE.value)
        return make_report(program, topology, devices)

    if _SUGGEST.value:
        if _WHAT.value != "train":
            raise UserError("--suggest is for --what=train: drawing has every chip hold the whole model")
        report = suggest(config, topology, compile_one, _TRIES.value)
        print(describe_suggestions(report))
    else:
        report = compile_one(config)
        print(describe(report))
    if _OUTPUT.value:
        with refusing(_OUTPUT.value):
            write_json(_OUTPUT.value, report, indent=1)


def _be_on_cpu(topology: Topology) -> None:
    """Compiling needs no accelerator, and must not take one that others use; `cpu:N` needs N devices."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    if topology.is_cpu:
        jax.config.update("jax_num_cpu_devices", topology.num_chips)


def _mesh_sizes() -> Iterator[tuple[str, int]]:
    """The fields of --mesh."""
    given = ",".join(_MESH.value or [])
    for part in given.split(",") if _MESH.present else []:
        axis, _, size = part.partition("=")
        if axis not in AXES or not re.fullmatch(r"-1|[0-9]{1,7}", size):
            raise UserError(f"--mesh={given}: give sizes of {', '.join(AXES)}, as data=2,fsdp=128")
        yield f"mesh.{axis}", int(size)


if __name__ == "__main__":
    run_command(main)
