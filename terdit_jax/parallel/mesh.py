"""The device mesh (data, fsdp, tensor): this module only arranges the devices.

How arrays lie on the mesh is said in `sharding`, how processes meet in `processes`.
"""

from collections.abc import Callable, Sequence
import functools
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
import numpy as np

from terdit_jax.config_sections import MeshConfig
from terdit_jax.errors import UserError
from terdit_jax.parallel.processes import check_devices
from terdit_jax.reproducible import pinned

AXES = ("data", "fsdp", "tensor")


def mesh_shape(mesh: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """The sizes of (data, fsdp, tensor), with one -1 replaced by what the others leave.

    Raises:
      UserError: sizes that are not positive, more than one -1, a product that is not the number of devices, or slices
        that do not divide `data`.
    """
    sizes = [mesh.data, mesh.fsdp, mesh.tensor]
    written = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"mesh ({written}): every axis takes a positive size, and at most one takes -1 (the rest)")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and num_devices % known == 0:
        sizes[sizes.index(-1)] = num_devices // known
    if math.prod(sizes) != num_devices:
        raise UserError(f"mesh ({written}) does not multiply out to the {num_devices} devices there are")
    data, fsdp, tensor = sizes
    if mesh.slices < 1 or data % mesh.slices:
        raise UserError(f"config.mesh.slices={mesh.slices} must divide mesh axis data={data}: slices share its batch")
    return data, fsdp, tensor


def make_mesh(mesh: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of all devices of all processes, or of those given.

    Slices (`mesh.slices`) follow each other along `data`, outside, and every other axis lies within one: what crosses
    the network between them is one sum of gradients, each device's part of them.

    Raises:
      UserError: as `mesh_shape` and `_slices` do.
    """
    if devices is None:
        check_devices()
        devices = jax.devices()
    data, *within = mesh_shape(mesh, len(devices))
    slices = _slices(devices, mesh.slices)
    # A torus whose dimensions the axes do not follow is split: 256 by 8 chips lie on 8 x 16 x 16 only so.
    grids = [
        mesh_utils.create_device_mesh((data // len(slices), *within), part, allow_split_physical_axes=True)
        for part in slices
    ]
    return Mesh(np.concatenate(grids), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: Sequence[jax.Device], count: int) -> list[list[jax.Device]]:
    """The devices of each slice: those that a TPU's own network joins; of others, as many parts in order of processes.

    Raises:
      UserError: TPUs that form another number of slices, or devices that do not divide evenly.
    """
    by_slice: dict[int, list[jax.Device]] = {}
    for device in devices:
        by_slice.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    if devices[0].platform == "tpu":
        if len(by_slice) != count:
            raise UserError(f"config.mesh.slices={count}, but the TPUs here form {len(by_slice)}: set it to that")
        parts = [by_slice[index] for index in sorted(by_slice)]
    else:
        size = len(devices) // count
        parts = [list(devices[i * size : (i + 1) * size]) for i in range(count)]
    if len({len(part) for part in parts}) != 1:
        raise UserError(f"the slices have {', '.join(str(len(part)) for part in parts)} devices: they must be equal")
    return parts


def fsdp_rings(mesh: Mesh) -> tuple[int, ...]:
    """The sizes of the rings of a TPU's torus that the mesh's fsdp axis goes through, the outermost first.

    A reduction that goes through them one by one sends half of what XLA makes of one over the whole axis. One ring
    where devices have no coordinates (GPUs, CPUs), or do not lie in such an order.
    """
    devices = mesh.devices[0, :, 0]
    if not all(hasattr(device, "core_on_chip") for device in devices):  # GPUs may have coordinates too
        return (len(devices),)
    places = np.array([(*device.coords, device.core_on_chip) for device in devices])
    rings: list[int] = []
    done = 1
    while done < len(devices):
        moves = places[done] != places[0]
        steps = places[::done]
        others = (steps[:, ~moves] == steps[0, ~moves]).all(axis=1)
        size = len(steps) if others.all() else int(np.argmin(others))
        if moves.sum() != 1 or len(devices) % (done * size):
            return (len(devices),)
        rings.insert(0, size)
        done *= size
    return tuple(rings) or (1,)


def on_mesh(mesh: Mesh, function: Callable) -> Callable:
    """The function called with the mesh in context, which sharding constraints need while it is traced, and pinned.

    `__wrapped__` is the function itself, for those who lower it.
    """

    @functools.wraps(function)
    def call(*args):
        with pinned(), jax.set_mesh(mesh):
            return function(*args)

    return call


def single_device_mesh() -> Mesh:
    """The mesh of this process's first device alone."""
    check_devices()
    return _data_mesh(jax.local_devices()[:1])


def local_mesh() -> Mesh:
    """The mesh of this process's devices, all of them along data: for work that processes share without talking."""
    check_devices()
    return _data_mesh(jax.local_devices())


def _data_mesh(devices: list[jax.Device]) -> Mesh:
    return jax.make_mesh((len(devices), 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
