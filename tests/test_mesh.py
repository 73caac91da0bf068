"""The rings of a torus that an axis of the mesh goes through, from the devices' coordinates."""

import dataclasses
import itertools

import jax
from jax.sharding import Mesh
import numpy as np
import pytest

from terdit_jax.parallel.mesh import AXES, fsdp_rings


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a TPU as the order of a mesh depends on."""

    id: int
    coords: tuple[int, ...]
    core_on_chip: int = 0


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


def test_devices_without_coordinates_form_one_ring():
    assert fsdp_rings(Mesh(np.array(jax.devices()).reshape(2, 4, 1), AXES)) == (4,)
