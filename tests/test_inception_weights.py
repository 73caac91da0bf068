"""The network's weights from both kinds of file are the same, and nothing that is not the network is taken for it."""

from pathlib import Path
import urllib.error

from inception_files import constant, random_state_dict
import jax
import numpy as np
import pytest
from torch_files import state_dict, torch_file

from terdit_jax.errors import UserError
from terdit_jax.evaluation import inception_weights
from terdit_jax.evaluation.inception import kernels
from terdit_jax.evaluation.inception_weights import (
    FILE_NAME,
    cache_folder,
    fetch_inception,
    graph_scope,
    load_inception,
    params_from_graph,
    params_from_torch,
)


@pytest.fixture(scope="module")
def arrays():
    return random_state_dict()


@pytest.fixture(scope="module")
def constants(arrays):
    """The same weights as the graph has them."""
    parts = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    found = {"softmax/weights": arrays["fc.weight"].T, "softmax/biases": arrays["fc.bias"]}
    for conv in kernels():
        scope = graph_scope(conv)
        found[f"{scope}/conv2d_params"] = arrays[f"{conv}.conv.weight"].transpose(2, 3, 1, 0)
        found |= {f"{scope}/batchnorm/{theirs}": arrays[f"{conv}.bn.{ours}"] for ours, theirs in parts.items()}
    return found


def test_both_files_give_the_same_parameters(arrays, constants, tmp_path):
    (tmp_path / "port.pth").write_bytes(torch_file(state_dict(arrays), arrays.values()))
    (tmp_path / "graph.pb").write_bytes(
        b"".join(constant(name, array) for name, array in constants.items())
        + constant("Sub/y", np.array(128.0))
        + constant("ResizeBilinear/size", np.zeros(2), dtype=3)
    )
    port, graph = load_inception(tmp_path / "port.pth"), load_inception(tmp_path / "graph.pb")
    jax.tree.map(np.testing.assert_array_equal, port.params, graph.params)
    assert len(jax.tree.leaves(port.params)) == 2 * 94 + 1
    assert port.sha256 != graph.sha256 and port.source.endswith("port.pth")
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(port.params))


def test_batch_norms_are_folded_in(arrays):
    conv, norm = "Mixed_6d.branch7x7_2", "Mixed_6d.branch7x7_2.bn"
    folded = params_from_torch(arrays, "x")["Mixed_6d"]["branch7x7_2"]
    scale = arrays[f"{norm}.weight"] / np.sqrt(arrays[f"{norm}.running_var"] + 0.001)
    expected = arrays[f"{conv}.conv.weight"] * scale[:, None, None, None]
    np.testing.assert_allclose(folded["weight"], expected.transpose(0, 2, 3, 1), rtol=1e-5)
    expected = arrays[f"{norm}.bias"] - arrays[f"{norm}.running_mean"] * scale
    np.testing.assert_allclose(folded["bias"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("Conv2d_1a_3x3", "conv"),
        ("Conv2d_4a_3x3", "conv_4"),
        ("Mixed_5b.branch5x5_2", "mixed/tower/conv_1"),
        ("Mixed_5d.branch3x3dbl_3", "mixed_2/tower_1/conv_2"),
        ("Mixed_6a.branch3x3", "mixed_3/conv"),
        ("Mixed_6a.branch3x3dbl_1", "mixed_3/tower/conv"),
        ("Mixed_6d.branch1x1", "mixed_6/conv"),
        ("Mixed_6e.branch7x7dbl_5", "mixed_7/tower_1/conv_4"),
        ("Mixed_6b.branch_pool", "mixed_4/tower_2/conv"),
        ("Mixed_7a.branch3x3_2", "mixed_8/tower/conv_1"),
        ("Mixed_7a.branch7x7x3_4", "mixed_8/tower_1/conv_3"),
        ("Mixed_7b.branch3x3_2a", "mixed_9/tower/mixed/conv"),
        ("Mixed_7c.branch3x3dbl_3b", "mixed_10/tower_1/mixed/conv_1"),
    ],
)
def test_scopes_of_the_published_graph(name, scope):
    assert graph_scope(name) == scope


def test_scopes_differ():
    assert len({graph_scope(name) for name in kernels()}) == 94


def changed(arrays, **changes):
    return {name: array for name, array in (arrays | changes).items() if array is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Mixed_5b.branch1x1.conv.weight": None}, "lacks tensor 'Mixed_5b.branch1x1.conv.weight'"),
        ({"fc.bias": None}, "lacks tensor 'fc.bias'"),
        ({"AuxLogits.fc.weight": np.zeros(3)}, "'AuxLogits.fc.weight' does not belong"),
        ({"fc.weight": np.zeros((1000, 2048), np.float32)}, r"\(1000, 2048\), expected floats \(1008, 2048\)"),
        ({"fc.bias": np.zeros(1008, np.int64)}, "int64"),
        ({"Conv2d_1a_3x3.bn.bias": np.full(32, np.nan, np.float32)}, "not finite"),
        ({"Conv2d_1a_3x3.bn.running_var": np.full(32, -1, np.float32)}, "negative variances"),
    ],
)
def test_a_state_dict_that_is_not_the_network_is_refused(arrays, changes, message):
    with pytest.raises(UserError, match=message):
        params_from_torch(changed(arrays, **changes), "x")


def test_newer_pytorchs_counters_are_ignored(arrays):
    counters = {f"{conv}.bn.num_batches_tracked": np.zeros((), np.int64) for conv in kernels()}
    jax.tree.map(
        np.testing.assert_array_equal, params_from_torch(arrays | counters, "x"), params_from_torch(arrays, "x")
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixed_9/conv/batchnorm/beta": None}, "lacks tensor 'mixed_9/conv/batchnorm/beta'"),
        ({"mixed_11/conv/conv2d_params": np.zeros((1, 1, 1, 1))}, "'mixed_11/conv/conv2d_params' does not belong"),
        ({"softmax/weights": np.zeros((1008, 2048), np.float32)}, r"expected floats \(2048, 1008\)"),
    ],
)
def test_a_graph_that_is_not_the_network_is_refused(constants, changes, message):
    with pytest.raises(UserError, match=message):
        params_from_graph(changed(constants, **changes), "x")


def test_a_path_that_does_not_exist_says_where_to_get_the_file(tmp_path):
    with pytest.raises(UserError, match="cannot read Inception weights .*none.pth.*github.com/mseitzer"):
        load_inception(tmp_path / "none.pth")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TERDIT_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_without_a_network_it_is_one_line(cache, monkeypatch):
    def fail(url, timeout):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(inception_weights.urllib.request, "urlopen", fail)
    with pytest.raises(UserError, match="neither at .* nor to be fetched .*no route to host.*--inception=PATH"):
        load_inception()
    assert not list(cache.glob("*"))


def test_a_fetched_file_must_be_the_one_it_is_named_for(cache, tmp_path):
    (tmp_path / "other").write_bytes(b"other")
    with pytest.raises(UserError, match=r"SHA-256 d9298a10\.\.\., expected 6726825d\.\.\."):
        fetch_inception((tmp_path / "other").as_uri())
    assert not list(cache.glob("*"))


def test_it_is_fetched_once(cache, tmp_path, monkeypatch):
    (tmp_path / "other").write_bytes(b"other")
    monkeypatch.setattr(inception_weights, "FILE_NAME", "network-d9298a10.pth")
    path = fetch_inception((tmp_path / "other").as_uri())
    assert path == cache / "network-d9298a10.pth" and path.read_bytes() == b"other"
    assert fetch_inception("file:///nowhere") == path
    assert [file.name for file in cache.iterdir()] == [path.name]


def test_the_cache_is_in_the_home_folder_if_nothing_is_said(monkeypatch):
    monkeypatch.delenv("TERDIT_JAX_CACHE", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "terdit_jax"
    assert FILE_NAME.endswith("-6726825d.pth")
