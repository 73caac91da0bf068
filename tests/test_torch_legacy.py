"""Files in PyTorch's older format come back bit for bit, and damaged ones are refused in one line."""

import io

import numpy as np
import pytest

from terdit_jax.errors import UserError
from terdit_jax.interop.torch_legacy import is_legacy, load_legacy_state_dict

torch = pytest.importorskip("torch")

TENSORS = {
    "w": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "half": torch.tensor([1.5, -2], dtype=torch.float16),
    "count": torch.tensor(7),
    "transposed": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4).permute(2, 0, 1),
    "none": torch.zeros(0, 3),
    "part": torch.arange(10, dtype=torch.float32)[4:8],
}


def saved(value, legacy=True):
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


@pytest.fixture
def refusal(tmp_path):
    def refuse(content):
        (tmp_path / "a.pth").write_bytes(content)
        with pytest.raises(UserError) as caught:
            load_legacy_state_dict(tmp_path / "a.pth")
        assert len(str(caught.value)) < 400 and str(caught.value).isprintable()
        return str(caught.value)

    return refuse


def test_tensors_are_read(tmp_path):
    (tmp_path / "a.pth").write_bytes(saved(TENSORS))
    assert is_legacy(tmp_path / "a.pth")
    found = load_legacy_state_dict(tmp_path / "a.pth")
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())
        assert found[name].dtype == tensor.numpy().dtype and not found[name].flags.owndata


def test_a_modules_state_dict_is_read(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    (tmp_path / "a.pth").write_bytes(saved(module.state_dict()))
    for name, array in load_legacy_state_dict(tmp_path / "a.pth").items():
        np.testing.assert_array_equal(array, module.state_dict()[name].numpy())


def test_todays_format_is_told_apart(tmp_path, refusal):
    assert "not a state dict in PyTorch's older format" in refusal(saved(TENSORS, legacy=False))
    assert not is_legacy(tmp_path / "a.pth")
    with pytest.raises(UserError, match="cannot read"):
        is_legacy(tmp_path / "none.pth")


def test_anything_but_tensors_is_refused(refusal):
    assert "asks for" in refusal(saved(io.BytesIO))
    assert "does not map names to tensors" in refusal(saved([1, 2]))
    assert "does not map names to tensors" in refusal(saved({"a": 1}))
    assert "outside its storage" in refusal(saved({"w": torch.zeros(1).expand(1000)}))
    assert "cannot read" in refusal(b"")
    assert "older format" in refusal(b"\x80\x02K\x01.")


def test_a_file_that_is_cut_off_is_refused(refusal):
    whole = saved(TENSORS)
    for size in (len(whole) - 1, len(whole) - 60, 300, 30):
        assert "older format" in refusal(whole[:size])


def test_strides_that_reach_outside_are_refused(refusal):
    """3 x 4 with strides 4 and 1 in a storage of 12; with 5 and 1 the last number is the fifteenth."""
    whole = saved({"w": TENSORS["w"]})
    strides = b"K\x04K\x01\x86"
    assert whole.count(strides) == 1
    assert "outside its storage" in refusal(whole.replace(strides, b"K\x05K\x01\x86"))


def test_a_storage_of_another_size_is_refused(refusal):
    """A tensor must not reach into its neighbour's storage."""
    whole = saved({"w": TENSORS["w"]})
    place = whole.rindex((12).to_bytes(8, "little"))
    assert "another size" in refusal(whole[:place] + (6).to_bytes(8, "little") + whole[place + 8 :])


def test_every_damaged_byte_of_the_pickles_is_read_or_refused(tmp_path):
    whole = saved({"w": TENSORS["w"]})
    for place in range(len(whole) - 56):
        (tmp_path / "a.pth").write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        try:
            load_legacy_state_dict(tmp_path / "a.pth")
        except UserError:
            pass
