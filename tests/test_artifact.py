"""An artifact comes back bit for bit, and one changed byte anywhere in it is refused in one line."""

import hashlib
import json
import zlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from terdit_jax.errors import UserError
from terdit_jax.interop.artifact import (
    MAX_EXPANSION,
    is_artifact,
    open_artifact,
    read_description,
    write_artifact,
    write_plain,
)
from terdit_jax.interop.exports import export
from terdit_jax.interop.published import params_leaves, published_layout, published_tensors
from terdit_jax.interop.safetensors import open_container
from terdit_jax.interop.weights import open_weights, packed_leaves
from tests.deployed import describe, random_params, random_weights, small_config
from tests.forged_containers import Parts, render, seal

# The smallest whose planes are all worth compressing.
MODEL = small_config(hidden_size=32, num_heads=2, input_size=4, num_classes=3, ffn_multiple_of=16)
PLANES = "layers.1.feed_forward.w2.weight"
FLOATS = "layers.0.attention_norm.weight"
METADATA = ["header_sha256", "format", "version", "description", "sha256", "zlib"]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """{compressed or not: content of a small artifact}, and the weights in it."""
    weights, folder = random_weights(MODEL), tmp_path_factory.mktemp("artifacts")
    for compress in (False, True):
        export(weights, folder / str(compress), "packed", compress=compress)
    return {compress: (folder / str(compress)).read_bytes() for compress in (False, True)}, weights


def read_all(path):
    weights = open_weights(path)
    return weights.description, {name: np.array(leaf) for name, leaf in weights.leaves()}


def refusal(path, content):
    """The one line with which a file is refused, without its name."""
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_all(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 300
    return message.removeprefix(f"{path}: ")


def forged(content, change=lambda parts: None, change_header=lambda header: None):
    """The file with changes and all checksums right."""
    parts = Parts(content)
    change(parts)
    header = parts.header()
    change_header(header)
    return render(seal(json.dumps(header).encode()), parts.data())


@pytest.mark.parametrize("compress", [False, True])
def test_what_is_written_is_read(artifacts, tmp_path, compress):
    contents, weights = artifacts
    (tmp_path / "a").write_bytes(contents[compress])
    opened = open_weights(tmp_path / "a")
    assert opened.description == weights.description
    assert not opened.masters
    expected = dict(packed_leaves(MODEL, weights.leaves()))
    actual = dict(opened.leaves())
    assert actual.keys() == expected.keys()
    for name, leaf in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (leaf.dtype, leaf.shape), name
        assert actual[name].tobytes() == np.asarray(leaf).tobytes(), name


def test_the_header_says_what_the_format_promises(artifacts, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(artifacts[0][False])
    container = open_container(tmp_path / "a.safetensors")
    metadata = container.metadata
    assert is_artifact(container)
    assert list(metadata) == METADATA
    assert (metadata["format"], metadata["version"], metadata["zlib"]) == ("terdit_jax", "1", "{}")
    assert json.loads(metadata["description"]) == artifacts[1].description.to_dict()
    for name, digest in json.loads(metadata["sha256"]).items():
        assert hashlib.sha256(container.arrays[name].tobytes()).hexdigest() == digest
    blank = container.header.replace(metadata["header_sha256"].encode(), b"0" * 64)
    assert hashlib.sha256(blank).hexdigest() == metadata["header_sha256"]
    # The reference implementation reads it, too, with every float aligned.
    loaded = load_file(tmp_path / "a.safetensors")
    assert {name: (array.dtype, array.shape) for name, array in loaded.items()} == published_layout(MODEL, packed=True)
    kinds = [array.dtype == np.uint8 for array in container.arrays.values()]
    assert kinds == sorted(kinds)


@pytest.mark.parametrize("compress", [False, True])
def test_every_flipped_bit_is_refused(artifacts, tmp_path, compress):
    content = artifacts[0][compress]
    end = 8 + int.from_bytes(content[:8], "little")
    places = {*range(0, 200), *range(0, end, 97), *range(end - 12, end + 12), *range(end, len(content), 211)}
    for i, place in enumerate(sorted(places | {len(content) - 1})):
        changed = bytearray(content)
        changed[place] ^= 1 << i % 8
        assert refusal(tmp_path / "a", bytes(changed)), place


def test_a_damaged_mark_does_not_make_it_a_plain_file(artifacts, tmp_path):
    content = artifacts[0][False]
    for mark in (*(b'"%b"' % name.encode() for name in METADATA), b'"terdit_jax"', b"__metadata__"):
        place = content.index(mark) + 2
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            assert refusal(tmp_path / "a", bytes(changed)), mark


def test_the_reason_names_what_is_damaged(artifacts, tmp_path):
    content = artifacts[0][False]
    assert refusal(tmp_path / "a", content.replace(b'"seed', b'"teed')) == (
        "its header does not match its SHA-256: the file is damaged, fetch it again"
    )
    last = bytearray(content)
    last[-1] ^= 1
    name = list(Parts(content).tensors)[-1]
    assert refusal(tmp_path / "a", bytes(last)) == f"tensor {name!r} does not match its SHA-256: the file is damaged"
    for other in (content[:-1], content + b"x"):
        assert refusal(tmp_path / "a", other).startswith("not a safetensors file, or cut off or damaged")


def set_metadata(**values):
    return lambda parts: parts.metadata.update(values)


def drop_metadata(name):
    return lambda parts: parts.metadata.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_metadata(version="2"), "artifact version '2', this code reads '1'"),
        (set_metadata(version="\n" * 99), "artifact version '" + r"\n" * 20 + "', this code reads '1'"),
        (drop_metadata("version"), "artifact version 'none', this code reads '1'"),
        *(
            (change, f"must hold exactly {', '.join(sorted(METADATA))}")
            for change in (
                set_metadata(more="x"),
                drop_metadata("zlib"),
                drop_metadata("header_sha256"),
                set_metadata(format="other"),
            )
        ),
        (set_metadata(header_sha256="\ud800"), "not a safetensors file, or cut off or damaged"),
        (set_metadata(header_sha256=""), "its header does not match its SHA-256: the file is damaged"),
        (set_metadata(zlib="[]"), "the zlib list is not a JSON dict"),
        (set_metadata(zlib='{"x":["U8",[4]]}'), "deflated tensor 'x' is not in the file"),
        (set_metadata(zlib=f'{{"{PLANES}":["U8"]}}'), "or is not described by dtype and shape"),
        (set_metadata(zlib=f'{{"{PLANES}":["U8",[4]]}}'), "is no row of bytes"),
        (set_metadata(zlib=f'{{"{FLOATS}":["F32",[16]]}}'), "is no row of bytes"),
        (set_metadata(description="{"), "its description is not sound JSON"),
        (set_metadata(description="[" * 99999), "its description is not sound JSON"),
    ],
)
def test_metadata_of_another_make_is_refused(artifacts, tmp_path, change, message):
    assert message in refusal(tmp_path / "a", forged(artifacts[0][False], change))


def test_an_artifact_signed_again_is_sound(artifacts, tmp_path):
    """Otherwise every forgery here would be refused for its checksums alone."""
    for content in artifacts[0].values():
        (tmp_path / "a").write_bytes(forged(content))
        assert read_all(tmp_path / "a")[0] == artifacts[1].description


def test_checksums_must_be_those_of_the_tensors(artifacts, tmp_path):
    def drop(header):
        sums = json.loads(header["__metadata__"]["sha256"])
        del sums[FLOATS]
        header["__metadata__"]["sha256"] = json.dumps(sums)

    message = refusal(tmp_path / "a", forged(artifacts[0][False], change_header=drop))
    assert message == "its checksums are not those of its tensors"


def put_stream(stream, shape, dtype="U8"):
    def change(parts):
        parts.tensors[PLANES] = ["U8", [len(stream)], stream]
        parts.metadata["zlib"] = json.dumps(json.loads(parts.metadata["zlib"]) | {PLANES: [dtype, shape]})

    return change


def test_streams_that_lie_are_refused(artifacts, tmp_path):
    content = artifacts[0][False]
    parts = Parts(content)
    plain, shape = parts.tensors[PLANES][2], parts.tensors[PLANES][1]
    good, wrong = zlib.compress(plain, 0), f"tensor {PLANES!r} does not inflate to the {len(plain)} bytes it should"
    (tmp_path / "good").write_bytes(forged(content, put_stream(good, shape)))
    read_all(tmp_path / "good")
    for stream in (good[:-1], good + b"x", good + good, zlib.compress(plain + b"x", 0), zlib.compress(plain[1:], 0)):
        assert refusal(tmp_path / "a", forged(content, put_stream(stream, shape))) == wrong
    bomb = zlib.compress(bytes(1000 * len(plain)))
    assert refusal(tmp_path / "a", forged(content, put_stream(bomb, shape))) == wrong
    for lie in ([1000 * len(plain)], [1 << 40]):
        message = refusal(tmp_path / "a", forged(content, put_stream(good, lie)))
        assert message == f"deflated tensor {PLANES!r} would expand more than {MAX_EXPANSION} times"
    assert "does not inflate: Error" in refusal(tmp_path / "a", forged(content, put_stream(good[:-4] + b"beef", shape)))
    assert "does not inflate: Error" in refusal(tmp_path / "a", forged(content, put_stream(plain, shape)))
    # A shape of no bytes must not lift the limit on what is inflated.
    assert refusal(tmp_path / "a", forged(content, put_stream(bomb, [0])))


def test_an_empty_shape_does_not_inflate_a_bomb(tmp_path, artifacts):
    """The bomb is read directly: the model's shapes would have refused it before."""
    bomb = zlib.compress(bytes(1 << 20))
    (tmp_path / "a").write_bytes(forged(artifacts[0][False], put_stream(bomb, [0])))
    _, state_dict = open_artifact(open_container(tmp_path / "a"), "a")
    with pytest.raises(UserError, match="does not inflate to the 0 bytes it should"):
        state_dict.read(PLANES)


def planes_of(codes_per_row, rows, generator):
    """The planes of uniform random weights, ternarised by their absolute mean: a quarter of them is zero."""
    weight = generator.uniform(-1, 1, (4 * rows, codes_per_row))
    codes = np.clip(np.round(weight / np.abs(weight).mean()), -1, 1).astype(np.int8)
    pairs = (codes + 1).astype(np.uint8).reshape(4, rows, codes_per_row)
    return pairs[0] << 6 | pairs[1] << 4 | pairs[2] << 2 | pairs[3]


def test_compression_comes_near_the_entropy_and_never_beyond_what_readers_take(tmp_path):
    model = small_config(hidden_size=128, num_heads=2, depth=1, ffn_multiple_of=128)
    layout, generator = published_layout(model, packed=True), np.random.default_rng(0)
    zeros = "layers.0.adaLN_modulation.1.weight"
    tensors = {
        name: planes_of(shape[1], shape[0], generator) if dtype == np.uint8 else np.ones(shape, dtype)
        for name, (dtype, shape) in layout.items()
    }
    tensors[zeros] = np.full(layout[zeros][1], 0b01010101, np.uint8)
    write_artifact(tmp_path / "a", describe(model), layout, tensors.items(), compress=True)
    container = open_container(tmp_path / "a")
    deflated = json.loads(container.metadata["zlib"])
    planes = {name for name, (dtype, _) in layout.items() if dtype == np.uint8}
    assert deflated.keys() == planes - {zeros}
    stored = sum(container.arrays[name].nbytes for name in deflated)
    codes = sum(4 * tensors[name].size for name in deflated)
    assert 1.5 < 8 * stored / codes < 1.59
    _, state_dict = open_artifact(container, "a")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(state_dict.read(name), tensor)


def test_plain_files_have_a_description_and_no_checksums(tmp_path):
    description, layout = describe(MODEL), published_layout(MODEL, packed=False)
    params = random_params(MODEL)
    tensors = published_tensors(MODEL, ((name, np.asarray(leaf)) for name, leaf in params_leaves(params)))
    by_name = dict(tensors)
    write_plain(tmp_path / "a", description, layout, ((name, by_name[name]) for name in layout))
    container = open_container(tmp_path / "a")
    assert not is_artifact(container)
    assert list(container.metadata) == ["description"]
    assert read_description(container.metadata["description"], layout, "a") == description
    opened, leaves = read_all(tmp_path / "a")
    assert opened == description
    for name, leaf in params_leaves(params):
        np.testing.assert_array_equal(leaves[name], leaf)
