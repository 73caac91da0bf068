"""Compiles a program for a machine and reports on it: bytes a chip, FLOPs, collectives, the roofline.

Reports are plain dictionaries, the same in JSON; all sizes are bytes of one chip, all times seconds.
"""

from collections import defaultdict
from collections.abc import Iterator
import dataclasses
import datetime
import os
import platform
import re
import time
from typing import Any

import jax

from terdit_jax.aot.collectives import Collective, mesh_axes, read_collectives, sent_bytes
from terdit_jax.aot.costs import read_costs
from terdit_jax.aot.program import Program, saved_activations
from terdit_jax.aot.roofline import ASSUMPTIONS, Roofline, make_roofline, slowest_bandwidth
from terdit_jax.aot.topology import Topology
from terdit_jax.errors import UserError
from terdit_jax.parallel.chips import GIB
from terdit_jax.parallel.sharding import chip_bytes
from terdit_jax.versions import versions

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def make_report(program: Program, topology: Topology, devices: list[jax.Device]) -> dict:
    """Compiles the program and reports on it.

    Raises:
      UserError: the program does not fit the chip.
    """
    begin, begin_processor = time.perf_counter(), time.process_time()
    try:
        # A program for CPUs is only looked at: LLVM need not optimise it.
        compiled = program.lowered.compile({"xla_backend_optimization_level": "0"} if topology.is_cpu else None)
    except jax.errors.JaxRuntimeError as error:
        needed = _needed_bytes(str(error))
        if needed is None:
            raise
        raise _does_not_fit(program, topology, needed) from error
    seconds, processor_seconds = time.perf_counter() - begin, time.process_time() - begin_processor
    hlo = compiled.as_text() or ""
    costs, collectives = read_costs(hlo), read_collectives(hlo)
    number = {device: i for i, device in enumerate(devices)}
    places = [topology.place(number[device], device) for device in program.mesh.devices.flat]
    roofline = make_roofline(topology, costs, collectives, places)
    analysis = compiled.cost_analysis() or {}
    config = program.config
    report: dict[str, Any] = {
        "what": program.what,
        "config": config.name,
        "topology": topology.name,
        "chips": topology.num_chips,
        "mesh": dict(program.mesh.shape),
        "options": _options(program),
        "compiler_options": program.compiler_options,
        "images": program.images,
        "steps": program.steps,
        "memory": _memory(program, compiled.memory_analysis(), topology),
        "flops": {
            "model": program.model_flops / topology.num_chips,
            "compiled": sum(costs.flops.values()),
            "compiled_by_dtype": costs.flops,
            "cost_analysis_loops_once": analysis.get("flops"),
        },
        "memory_traffic": costs.memory_bytes,
        "collectives": list(_group(collectives, program, topology, places)),
        "sent": sent_bytes(collectives),
        "roofline": _speed(program, topology, roofline) if roofline else None,
        "assumptions": list(ASSUMPTIONS),
        "compile_seconds": round(seconds, 1),
        # Of all threads: what others on the machine leave out.
        "compile_processor_seconds": round(processor_seconds, 1),
        "compiled_on": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": _versions(topology),
        "date": datetime.date.today().isoformat(),
    }
    if report["memory"]["total"] > report["memory"]["limit"]:
        raise _does_not_fit(program, topology, report["memory"]["total"])
    return report


def _options(program: Program) -> dict:
    config = program.config
    options = {"attention": config.compute.attention, "dtype": config.compute.dtype}
    if program.what == "sample":
        return options | {"mode": program.mode, "cfg_scale": config.sample.cfg_scale, "method": config.sample.method}
    return options | {
        "remat": program.model.remat,
        "layers": program.plan.layers,
        "accumulation_steps": config.train.accumulation_steps,
        "grad_dtype": config.compute.grad_dtype,
        "gather": config.mesh.gather,
    }


def _memory(program: Program, stats: Any, topology: Topology) -> dict:
    held = {kind: chip_bytes(tree) for kind, tree in program.held.items()}
    # What the compiler adds to arguments is padding to its tiles.
    arguments = {**held, "padding": max(0, stats.argument_size_in_bytes - sum(held.values()))}
    outputs = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
    memory = {
        "arguments": arguments,
        "temporaries": stats.temp_size_in_bytes,
        "outputs": outputs,  # those that take no argument's place
        "program": stats.generated_code_size_in_bytes,
        "total": sum(arguments.values()) + stats.temp_size_in_bytes + outputs + stats.generated_code_size_in_bytes,
        "limit": topology.chip.memory,
    }
    if program.what == "train":
        # These two are among the temporaries.
        memory["saved_activations"] = saved_activations(program)
        memory["gradients"] = _gradient_bytes(program)
    return memory


def _gradient_bytes(program: Program) -> int:
    """Bytes of one set of gradients, cut like the parameters: ternary ones in `grad_dtype`, others in float32."""
    wide = 4 if program.config.train.accumulation_steps > 1 else None  # sums over microbatches are float32

    def size(path: tuple, leaf: jax.ShapeDtypeStruct) -> int:
        ternary = program.model.ternary and path[0].key == "blocks" and path[-1].key == "weight"
        width = wide or (2 if ternary and program.config.compute.grad_dtype == "bfloat16" else 4)
        return chip_bytes(leaf) // 4 * width

    return sum(size(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(program.held["parameters"]))


def _group(collectives: list[Collective], program: Program, topology: Topology, places: list) -> Iterator[dict]:
    """Collectives of one kind, dtype and mesh axes together, the largest first."""
    groups = defaultdict(list)
    for collective in collectives:
        groups[collective.kind, collective.dtype, mesh_axes(collective, program.mesh.shape)].append(collective)
    for (kind, dtype, axes), members in sorted(groups.items(), key=lambda item: -sent_bytes(item[1])):
        yield {
            "kind": kind,
            "dtype": dtype,
            "axes": list(axes),
            "runs": sum(c.trips for c in members),
            "bytes": sum(c.trips * c.bytes for c in members),
            "sent": sent_bytes(members),
            "seconds": sum(c.sent / slowest_bandwidth(topology, c, places) for c in members),
        }


def _speed(program: Program, topology: Topology, roofline: Roofline) -> dict:
    peak = topology.num_chips * topology.chip.peak_bf16
    images_per_second = program.images / roofline.overlapped
    speed = dataclasses.asdict(roofline) | {
        "bound": roofline.bound,
        "overlapped": roofline.overlapped,
        "in_turn": roofline.in_turn,
        "mfu_bound": program.model_flops / (peak * roofline.overlapped),
        "mfu_in_turn": program.model_flops / (peak * roofline.in_turn),
        "images_per_second": images_per_second,
    }
    if program.what == "sample":
        return speed | {"denoising_step": roofline.overlapped / program.steps}
    images = program.config.train.num_steps * program.config.train.batch_size
    return speed | {"images_to_train": images, "hours": images / images_per_second / 3600}


def _versions(topology: Topology) -> dict[str, str]:
    compiler = "jaxlib" if topology.is_cpu else "jax-cuda13-plugin" if topology.is_gpu else "libtpu"
    return versions("jax", "flax", compiler)


def _needed_bytes(message: str) -> float | None:
    """The bytes that a compiler which ran out of memory says it needs; None if its message says something else."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available|[Uu]sed ([\d.]+)([KMGT]) of", message)
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        return None
    number, unit = [group for group in found.groups() if group]
    return float(number) * _UNITS[unit]


def _does_not_fit(program: Program, topology: Topology, needed: float) -> UserError:
    mesh = ",".join(f"{axis}={size}" for axis, size in program.mesh.shape.items())
    return UserError(
        f"{program.config.name} does not fit {topology.name}: {needed / GIB:.2f} GiB a chip with mesh {mesh} and "
        f"remat={program.model.remat}, of {topology.chip.memory / GIB:.2f}: try --suggest"
    )


def describe(report: dict) -> str:
    """The report in lines for people."""
    memory, flops = report["memory"], report["flops"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    options = ", ".join(f"{name} {value}" for name, value in report["options"].items())
    xla = " ".join(f"{name}={value}" for name, value in report["compiler_options"].items())
    lines = [
        f"{report['config']}, {report['what']}, on {report['topology']}: {report['chips']} chips, mesh {mesh}, "
        f"{report['images']} images, {options}",
        f"compiled in {report['compile_seconds']:.0f} s, {report['compile_processor_seconds']:.0f} of processor time, "
        f"with {xla or 'no options'} of XLA",
        "bytes a chip:",
    ]
    rows = [*memory["arguments"].items(), *((name, memory[name]) for name in ("temporaries", "outputs", "program"))]
    for name, size in rows:
        lines.append(f"  {name:<24}{_size(size):>12}")
        if name == "temporaries" and "gradients" in memory:
            lines.append(f"    activations for backward {_size(memory['saved_activations']):>9} of a microbatch")
            lines.append(f"    gradients {_size(memory['gradients']):>24}")
    of = f" of {_size(memory['limit'])}" if report["roofline"] else ""
    lines.append(f"  {'total':<24}{_size(memory['total']):>12}{of}")
    lines.append(
        f"TFLOPs a chip: {flops['compiled'] / 1e12:.3f} compiled, {flops['model'] / 1e12:.3f} asked for; "
        f"memory traffic {_size(report['memory_traffic'])}"
    )
    lines.append(f"collectives, {_size(report['sent'])} sent by each chip:")
    for row in report["collectives"]:
        where = " x ".join(row["axes"]) or "none"
        lines.append(
            f"  {row['kind']:<20}{row['dtype']:<6}{where:<20}{row['runs']:>6} runs{_size(row['sent']):>12} sent"
            f"{row['seconds'] * 1e3:>10.2f} ms"
        )
    return "\n".join([*lines, *_describe_speed(report)])


def _describe_speed(report: dict) -> Iterator[str]:
    speed = report["roofline"]
    if speed is None:
        return
    yield (
        f"roofline: compute {speed['compute'] * 1e3:.1f} ms, memory {speed['memory'] * 1e3:.1f} ms, network "
        f"{speed['network'] * 1e3:.1f} ms; {speed['overlapped'] * 1e3:.1f} ms if all overlap ({speed['bound']} bound), "
        f"{speed['in_turn'] * 1e3:.1f} ms if nothing does"
    )
    if report["what"] == "sample":
        yield (
            f"at best: {speed['images_per_second']:,.2f} images/s, {speed['denoising_step'] * 1e3:.2f} ms a denoising "
            f"step of {report['images']} images"
        )
        return
    yield (
        f"at best: MFU {speed['mfu_bound']:.0%}, {speed['images_per_second']:,.1f} images/s, {speed['hours']:,.0f} "
        f"hours for {speed['images_to_train'] / 1e6:,.0f}M images"
    )


def _size(size: float) -> str:
    return f"{size / GIB:.3f} GiB" if size >= 2**20 else f"{size / 1024:.1f} KiB"
