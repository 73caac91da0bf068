"""The network's weights come from the port's file, and nothing that is not the network is taken for it."""

from pathlib import Path
import urllib.error

import jax
import numpy as np
import pytest

from terdit_jax.errors import UserError
from terdit_jax.evaluation import inception_weights
from terdit_jax.evaluation.inception import kernels
from terdit_jax.evaluation.inception_weights import (
    FILE_NAME,
    cache_folder,
    fetch_inception,
    load_inception,
    params_from_torch,
)
from tests.inception_files import random_state_dict
from tests.torch_files import save_state_dict


@pytest.fixture(scope="module")
def arrays():
    return random_state_dict()


def test_a_file_gives_the_parameters(arrays, tmp_path):
    save_state_dict(arrays, tmp_path / "port.pth")
    port = load_inception(tmp_path / "port.pth")
    jax.tree.map(np.testing.assert_array_equal, port.params, params_from_torch(arrays, "x"))
    assert len(jax.tree.leaves(port.params)) == 2 * 94 + 1 and port.source.endswith("port.pth")
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(port.params))


def test_batch_norms_are_folded_in(arrays):
    conv, norm = "Mixed_6d.branch7x7_2", "Mixed_6d.branch7x7_2.bn"
    folded = params_from_torch(arrays, "x")["Mixed_6d"]["branch7x7_2"]
    scale = arrays[f"{norm}.weight"] / np.sqrt(arrays[f"{norm}.running_var"] + 0.001)
    expected = arrays[f"{conv}.conv.weight"] * scale[:, None, None, None]
    np.testing.assert_allclose(folded["weight"], expected.transpose(0, 2, 3, 1), rtol=1e-5)
    expected = arrays[f"{norm}.bias"] - arrays[f"{norm}.running_mean"] * scale
    np.testing.assert_allclose(folded["bias"], expected, rtol=1e-4, atol=1e-6)


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
