"""Programs compiled ahead of time: the report's sums on eight CPU devices, bad input, and the real targets (slow)."""

import dataclasses
import importlib.util
import json

import jax
import pytest

from terdit_jax.aot.program import lower_sample, lower_train, saved_activations
from terdit_jax.aot.report import describe, make_report
from terdit_jax.aot.topology import open_devices, parse_topology
from terdit_jax.config import freeze
from terdit_jax.errors import UserError
from terdit_jax.interop.exports import export
from terdit_jax.model.transformer import count_params
from terdit_jax.parallel.sharding import chip_bytes
from tests.deployed import random_weights, small_config
from tests.runs import ROOT, SHRUNKEN, execute


def shipped(name, fields):
    """A configuration of configs/, with fields of its own; __ stands for a dot."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    changes = {field.replace("__", "."): value for field, value in fields.items()}
    return freeze(module.get_config()).with_fields(changes)


def lower(what="train", topology="cpu:8", **overrides):
    machine = parse_topology(topology)
    config = shipped("digits", SHRUNKEN | overrides)
    if what == "train":
        return lower_train(config, machine, open_devices(machine))
    return lower_sample(config, machine, open_devices(machine), "small_exact", 4)


@pytest.fixture(scope="module")
def train_report():
    program = lower(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    machine = parse_topology("cpu:8")
    return program, make_report(program, machine, open_devices(machine))


def test_what_a_chip_holds(train_report):
    program, report = train_report
    arguments, memory = report["memory"]["arguments"], report["memory"]
    assert arguments["moments"] == pytest.approx(2 * arguments["parameters"], abs=16)  # and two counters
    assert arguments["EMA"] == arguments["parameters"]
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(program.held["parameters"]))
    assert whole / 4 <= arguments["parameters"] < whole / 2, "matrices are cut by fsdp and tensor, norms are not"
    # Sixteen images over data and fsdp, two float16 latents of 8 x 8 and a label each.
    assert arguments["batch"] == 16 // 4 * (2 * 2 * 64 + 4)
    assert memory["total"] == sum(arguments.values()) + memory["temporaries"] + memory["outputs"] + memory["program"]
    assert arguments["padding"] < 0.01 * memory["total"] and memory["outputs"] < 0.01 * memory["total"]


def test_flops_are_those_of_the_model(train_report):
    program, report = train_report
    assert report["flops"]["model"] == 3 * 16 * program.model.flops_per_image() / 8
    # Every chip computes the conditioning of its images, shared by `tensor`: a little more than an even share.
    assert 1 <= report["flops"]["compiled"] / report["flops"]["model"] < 1.5


def test_collectives_have_bytes_and_axes(train_report):
    _, report = train_report
    rows = report["collectives"]
    assert {axis for row in rows for axis in row["axes"]} == {"data", "fsdp", "tensor"}
    assert all(row["axes"] and row["bytes"] > 0 and row["runs"] > 0 for row in rows)
    assert report["sent"] == pytest.approx(sum(row["sent"] for row in rows)) and report["roofline"] is None


def test_a_report_is_json_and_reads_as_text(train_report):
    _, report = train_report
    assert json.loads(json.dumps(report)) == report
    text = describe(report)
    for part in ("parameters", "moments", "EMA", "temporaries", "mesh data 2, fsdp 2, tensor 2", "all-reduce"):
        assert part in text


def test_activations_saved_depend_on_the_remat_policy_and_the_microbatch(train_report):
    program = train_report[0]

    def saved(remat):
        return saved_activations(dataclasses.replace(program, model=dataclasses.replace(program.model, remat=remat)))

    assert saved("none") > saved("dots") > saved("block") > 0
    program = dataclasses.replace(program, config=program.config.with_fields({"train.accumulation_steps": 2}))
    assert saved("none") == train_report[1]["memory"]["saved_activations"] // 2


def test_a_teacher_is_counted_with_what_a_chip_holds_and_computes(tmp_path, train_report):
    model = small_config(ternary=False, input_size=8, in_channels=1, patch_size=4, num_heads=4)
    export(random_weights(model), tmp_path / "teacher.safetensors", "safetensors")
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    program, machine = lower(train__teacher=str(tmp_path / "teacher.safetensors"), **mesh), parse_topology("cpu:8")
    report, (_, without) = make_report(program, machine, open_devices(machine)), train_report
    held = report["memory"]["arguments"]["teacher"]
    assert 4 * model.num_params / 4 <= held < 4 * model.num_params / 2, "cut by fsdp and tensor"
    assert report["flops"]["model"] == without["flops"]["model"]
    more = report["flops"]["compiled"] - without["flops"]["compiled"]
    assert 1 <= more / (16 * model.flops_per_image() / 8) < 1.5
    with pytest.raises(UserError, match="config.train.teacher=/nowhere: /nowhere does not exist"):
        lower(train__teacher="/nowhere")


def test_drawing_counts_every_denoising_step_and_both_halves_of_guidance():
    program, machine = lower("sample", sample__cfg_scale=4.0, sample__num_steps=5), parse_topology("cpu:8")
    assert (program.images, program.steps) == (32, 5)
    report = make_report(program, machine, open_devices(machine))
    assert report["flops"]["model"] == 2 * 5 * 4 * program.model.flops_per_image()
    assert 0.9 < report["flops"]["compiled"] / report["flops"]["model"] < 1.5
    packed = sum(leaf.size for leaf in jax.tree.leaves(program.held["weights"]) if leaf.dtype == "uint8")
    assert 0 < packed < report["memory"]["arguments"]["weights"] == chip_bytes(program.held["weights"])


def test_a_step_is_compiled_with_the_options_of_its_run(monkeypatch):
    fast = "--xla_backend_optimization_level=0"
    assert lower(train__compiler_options=fast).compiler_options == {"xla_backend_optimization_level": "0"}
    with pytest.raises(UserError, match="No such compile option: 'xla_no_such'"):
        lower(train__compiler_options="--xla_no_such=1")
    monkeypatch.setattr("terdit_jax.aot.program.check_options", lambda options, device: None)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_no_such'"):
        lower(train__compiler_options="--xla_no_such=1").lowered.compile()


class FullChip:
    """A program whose compiler finds that it does not fit."""

    def compile(self, options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm. Exceeded hbm by 4.75G.")


def test_a_chip_that_is_too_small_is_one_line(train_report):
    program = dataclasses.replace(train_report[0], lowered=FullChip())
    message = r"digits does not fit v5e:2x4: 20.50 GiB a chip with mesh data=2,fsdp=2,tensor=2 and remat=none, of 15.75"
    with pytest.raises(UserError, match=message):
        make_report(program, parse_topology("v5e:2x4"), jax.devices())


def test_running_out_of_memory_is_read_from_the_compiler_s_words():
    from terdit_jax.aot.report import _needed_bytes

    hbm = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (240.00G) exceeds available HBM (15.75G)."
    assert _needed_bytes(hbm) == 240 * 2**30
    assert _needed_bytes("RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm. Exceeded hbm by 4.75G.") == 20.5 * 2**30
    assert _needed_bytes("INTERNAL: something (2.00G) exceeds available patience") is None


TERDIT = "--config=configs/terdit_4b.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([TERDIT], "--config and --topology are both needed"),
        ([TERDIT, "--topology=v7:4x4"], "no chip 'v7' is known"),
        ([TERDIT, "--topology=cpu:8", "--mesh=data=3"], "does not multiply out to the 8 devices"),
        ([TERDIT, "--topology=cpu:8", "--mesh=pipeline=8"], "give sizes of data, fsdp, tensor"),
        ([TERDIT, "--topology=cpu:8", "--config.train.batch_size=100"], "batch_size=100 is not divisible"),
        ([TERDIT, "--topology=cpu:512"], "mesh axis fsdp=512 does not divide dimension"),
        ([TERDIT, "--topology=cpu:1", "--what=sample", "--mode=tiny"], "mode"),
        ([TERDIT, "--topology=cpu:1", "--output=x", "v5e"], "unexpected argument 'v5e'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, arguments, message):
    out, err = execute("compile", *arguments, status=2)
    (line,) = [line for line in err.splitlines() if line.strip()]
    assert line.startswith("error: ") and message in line and not out


def test_the_command_writes_its_report(tmp_path):
    fields = [f"--config.{name}={value}" for name, value in (SHRUNKEN | {"model.depth": 1}).items()]
    output = tmp_path / "report.json"
    arguments = ["--config=configs/digits.py", "--topology=cpu:2", f"--output={output}", "--mesh=data=1,fsdp=2"]
    out, _ = execute("compile", *arguments, *fields)
    report = json.loads(output.read_text())
    assert report["mesh"] == {"data": 1, "fsdp": 2, "tensor": 1} and report["chips"] == 2
    assert out.splitlines()[0].startswith("digits, train, on cpu:2: 2 chips, mesh data 1, fsdp 2, tensor 1")


def need_compiler(topology):
    module = "jax_cuda13_plugin" if topology.startswith("h200") else "libtpu"
    pytest.importorskip(module, reason=f"the compiler for {topology} is not installed: pip install 'terdit-jax[aot]'")


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x4", "v5p:2x2x2", "v6e:2x4", "h200:8"])
def test_real_targets(tmp_path, topology):
    """At the widths of 4.2B, two layers of it."""
    need_compiler(topology)
    output = tmp_path / "report.json"
    fields = ["--config.model.depth=2", "--config.train.batch_size=64", "--config.compute.remat=block"]
    execute("compile", TERDIT, f"--topology={topology}", f"--output={output}", *fields)
    report = json.loads(output.read_text())
    again = 4 / 3  # the forward pass runs twice
    assert report["flops"]["compiled"] == pytest.approx(again * report["flops"]["model"], rel=0.06)
    assert 0 < report["roofline"]["mfu_bound"] <= 0.78
    assert report["memory"]["total"] < report["memory"]["limit"]


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5p:4x4x4", "h200:8"])
def test_the_step_of_4b_gathers_two_bits_a_ternary_parameter(topology):
    """terdit_4b as shipped, 32 layers and 512 images, beside the same with codes that travel in bfloat16."""
    need_compiler(topology)
    machine = parse_topology(topology)
    devices = open_devices(machine)
    bits, sent = {}, {}
    for gather in ("codes", "bfloat16"):
        program = lower_train(shipped("terdit_4b", {"mesh.gather": gather}), machine, devices)
        report = make_report(program, machine, devices)
        # All gathers there are, of embedders and norms too. A chip receives all but its own part, twice a step.
        gathered = sum(row["sent"] for row in report["collectives"] if row["kind"] == "all-gather")
        received = 2 * count_params(program.model)["ternary"] * (1 - 1 / machine.num_chips)
        bits[gather], sent[gather] = 8 * gathered / received, report["sent"]
    # Unrolled, as on GPUs, the codes of all layers' adaLN, 14% of the parameters, are gathered once for both passes.
    once = 0.93 if machine.is_gpu else 1.0
    assert 1.99 * once < bits["codes"] <= 2.1 and 15.9 * once < bits["bfloat16"] < 16.1
    assert sent["bfloat16"] / sent["codes"] >= 2.2
