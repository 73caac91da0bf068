"""Which numbers a mode computes in, on devices that are here and on such as are not."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from terdit_jax.choices import MODES
from terdit_jax.config_sections import MeshConfig
from terdit_jax.errors import UserError
from terdit_jax.fast.modes import Numerics, choose_numerics
from terdit_jax.parallel.mesh import make_mesh, single_device_mesh
from tests.deployed import small_config

GPU = {"platform": "gpu", "compute_capability": "9.0", "memory_stats": lambda: {"bytes_limit": 2**37}}
FP8 = Numerics("float8_e4m3fn", "float8_e4m3fn", "bfloat16", attention="cudnn")
CPU = {"platform": "cpu"}
TPU = {"platform": "tpu", "memory_stats": lambda: {"bytes_limit": 2**34}}


def mesh_of(device: dict, **axes) -> SimpleNamespace:
    shape = {"data": 1, "fsdp": 1, "tensor": 1, **axes}
    return SimpleNamespace(devices=np.array([[[SimpleNamespace(**device)]]]), shape=shape)


def wide_config(**overrides):
    return small_config(hidden_size=256, num_heads=4, ffn_multiple_of=256, dtype="bfloat16", **overrides)


@pytest.mark.parametrize(
    ("device", "mode", "expected"),
    [
        (GPU, "exact", Numerics("bfloat16", "bfloat16", "bfloat16", kernels=True, attention="cudnn")),
        (GPU, "auto", Numerics("bfloat16", "bfloat16", "bfloat16", kernels=True, attention="cudnn")),
        (GPU, "fast", Numerics("float8_e4m3fn", "float8_e4m3fn", "bfloat16", kernels=True, attention="cudnn")),
        (GPU, "small", Numerics("packed", "float8_e4m3fn", "bfloat16", kernels=True, attention="cudnn")),
        (GPU, "small_exact", Numerics("packed", "bfloat16", "bfloat16", kernels=True, attention="cudnn")),
        (
            GPU | {"compute_capability": "8.9"},
            "fast",
            Numerics("float8_e4m3fn", "float8_e4m3fn", "bfloat16", attention="cudnn"),
        ),
        (GPU | {"compute_capability": "8.0"}, "fast", Numerics("int8", "int8", "int32", attention="cudnn")),
        (TPU, "fast", Numerics("int8", "int8", "int32")),
        (TPU, "small", Numerics("packed", "int8", "int32")),
        (CPU, "auto", Numerics("packed", "bfloat16", "float32", attention="cpu")),
        (CPU, "exact", Numerics("bfloat16", "bfloat16", "float32", attention="cpu")),
        (CPU, "fast", Numerics("float8_e4m3fn", "float8_e4m3fn", "bfloat16")),
    ],
)
def test_each_device_has_its_numbers(device, mode, expected):
    assert choose_numerics(mode, wide_config(), mesh_of(device)) == expected


def test_auto_keeps_two_bits_where_sixteen_do_not_fit():
    full = GPU | {"memory_stats": lambda: {"bytes_limit": 2**20}}
    assert choose_numerics("auto", wide_config(), mesh_of(full)).weights == "packed"


def test_auto_is_the_forward_pass_of_training_where_modes_end():
    assert choose_numerics("auto", small_config(), single_device_mesh()) is None
    assert choose_numerics("auto", wide_config(ternary=False), mesh_of(GPU, fsdp=2)) is None
    assert choose_numerics("auto", wide_config(), mesh_of(GPU, fsdp=2)) is None
    assert choose_numerics("auto", wide_config(), mesh_of(GPU, data=2)) is not None
    assert choose_numerics("plain", wide_config(), mesh_of(GPU)) is None


def test_kernels_are_for_rows_that_they_can_cut():
    narrow = small_config(hidden_size=192, num_heads=4, ffn_multiple_of=256, dtype="bfloat16")
    assert not choose_numerics("exact", narrow, mesh_of(GPU)).kernels


def test_full_precision_is_exact_or_plain():
    exact = choose_numerics("exact", wide_config(), mesh_of(GPU))
    for mode in ("auto", "exact"):
        assert choose_numerics(mode, wide_config(ternary=False), mesh_of(GPU)) == exact
    for mode in ("fast", "small", "small_exact"):
        with pytest.raises(UserError, match=f"mode {mode}: is of ternary models"):
            choose_numerics(mode, small_config(ternary=False), single_device_mesh())


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("auto", "plain")])
def test_modes_that_a_mesh_cannot_have(mode):
    cut = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with pytest.raises(UserError, match=f"mode {mode}: needs whole matrices .* fsdp=2, tensor=2"):
        choose_numerics(mode, small_config(), cut)


def test_a_mode_that_there_is_not():
    with pytest.raises(UserError, match="mode 'quick': choose one of auto, exact, fast, small, small_exact"):
        choose_numerics("quick", small_config(), jax.sharding.Mesh(jax.devices()[:1], ("data",)))
