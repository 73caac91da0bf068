"""Single rows of `benchmarks.scaling`, measured in this process: a training step, the losses of a run's first steps, a
set of pictures drawn. Which rows there are and how they compare is `benchmarks.scaling`'s.

A row's `turn` is called once everything is compiled and before anything is timed.
"""

from collections.abc import Callable
import dataclasses
import functools
import time

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from benchmarks.machine import load_changed
from benchmarks.random_codes import random_operands
from terdit_jax.aot.collectives import Collective, read_collectives, sent_bytes
from terdit_jax.config_sections import MeshConfig
from terdit_jax.diffusion.objective import Ddpm
from terdit_jax.fast.inference_pass import bind_schedule, make_inference_operands
from terdit_jax.fast.modes import choose_numerics
from terdit_jax.fast.plan import choose_plan
from terdit_jax.inference.sampling import draw_all, make_draw
from terdit_jax.model.config import DiTConfig
from terdit_jax.parallel.mesh import make_mesh
from terdit_jax.parallel.sharding import batch_sharding
from terdit_jax.training.optimizer import make_optimizer
from terdit_jax.training.state import State, abstract_state, make_state
from terdit_jax.training.step import make_train_step

_WARM_UP = 5  # a process's first collectives run several times slower
LOSSES = 20  # steps whose losses are compared


def measure(run: dict, steps: int, rounds: int, turn: Callable[[], object] = lambda: None) -> dict:
    """The training step, timed: state and batch as in training; data, logging and saving left out.

    Args:
      run: a row of `scaling.plan`.
      steps: in a round.
      rounds: of which the median counts.
      turn: waits for the devices.
    """
    job = _Job(run)
    turn()
    state, batch = job.start()
    for _ in range(_WARM_UP):
        state = job.step(state, batch)
    jax.block_until_ready(state)
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(steps):
            state = job.step(state, batch)
        jax.block_until_ready(state)
        seconds.append((time.perf_counter() - begin) / steps)
    sums = jax.device_get(state["window"]["sums"])
    return job.row() | {
        "seconds": float(np.median(seconds)),
        "seconds_of_rounds": seconds,
        "images_per_second": job.config.train.batch_size / float(np.median(seconds)),
        "sent": traffic(read_collectives(job.step.as_text())),
        "mean_loss": float(sums["loss"] / sums["steps"]),
        "finite_steps": int(sums["steps"]),
    }


def measure_losses(run: dict, turn: Callable[[], object] = lambda: None) -> dict:
    """The loss of each of the first steps, always of the same examples."""
    job = _Job(run)
    turn()
    state, batch = job.start()
    totals = [0.0]
    for _ in range(LOSSES):
        state = job.step(state, batch)
        totals.append(float(state["window"]["sums"]["loss"]))
    return job.row() | {"losses": np.diff(totals).tolist(), "finite_steps": int(state["window"]["sums"]["steps"])}


class _Job:
    """A compiled training step of a row, and what it starts from; makes no state before it is asked to."""

    def __init__(self, run: dict):
        self.run, self.config = run, load_changed(run["path"])
        self.devices = jax.devices()[: run["devices"]]
        mesh = {"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 1, "mesh.slices": 1, "mesh.gather": run["gather"]}
        mesh["mesh.data" if run["layout"] == "one" else f"mesh.{run['layout']}"] = len(self.devices)
        self.config = config = self.config.with_fields(
            {
                "train.batch_size": run["batch"] * len(self.devices),
                "train.accumulation_steps": run.get("accumulation", 1),
                "compute.remat": run["remat"] or self.config.compute.remat,
                **mesh,
            }
        )
        self.model, self.optimizer = DiTConfig.from_config(config), make_optimizer(config.optimizer)
        self.mesh = make_mesh(config.mesh, self.devices)
        plan = choose_plan(self.model, self.mesh)
        step = make_train_step(config, self.model, Ddpm(), self.optimizer, self.mesh, 1.0, plan)
        sharding = batch_sharding(self.mesh)
        shapes = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for name, leaf in _random_batch(self.model, config.train.batch_size).items()
        }
        begin = time.perf_counter()
        with jax.set_mesh(self.mesh):
            state = abstract_state(self.model, self.optimizer, self.mesh)
            self.step = step.__wrapped__.lower(state, shapes).compile()
        self.compile_seconds = time.perf_counter() - begin

    def start(self) -> tuple[State, dict]:
        """A fresh state and a batch."""
        state = make_state(self.model, self.optimizer, self.mesh, self.config.seed)
        batch = _random_batch(self.model, self.config.train.batch_size)
        return state, jax.device_put(batch, batch_sharding(self.mesh))

    def row(self) -> dict:
        """The fields that every row of training has."""
        return {
            **self.run,
            "config": self.config.name,
            "remat": self.config.compute.remat,
            "device_kind": self.devices[0].device_kind,
            "peak_gb": _peak_gb(self.devices[0]),
            "compile_seconds": self.compile_seconds,
        }


def measure_sampling(run: dict, turn: Callable[[], object] = lambda: None) -> dict:
    """`run["pictures"]` pictures of random codes drawn with guidance in `fast`, every device with the whole model.

    Args:
      run: a row of `scaling.plan`; `steps` of the schedule are drawn, which scale as more do.
      turn: waits for the devices.
    """
    config, devices = load_changed(run["path"]), jax.devices()[: run["devices"]]
    model = dataclasses.replace(DiTConfig.from_config(config), dtype="bfloat16", remat="none")
    settings = dataclasses.replace(config.sample, num_steps=run["steps"], cfg_scale=4.0)
    mesh = make_mesh(MeshConfig(data=len(devices)), devices)
    numerics = choose_numerics("fast", model, mesh)
    operands = _copied(make_inference_operands(model, numerics, random_operands(model)), mesh)
    draw = make_draw(model, Ddpm(), settings, functools.partial(bind_schedule, model, numerics))
    labels = np.arange(run["pictures"]) % model.num_classes
    batch_size = run["batch"] * len(devices)

    def pictures(labels: np.ndarray) -> tuple[np.ndarray, float]:
        begin = time.perf_counter()
        drawn = draw_all(draw, operands, labels, mesh, 0, batch_size=batch_size, report=lambda done: None)
        return drawn, time.perf_counter() - begin

    compile_seconds = pictures(labels[:batch_size])[1]
    turn()
    pictures(labels[:batch_size])
    drawn, seconds = pictures(labels)
    return {
        **run,
        "config": config.name,
        "device_kind": devices[0].device_kind,
        "seconds": seconds,
        "images_per_second": len(labels) / seconds,
        "finite": bool(np.isfinite(drawn).all()),
        "peak_gb": _peak_gb(devices[0]),
        "compile_seconds": compile_seconds,
    }


def _copied(operands: dict, mesh: Mesh) -> dict:
    return jax.block_until_ready(jax.device_put(operands, NamedSharding(mesh, PartitionSpec())))


def _peak_gb(device: jax.Device) -> float:
    return (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9


def _random_batch(model: DiTConfig, size: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shape = (size, *model.sample_shape)
    return {
        "mean": random.standard_normal(shape, np.float32).astype(np.float16),
        "std": np.zeros(shape, np.float16),
        "label": random.integers(0, model.num_classes, size).astype(np.int32),
    }


def traffic(collectives: list[Collective]) -> dict[str, float]:
    """Bytes that one device sends in a step: of gathers, of reductions, of anything else."""
    kinds = {"gathered": ("all-gather",), "reduced": ("all-reduce", "reduce-scatter")}
    sent = {name: sent_bytes(c for c in collectives if c.kind in among) for name, among in kinds.items()}
    return sent | {"other": sent_bytes(collectives) - sum(sent.values())}
