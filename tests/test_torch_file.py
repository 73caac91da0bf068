"""Files of torch.save come back bit for bit, and damaged, hostile or other ones are refused in one line."""

import argparse
import os
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from terdit_jax.errors import UserError
from terdit_jax.interop.torch_file import load_checkpoint, load_namespace, load_state_dict

FORMATS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "older"])


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def save(torch, tmp_path):
    def save(value, is_zip=True):
        path = tmp_path / "a.pth"
        torch.save(value, path, _use_new_zipfile_serialization=is_zip)
        return path

    return save


@FORMATS
@pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16", "uint8", "int8", "int64", "bool"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 4), (1, 3, 1)])
def test_tensors_keep_their_bits_shape_and_dtype(torch, save, name, shape, is_zip):
    tensor = (10 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(getattr(torch, name))
    found = load_state_dict(save({"x": tensor}, is_zip))["x"]
    assert found.dtype == np.dtype(getattr(ml_dtypes, name, name)) and found.shape == shape
    np.testing.assert_array_equal(found.astype(np.float64), tensor.double().numpy())
    assert not found.flags.writeable


@FORMATS
def test_parameters_views_and_a_modules_buffers_are_read(torch, save, is_zip):
    whole = torch.arange(24.0)
    tensors = {
        "parameter": torch.nn.Parameter(torch.ones(2, 3)),
        "rows": whole[:12].reshape(4, 3)[1:3],
        "transposed": whole.reshape(2, 3, 4).permute(2, 0, 1),
        "every other": whole[::2],
        **torch.nn.BatchNorm1d(4).state_dict(),
    }
    found = load_state_dict(save(tensors, is_zip))
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor.detach().numpy())


@FORMATS
def test_a_namespace_is_read(save, is_zip):
    arguments = {"model": "DiT_Llama_600M", "image_size": 256, "nested": {"a": [1, 2.5, None, True, "é"]}}
    assert load_namespace(save(argparse.Namespace(**arguments), is_zip)) == arguments


def refusal(path, load=load_state_dict):
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 800
    return str(caught.value)


class _Runs:
    """An object of a hostile pickle, which makes a folder if it is run."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return os.mkdir, (str(self._path),)


@FORMATS
def test_code_is_refused_and_never_run(save, tmp_path, is_zip):
    for value, load in (({"x": _Runs(tmp_path / "ran")}, load_state_dict), (_Runs(tmp_path / "ran"), load_namespace)):
        assert "cannot be read as a file of torch.save" in refusal(save(value, is_zip), load)
    assert not (tmp_path / "ran").exists()


def test_every_flipped_byte_is_noticed_or_changes_nothing(torch, save):
    path = save({"x": torch.arange(6.0)})
    sound = path.read_bytes()
    for position in range(0, len(sound), 7):
        path.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
        try:
            np.testing.assert_array_equal(load_state_dict(path)["x"], np.arange(6))
        except UserError:
            pass
    with zipfile.ZipFile(save({"x": torch.arange(6.0)})) as archive:
        (numbers,) = [info for info in archive.infolist() if info.filename.endswith("data/0")]
    position = sound.index(np.arange(6, dtype=np.float32).tobytes())
    path.write_bytes(sound[:position] + b"\xff" + sound[position + 1 :])
    assert f"{numbers.filename!r} does not match its CRC-32" in refusal(path)


@FORMATS
@pytest.mark.parametrize(
    ("held", "ema", "number", "averaged"),
    [
        (("model", "ema"), True, 2, True),
        (("model", "ema"), False, 1, False),
        (("model",), True, 1, False),
        (("ema",), False, 2, True),
    ],
)
def test_a_training_checkpoint_gives_the_state_dict_asked_for(torch, save, is_zip, held, ema, number, averaged):
    numbers = {"model": torch.full((3,), 1.0), "ema": torch.full((3,), 2.0)}
    moments = {"state": {0: {"step": torch.tensor(4.0), "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}
    checkpoint = {name: {"x": numbers[name]} for name in held}
    checkpoint |= {"opt": moments, "args": argparse.Namespace(model="DiT-XL/2", epochs=1400)}
    arrays, found = load_checkpoint(save(checkpoint, is_zip), ema)
    assert found is averaged and list(arrays) == ["x"]
    np.testing.assert_array_equal(arrays["x"], np.full(3, number))


@FORMATS
def test_a_bare_state_dict_does_not_say_whether_it_is_averaged(torch, save, is_zip):
    arrays, averaged = load_checkpoint(save({"model.x": torch.ones(3), "ema_x": torch.ones(2)}, is_zip), True)
    assert averaged is None and list(arrays) == ["model.x", "ema_x"]


@FORMATS
def test_code_beside_a_state_dict_is_never_run(torch, save, tmp_path, is_zip):
    path = save({"model": {"x": torch.ones(3)}, "args": _Runs(tmp_path / "ran")}, is_zip)
    assert "cannot be read as a file of torch.save" in refusal(path, lambda path: load_checkpoint(path, True))
    assert not (tmp_path / "ran").exists()


def test_a_training_checkpoint_of_something_else_is_refused(torch, save):
    tensor = torch.zeros(1000)
    for value, message in (
        ({"model": tensor}, "its 'model': not a state dict"),
        ({"model": None, "opt": {}}, "its 'model': not a state dict"),
        ({"model": {"x": {"y": tensor}}}, "its 'model': 'x' is no dense tensor"),
        ({"ema": {str(i): tensor for i in range(10)}}, "its 'ema': its tensors share storages"),
        ([tensor], "not a state dict"),
        (tensor, "not a state dict"),
    ):
        assert message in refusal(save(value), lambda path: load_checkpoint(path, True))


@FORMATS
@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_a_file_that_is_cut_off_is_refused(torch, save, is_zip, share):
    path = save({"x": torch.zeros(1000)}, is_zip)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refusal(path)


def test_what_is_no_state_dict_is_refused(torch, save, tmp_path):
    tensor = torch.zeros(1000)
    assert "not a state dict" in refusal(save([tensor]))
    assert "not a state dict" in refusal(save({1: tensor}))
    assert "'x' is no dense tensor" in refusal(save({"x": {"y": tensor}}))
    assert "'x' is no dense tensor" in refusal(save({"x": tensor.to_sparse()}))
    assert "share storages" in refusal(save({str(i): tensor for i in range(10)}))
    assert "not an argparse.Namespace" in refusal(save({"x": tensor}), load_namespace)
    assert "No such file" in refusal(tmp_path / "missing.pth")


def test_without_pytorch_it_is_one_line_that_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pth").write_bytes(b"PK")
    assert "takes PyTorch: pip install 'terdit-jax[torch]'" in refusal(tmp_path / "a.pth")
