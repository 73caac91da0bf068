"""Meshes over several slices, and the rings of a torus that an axis of the mesh goes through."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
from jax.sharding import Mesh
import numpy as np
import pytest

from terdit_jax.config_sections import MeshConfig
from terdit_jax.errors import UserError
from terdit_jax.parallel import mesh as mesh_module
from terdit_jax.parallel.mesh import AXES, fsdp_rings, make_mesh


@dataclasses.dataclass(frozen=True)
class Chip:
    """The attributes of a TPU that the order of a mesh depends on."""

    id: int
    coords: tuple[int, ...]
    core_on_chip: int = 0
    slice_index: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5p"


class Grid:
    """A mesh of chips that do not exist."""

    def __init__(self, devices):
        self.devices = np.empty(np.shape(devices), object)
        self.devices[...] = devices


def torus(*shape):
    chips = np.empty(shape, object)
    for number, place in enumerate(itertools.product(*map(range, shape))):
        chips[place] = Chip(number, place)
    return chips


@pytest.mark.parametrize(
    ("devices", "rings"),
    [
        (torus(4, 4, 4).reshape(1, 64, 1), (4, 4, 4)),
        (torus(16, 16).reshape(1, 256, 1), (16, 16)),
        (torus(4, 8, 2).reshape(4, 16, 1), (8, 2)),
        (torus(8, 4).transpose(1, 0).reshape(1, 32, 1), (4, 8)),
        (torus(2, 2).reshape(1, 1, 4), (1,)),
        (torus(4, 4).reshape(2, 8, 1), (2, 4)),  # a part of a ring is one too
        (torus(4, 4).ravel()[[0, 5, 2, 3, 4, 1, 6, 7]].reshape(1, 8, 1), (8,)),  # in no such order
        (torus(4, 4).ravel()[:6].reshape(1, 6, 1), (6,)),
    ],
)
def test_rings_of_a_torus(devices, rings):
    assert fsdp_rings(Grid(devices)) == rings


def test_devices_without_coordinates_or_a_torus_form_one_ring():
    assert fsdp_rings(Mesh(np.array(jax.devices()).reshape(2, 4, 1), AXES)) == (4,)
    gpus = np.array([SimpleNamespace(coords=(0, 0, i)) for i in range(8)])
    assert fsdp_rings(Grid(gpus.reshape(1, 8, 1))) == (8,)


def config_of(data, fsdp, tensor, slices):
    return MeshConfig(data=data, fsdp=fsdp, tensor=tensor, slices=slices)


def pod(slices, *shape):
    """Chips of several slices, shuffled as no order is promised."""
    chips = [
        Chip(1000 * index + number, place, slice_index=index)
        for index in range(slices)
        for number, place in enumerate(itertools.product(*map(range, shape)))
    ]
    np.random.default_rng(0).shuffle(chips)
    return chips


@pytest.fixture
def no_devices(monkeypatch):
    """`jax.sharding.Mesh` wants real devices; what is tested is their order."""
    monkeypatch.setattr(mesh_module, "Mesh", lambda grid, axes, axis_types: Grid(grid))


def test_slices_lie_along_data_and_all_else_within_one(no_devices):
    mesh = make_mesh(config_of(-1, 8, 2, 4), pod(4, 4, 4, 2))
    assert mesh.devices.shape == (8, 8, 2)
    slice_of = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    np.testing.assert_array_equal(slice_of, np.repeat(np.arange(4), 2)[:, None, None] * np.ones((1, 8, 2)))
    assert len({chip.id for chip in mesh.devices.flat}) == 128
    assert fsdp_rings(mesh) != (8,)  # it goes through a slice's torus


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (config_of(-1, 16, 1, 1), pod(2, 4, 4, 1), "slices=1, but the TPUs here form 2"),
        (config_of(-1, 16, 1, 2), pod(1, 4, 4, 2), "slices=2, but the TPUs here form 1"),
        (config_of(2, 4, 1, 2), pod(2, 2, 2, 2)[:8], "devices: they must be equal"),
        (config_of(1, 32, 1, 2), pod(2, 4, 4, 1), "slices=2 must divide mesh axis data=1"),
        (config_of(-1, 16, 1, 0), pod(1, 4, 4, 2), "slices=0 must divide"),
    ],
)
def test_slices_that_cannot_be_are_refused(no_devices, config, devices, message):
    with pytest.raises(UserError, match=message):
        make_mesh(config, devices)


def test_other_devices_are_cut_in_order():
    mesh = make_mesh(config_of(4, 2, 1, 2))
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    assert sorted(ids[:2].ravel()) == [0, 1, 2, 3] and sorted(ids[2:].ravel()) == [4, 5, 6, 7]
