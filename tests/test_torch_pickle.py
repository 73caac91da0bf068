"""Files of torch.save come back bit for bit, and a pickle that asks for anything else is refused and never run."""

import argparse
import os
from pathlib import Path
import struct

import forged_torch
import ml_dtypes
import numpy as np
import pytest
from torch_files import (
    BUILD,
    NEWOBJ,
    PROTO,
    STOP,
    call,
    members,
    name,
    namespace,
    state_dict,
    tensor,
    tensor_of,
    text,
    torch_file,
    value,
    zip_of,
)

from terdit_jax.errors import UserError
from terdit_jax.interop.torch_pickle import MAX_INDEX_BYTES, MAX_INSTRUCTIONS, load_namespace, load_state_dict

ARRAYS = {
    "layers.0.w": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(5, dtype=np.uint8),
    "half": np.array([1.5, -2], np.float16),
    "bfloat16": np.array([[1.5], [-2]], ml_dtypes.bfloat16),
    "double": np.array(3.25),
    "none": np.zeros((0, 3), np.float32),
}
ONE = {"w": np.arange(12, dtype=np.float32).reshape(3, 4)}


def refusal(path, content, load=load_state_dict):
    """The one line with which a file is refused, without its name."""
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 400
    return message.removeprefix(f"{path}: ").replace(str(path), "FILE")


def refused_program(path, program, load=load_state_dict):
    return refusal(path, torch_file(program, ONE.values()), load)


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for key, array in expected.items():
        assert (actual[key].dtype, actual[key].shape) == (array.dtype, array.shape), key
        assert actual[key].tobytes() == array.tobytes(), key


def test_a_file_written_by_hand_is_read(tmp_path):
    (tmp_path / "a.pth").write_bytes(torch_file(state_dict(ARRAYS), ARRAYS.values()))
    assert_same(load_state_dict(tmp_path / "a.pth"), ARRAYS)


def test_a_storage_may_be_larger_than_what_is_read_at_once(tmp_path):
    arrays = {"x": np.arange(MAX_INDEX_BYTES, dtype=np.uint16).view(np.float16)}
    (tmp_path / "a.pth").write_bytes(torch_file(state_dict(arrays), arrays.values()))
    assert_same(load_state_dict(tmp_path / "a.pth"), arrays)


def test_arrays_are_views_of_the_file_and_cannot_be_written(tmp_path):
    (tmp_path / "a.pth").write_bytes(torch_file(state_dict(ONE), ONE.values()))
    array = load_state_dict(tmp_path / "a.pth")["w"]
    assert not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 2


def test_attributes_come_as_plain_data(tmp_path):
    attributes = {"a": 1, "b": "é", "c": None, "d": True, "e": 2.5, "f": [1, (2, "x")], "g": {"h": -3}, "i": 1 << 70}
    (tmp_path / "a.pth").write_bytes(torch_file(namespace(attributes)))
    assert load_namespace(tmp_path / "a.pth") == attributes


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def save(torch, path, item):
    torch.save(item, path)
    return path


@pytest.mark.parametrize(
    "name", ["float32", "float64", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool"]
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 0, 4), (1, 3, 1)])
def test_tensors_of_torch_are_read(torch, tmp_path, name, shape):
    tensor = (10 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(getattr(torch, name))
    loaded = load_state_dict(save(torch, tmp_path / "a.pth", {"x": tensor}))["x"]
    assert (loaded.dtype.name, loaded.shape) == (name, shape)
    np.testing.assert_array_equal(loaded.astype(np.float64), tensor.double().numpy())


def test_parameters_and_views_of_torch_are_read(torch, tmp_path):
    whole = torch.arange(24.0)
    tensors = {
        "parameter": torch.nn.Parameter(torch.ones(2, 3)),
        "frozen": torch.nn.Parameter(torch.ones(3), requires_grad=False),
        "late": whole[20:].reshape(2, 2),
        "rows": whole[:12].reshape(4, 3)[1:3],
        "column": whole[12:18].reshape(6, 1),
    }
    loaded = load_state_dict(save(torch, tmp_path / "a.pth", tensors))
    assert_same(loaded, {key: tensor.detach().numpy() for key, tensor in tensors.items()})


@pytest.mark.parametrize("make", [lambda x: x.T, lambda x: x[:, :2], lambda x: x[::2], lambda x: x[:1].expand(3, 4)])
def test_tensors_that_are_not_row_major_are_refused(torch, tmp_path, make):
    path = save(torch, tmp_path / "a.pth", {"x": make(torch.arange(12.0).reshape(3, 4))})
    with pytest.raises(UserError, match="'x' is not row-major: call contiguous"):
        load_state_dict(path)


def test_a_modules_state_dict_is_read(torch, tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.BatchNorm1d(4))
    state = module.state_dict()
    assert state._metadata  # attributes beside the tensors, which a plain dict has not
    loaded = load_state_dict(save(torch, tmp_path / "a.pth", state))
    assert_same(loaded, {key: tensor.numpy() for key, tensor in state.items()})


def test_a_namespace_of_torch_is_read(torch, tmp_path):
    attributes = {"model": "DiT", "image_size": 256, "qk_norm": True, "vae": None, "more": {"a": [1.5, ("b", -1)]}}
    path = save(torch, tmp_path / "a.pth", argparse.Namespace(**attributes))
    assert load_namespace(path) == attributes


def test_torch_reads_what_the_tests_write_by_hand(torch, tmp_path):
    (tmp_path / "a.pth").write_bytes(torch_file(state_dict(ARRAYS), ARRAYS.values()))
    loaded = torch.load(tmp_path / "a.pth", weights_only=True)
    assert list(loaded) == list(ARRAYS)
    for key, array in ARRAYS.items():
        np.testing.assert_array_equal(loaded[key].double().numpy(), array.astype(np.float64))


@pytest.mark.parametrize("item", ["list", "tensor", "module", "number", "nested", "legacy", "sparse", "complex"])
def test_other_things_of_torch_are_refused(torch, tmp_path, item):
    made = {
        "list": lambda: [torch.ones(2)],
        "tensor": lambda: torch.ones(2),
        "module": lambda: torch.nn.Linear(2, 2),
        "number": lambda: {"x": 3},
        "nested": lambda: {"model": {"x": torch.ones(2)}},
        "legacy": lambda: {"x": torch.ones(2)},
        "sparse": lambda: {"x": torch.eye(2).to_sparse()},
        "complex": lambda: {"x": torch.ones(2, dtype=torch.complex64)},
    }[item]()
    torch.save(made, tmp_path / "a.pth", _use_new_zipfile_serialization=item != "legacy")
    with pytest.raises(UserError) as caught:
        load_state_dict(tmp_path / "a.pth")
    assert str(caught.value).isprintable()


def test_programs_are_never_run(tmp_path):
    for seed in range(200):
        evil = forged_torch._evil(np.random.default_rng(seed))
        assert refused_program(tmp_path / "a", PROTO + evil + STOP), evil
        assert refused_program(tmp_path / "a", state_dict(ONE, {"w": evil}))
        assert refused_program(tmp_path / "a", namespace({"a": evil}), load_namespace)
    assert not os.path.exists(forged_torch.SENTINEL)


def forged(*arguments):
    """A state dict whose one tensor is described by `torch_files.tensor` of these."""
    return state_dict({}, {"w": tensor(*arguments)})


LAUGHS = text("ha") + b"q\x07" + b"h\x07\x86q\x07" * 60  # pairs of pairs of pairs...
STRIDED = "'w' is not row-major: call contiguous() before saving it"
REFUSED = "its pickle is refused: "


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (PROTO + call("os", "system", "x") + STOP, "it asks for 'os system', which no state dict needs"),
        (PROTO + name("os\r\x1b", "x" * 999) + STOP, r"it asks for 'os\r\x1b " + 55 * "x" + "', which"),
        (PROTO + call("torch", "FloatStorage", 8) + STOP, "it calls torch.FloatStorage, which no state dict needs"),
        (PROTO + call("collections", "OrderedDict", ["x"]) + STOP, "it calls collections.OrderedDict, which no state"),
        (PROTO + b"\x93" + STOP, "it uses the instruction STACK_GLOBAL, which torch.save does not"),
        (PROTO + b"}" + LAUGHS + b"Ns" + STOP, "it has tuple where str belongs"),
        (PROTO + value({1: 2}) + STOP, "it has int where str belongs"),
        (PROTO + b"}", "pickle exhausted before seeing STOP"),
        (b"", "pickle exhausted before seeing STOP"),
        (PROTO + STOP, "pop from empty list"),
        (PROTO + b"h\x05" + STOP, "5"),
        (PROTO + b"\x8e" + struct.pack("<Q", 1 << 40), "expected 1099511627776 bytes in a bytes8, but only 0 remain"),
        (PROTO + b"X" + struct.pack("<I", 1 << 31), "expected 2147483648 bytes in a unicodestring4, but only 0 remain"),
        (PROTO + b"]" * MAX_INSTRUCTIONS + STOP, f"it does not end within {MAX_INSTRUCTIONS} instructions"),
        (PROTO + value(("storage", 1)) + b"Q" + STOP, "not enough values to unpack"),
        (PROTO + value([]) + b"Q" + STOP, "it has list where tuple belongs"),
        (forged("0", "OddStorage", 12, 0, (12,), (1,)), "it asks for 'torch OddStorage'"),
        (forged("0", "FloatStorage", 12, 0, (12,), (1,), "module"), "else than tensors"),
        (forged(0, "FloatStorage", 12, 0, (12,), (1,)), "it has int where str belongs"),
        (forged("0", "FloatStorage", 12.0, 0, (12,), (1,)), "it has float where int belongs"),
        (forged("0", "FloatStorage", 12, 0, (12,), ()), "a tensor of an impossible shape"),
        (forged("0", "FloatStorage", 12, 0, (-12,), (1,)), "a tensor of an impossible shape"),
        (forged("0", "FloatStorage", 12, 0, (1 << 47, 0, 1 << 47), (0, 0, 0)), "impossible shape"),
        (forged("0", "FloatStorage", 12, True, (12,), (1,)), "it has bool where int belongs"),
        (state_dict({}, {"w": tensor_of("0", ONE["w"]) + value({}) + BUILD}), "it has Tensor where dict belongs"),
        (namespace([1]), "it has list where dict belongs"),
    ],
)  # fmt: skip
def test_a_pickle_that_is_no_state_dict_is_refused_with_the_reason(tmp_path, program, message):
    assert refused_program(tmp_path / "a", program).startswith(REFUSED)
    assert message in refused_program(tmp_path / "a", program)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (tensor("1", "FloatStorage", 12, 0, (12,), (1,)), "'w' refers to a storage that is not in the file"),
        (tensor("../0", "FloatStorage", 12, 0, (12,), (1,)), "'w' refers to a storage that is not in the file"),
        (tensor("0", "FloatStorage", 13, 0, (12,), (1,)), "'w' has a storage of another size than the file"),
        (tensor("0", "DoubleStorage", 12, 0, (12,), (1,)), "'w' has a storage of another size than the file"),
        (tensor("0", "FloatStorage", -12, 0, (12,), (1,)), "'w' has a storage of another size than the file"),
        (tensor("0", "FloatStorage", 1 << 2000, 0, (12,), (1,)), "'w' has a storage of another size than the file"),
        (tensor("0", "FloatStorage", 12, 1, (12,), (1,)), "'w' lies outside its storage"),
        (tensor("0", "FloatStorage", 12, -1, (2,), (1,)), "'w' lies outside its storage"),
        (tensor("0", "FloatStorage", 12, 1 << 99, (2,), (1,)), "'w' lies outside its storage"),
        (tensor("0", "FloatStorage", 12, 0, (1 << 40,), (1,)), "'w' lies outside its storage"),
        (tensor("0", "FloatStorage", 12, 0, (3, 4), (-4, 1)), STRIDED),
        (tensor("0", "FloatStorage", 12, 0, (3, 4), (0, 0)), STRIDED),
    ],
)  # fmt: skip
def test_a_tensor_that_is_not_in_its_storage_is_refused(tmp_path, program, message):
    assert refused_program(tmp_path / "a", state_dict(ONE, {"w": program})) == message


def test_names_are_cut_in_messages(tmp_path):
    assert refused_program(tmp_path / "a", state_dict({"\n" * 9999: ONE["w"]}, {"x": value(1)}))
    missing = tensor("9", "FloatStorage", 12, 0, (12,), (1,))
    assert "refers to a storage" in refused_program(tmp_path / "a", state_dict({}, {"\n" * 9999: missing}))


def test_one_storage_does_not_become_many_tensors(tmp_path):
    same = dict.fromkeys("abcdefghi", tensor_of("0", np.zeros(1000, np.float32)))
    message = refusal(tmp_path / "a", torch_file(state_dict({}, same), [np.zeros(1000, np.float32)]))
    assert message == "its tensors share storages, and are together larger than the file"


def test_values_that_look_endless_are_read_or_refused_at_once(tmp_path):
    large = value({str(i): None for i in range(20_000)}) + b"r\x07\0\0\0"
    empty = name("argparse", "Namespace") + b")" + NEWOBJ
    programs = {
        "laughs": namespace({"a": LAUGHS}),
        "itself": namespace({"a": b"]q\x07h\x07a"}),
        "deep": namespace({"a": b")" + b"\x85" * 100_000}),
        "many builds": PROTO + large + b"(" + (empty + b"h\x07b") * 10_000 + b"t\x86" + STOP,
    }
    for key, program in programs.items():
        (tmp_path / key).write_bytes(torch_file(program))
        if key == "many builds":
            with pytest.raises(UserError, match="not an argparse.Namespace"):
                load_namespace(tmp_path / key)
        else:
            assert load_namespace(tmp_path / key).keys() == {"a"}


def test_the_other_kind_of_file_is_refused(tmp_path):
    program = namespace({"a": 1})
    assert refused_program(tmp_path / "a", program) == "not a state dict, which maps names to tensors"
    message = refused_program(tmp_path / "a", state_dict(ONE), load_namespace)
    assert message == "not an argparse.Namespace, which model_args.pth should hold"


SOUND = members(state_dict(ONE), ONE.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zip_of(SOUND, deflated=("archive/data/0",)), "holds compressed members, which torch.save never writes"),
        (zip_of([*SOUND, ("archive/data.pkl", b".")]), "not a file of torch.save"),
        (zip_of([*SOUND, ("other/data.pkl", b".")]), "not a file of torch.save"),
        (zip_of(SOUND[1:]), "not a file of torch.save"),
        (zip_of([(key.replace("archive/", ""), content) for key, content in SOUND]), "not a file of torch.save"),
        (zip_of([SOUND[0], ("archive/byteorder", b"big"), *SOUND[2:]]), "holds big-endian numbers"),
        (
            zip_of([("archive/data.pkl", bytes(MAX_INDEX_BYTES + 1))]),
            f"cannot read FILE as a file of torch.save: its directory or pickle has {MAX_INDEX_BYTES + 1} bytes, too "
            "many for names",
        ),
        (b"", "cannot read FILE as a file of torch.save: File is not a zip file"),
        (b"\x80\x02}.", "cannot read FILE as a file of torch.save: File is not a zip file"),
        (zip_of(SOUND)[:-30], "cannot read FILE as a file of torch.save: File is not a zip file"),
    ],
)
def test_a_zip_of_another_make_is_refused(tmp_path, content, message):
    assert refusal(tmp_path / "a", content) == message


def test_a_long_directory_is_not_read(tmp_path):
    content = zip_of([(f"archive/{'x' * 9999}{i}", b"") for i in range(250)])
    assert "its directory or pickle has" in refusal(tmp_path / "a", content)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError) as caught:
        load_state_dict(tmp_path / "a")
    assert str(caught.value) == f"cannot read {tmp_path}/a as a file of torch.save: No such file or directory"
    with pytest.raises(UserError, match="Is a directory"):
        load_state_dict(tmp_path)


@pytest.mark.parametrize("key", ["archive/data/0", "archive/data.pkl", "archive/byteorder"])
def test_every_flipped_bit_of_a_member_is_refused(tmp_path, key):
    content = zip_of(SOUND)
    data = dict(SOUND)[key]
    start = content.index(data)
    for i in range(0, len(data), 3):
        changed = bytearray(content)
        changed[start + i] ^= 1 << i % 8
        message = refusal(tmp_path / "a", bytes(changed))
        assert message == f"member {key!r} does not match its CRC-32: the file is damaged"


def test_a_flipped_bit_of_the_zip_changes_no_number(tmp_path):
    content = zip_of(SOUND)
    loaded = 0
    for i in range(0, 8 * len(content), 13):
        changed = bytearray(content)
        changed[i // 8] ^= 1 << i % 8
        (tmp_path / "a").write_bytes(bytes(changed))
        try:
            assert_same(load_state_dict(tmp_path / "a"), ONE)
            loaded += 1
        except UserError as error:
            assert str(error).isprintable()
    assert 0 < loaded < 200  # dates and the like are nobody's


@pytest.mark.parametrize("numbers", [(1, 1 << 40, 0), (1, 60, (1 << 63) - 1), (1, 60, 1 << 63), ((1 << 64) - 1, 60, 0)])
def test_numbers_of_64_bits_in_a_zips_end_are_refused(tmp_path, numbers):
    content = zip_of(SOUND)
    end = content.rfind(b"PK\x05\x06")
    record = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, numbers[0], *numbers)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1)
    last = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    assert refusal(tmp_path / "a", content[:end] + record + locator + last)


def test_the_sentinel_is_a_path_that_a_payload_could_make():
    assert Path(forged_torch.SENTINEL).parent.is_dir()
