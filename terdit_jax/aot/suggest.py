"""Meshes, remat policies and microbatches for a run on a machine: all that divide, those that should fit, the best of
them compiled and ranked.

Compiling takes minutes, so estimates choose what is compiled; only what has been compiled is ranked.
"""

from collections.abc import Callable, Iterator
import dataclasses
import itertools
import math

import jax
from jax.sharding import AbstractMesh

from terdit_jax.aot.program import activation_bytes
from terdit_jax.aot.topology import Topology
from terdit_jax.config import RunConfig
from terdit_jax.errors import UserError
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.transformer import abstract_params
from terdit_jax.parallel.chips import GIB
from terdit_jax.parallel.mesh import AXES
from terdit_jax.parallel.sharding import abstract_sharded, batch_shards, chip_bytes
from terdit_jax.training.setup import check_division

REMATS = ("none", "dots", "block")
ACCUMULATIONS = (1, 2, 4, 8)

_HEADROOM = 0.9  # of memory: estimates leave out what the compiler needs besides
_STATE_COPIES = 4  # parameters, two moments, EMA


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to run, with estimates: bytes of one chip, seconds of arithmetic and communication."""

    mesh: tuple[int, int, int]
    remat: str
    accumulation: int
    memory: float
    seconds: float

    def apply(self, config: RunConfig) -> RunConfig:
        """A copy of the configuration that runs this way."""
        sizes = {f"mesh.{axis}": size for axis, size in zip(AXES, self.mesh, strict=True)}
        return config.with_fields({**sizes, "compute.remat": self.remat, "train.accumulation_steps": self.accumulation})


def suggest(config: RunConfig, topology: Topology, compile_one: Callable[[RunConfig], dict], tries: int) -> dict:
    """Compiles the `tries` most promising candidates.

    Args:
      compile_one: makes the report of a configuration, or raises UserError where it does not fit.

    Returns:
      candidates, fitting: how many divide, and how many of those should fit; tried: reports in short, the fastest that
      fits first.

    Raises:
      UserError: nothing divides, nothing should fit, or CPUs, whose rates are not known.
    """
    if topology.is_cpu:
        raise UserError(f"--suggest on {topology.name}: the rates of CPUs are not known; give a TPU or h200:N")
    candidates = list(find_candidates(config, topology))
    if not candidates:
        batch_size = config.train.batch_size
        raise UserError(
            f"{config.name} with batch size {batch_size} divides over no mesh of {topology.num_chips} chips"
        )
    limit = _HEADROOM * topology.chip.memory
    fitting = sorted((c for c in candidates if c.memory <= limit), key=lambda c: (c.seconds, c.memory))
    if not fitting:
        least = min(c.memory for c in candidates)
        raise UserError(
            f"{config.name} does not fit {topology.name}: at least {least / GIB:.2f} GiB a chip by estimate, "
            f"of {topology.chip.memory / GIB:.2f}"
        )
    tried = [_try(candidate, config, compile_one) for candidate in fitting[:tries]]
    tried.sort(key=lambda row: (not row["fits"], row.get("in_turn", math.inf)))
    return {
        "config": config.name,
        "topology": topology.name,
        "images": config.train.batch_size,
        "candidates": len(candidates),
        "fitting": len(fitting),
        "tried": tried,
    }


def find_candidates(config: RunConfig, topology: Topology) -> Iterator[Candidate]:
    """Everything that divides, with its estimates."""
    model = DiTConfig.from_config(config)
    activations = {
        remat: activation_bytes(dataclasses.replace(model, remat=remat), diffusion=config.diffusion) for remat in REMATS
    }
    shapes = abstract_params(model)
    for shape in _meshes(topology.num_chips):
        mesh = AbstractMesh(shape, AXES)
        for accumulation in ACCUMULATIONS:
            trial = Candidate(shape, config.compute.remat, accumulation, 0, 0).apply(config)
            try:
                check_division(trial, model, mesh)
                params = abstract_sharded(shapes, mesh)
            except UserError:
                continue
            for remat in REMATS:
                candidate = Candidate(shape, remat, accumulation, 0, 0)
                yield dataclasses.replace(
                    candidate,
                    memory=_memory(trial, candidate, mesh, params, activations, model.depth),
                    seconds=_seconds(trial, candidate, topology, model, params),
                )


def _meshes(num_chips: int) -> Iterator[tuple[int, int, int]]:
    divisors = [size for size in range(1, num_chips + 1) if num_chips % size == 0]
    for fsdp, tensor in itertools.product(divisors, divisors):
        if num_chips % (fsdp * tensor) == 0:
            yield num_chips // (fsdp * tensor), fsdp, tensor


def _memory(
    config: RunConfig, candidate: Candidate, mesh: AbstractMesh, params: dict, activations: dict[str, int], depth: int
) -> float:
    """State, gradients, what a microbatch saves, and one layer at work."""
    tensor = candidate.mesh[2]
    images = config.train.batch_size // (candidate.accumulation * batch_shards(mesh))
    whole = sum(leaf.size for leaf in jax.tree.leaves(params["blocks"]))
    # A layer at work: its weights for the matmul and their gradient, both 16 bits and gathered, and all it computes.
    layer = whole / depth / tensor * 4 + images * activations["none"] / depth
    gradients = chip_bytes(params) / 4 * (4 if candidate.accumulation > 1 else 2)
    return _STATE_COPIES * chip_bytes(params) + gradients + images * activations[candidate.remat] + layer


def _seconds(config: RunConfig, candidate: Candidate, topology: Topology, model: DiTConfig, params: dict) -> float:
    """Arithmetic at its peak, then what the axes send at the bandwidth that their share of the machine has."""
    data, fsdp, tensor = candidate.mesh
    passes = {"none": 3, "dots": 3, "block": 4}[candidate.remat]
    batch = config.train.batch_size
    compute = passes * model.flops_per_image() * batch / topology.num_chips / topology.chip.peak_bf16
    weights = sum(leaf.size for leaf in jax.tree.leaves(params["blocks"])) / tensor
    gathered = weights * (0.25 if model.ternary else 2) * 2  # 2-bit codes, forward and backward
    reduced = weights * 2
    by_axis = {
        "fsdp": (gathered + reduced) * candidate.accumulation * (fsdp - 1) / fsdp,
        "data": 2 * reduced / fsdp * candidate.accumulation * (data - 1) / data,
        # Two sums of the residual stream a layer and pass over it.
        "tensor": 2 * (tensor - 1) / tensor * 2 * passes * model.depth
        * batch / (data * fsdp) * model.num_tokens * model.hidden_size * 2,
    }  # fmt: skip
    sizes = dict(zip(AXES, candidate.mesh, strict=True))
    return compute + sum(sent / _bandwidth(topology, sizes[axis]) for axis, sent in by_axis.items() if sent)


def _bandwidth(topology: Topology, size: int) -> float:
    """Bytes/s of an axis: its share, in doublings, of the torus's dimensions; of GPUs, NVLink within a node only."""
    chip = topology.chip
    if not chip.torus_dims:
        return chip.port_bandwidth if size <= chip.node_size else chip.node_size * chip.network_bandwidth
    whole = 2 * chip.torus_dims * chip.port_bandwidth
    return max(chip.port_bandwidth, whole * math.log2(size) / math.log2(topology.num_chips))


def _try(candidate: Candidate, config: RunConfig, compile_one: Callable[[RunConfig], dict]) -> dict:
    row = {
        "mesh": dict(zip(AXES, candidate.mesh, strict=True)),
        "remat": candidate.remat,
        "accumulation_steps": candidate.accumulation,
        "estimated_memory": candidate.memory,
        "estimated_seconds": candidate.seconds,
    }
    try:
        report = compile_one(candidate.apply(config))
    except UserError as error:
        return row | {"fits": False, "reason": str(error)}
    speed = ("overlapped", "in_turn", "bound", "mfu_bound", "images_per_second", "hours")
    return row | {
        "fits": True,
        "memory": report["memory"]["total"],
        "sent": report["sent"],
        **{name: report["roofline"][name] for name in speed},
    }


def describe_suggestions(result: dict) -> str:
    """The ranking in lines for people."""
    lines = [
        f"{result['config']} on {result['topology']}, {result['images']} images: {result['candidates']} ways divide, "
        f"{result['fitting']} should fit, {len(result['tried'])} compiled; the fastest first, ranked by the roofline "
        "if nothing overlaps"
    ]
    for row in result["tried"]:
        mesh = ",".join(f"{axis}={size}" for axis, size in row["mesh"].items())
        way = f"{mesh:<30} remat={row['remat']:<6} accumulation_steps={row['accumulation_steps']}"
        if row["fits"]:
            lines.append(
                f"{way}  {row['memory'] / GIB:7.2f} GiB  {row['in_turn'] * 1e3:8.1f} ms in turn  "
                f"{row['overlapped'] * 1e3:8.1f} ms overlapped"
            )
        else:
            lines.append(f"{way}  {row['reason']}")
    return "\n".join(lines)
