"""The FID Inception network against an implementation in PyTorch with the same random weights."""

from functools import partial

import jax
import numpy as np
import pytest

from terdit_jax.evaluation import inception
from terdit_jax.evaluation.inception import BLOCKS, extract, kernels, network, run
from terdit_jax.evaluation.inception_weights import params_from_torch
from terdit_jax.evaluation.resize import legacy_bilinear
from tests.golden_models import assert_close, nhwc
from tests.inception_files import random_state_dict


@pytest.fixture(scope="module")
def networks():
    """(our parameters, the PyTorch network with the same)."""
    torch = pytest.importorskip("torch")
    from tests.torch_inception import Network

    arrays = random_state_dict()
    theirs = Network()
    missing, unexpected = theirs.load_state_dict({k: torch.tensor(v) for k, v in arrays.items()}, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    return params_from_torch(arrays, "random"), theirs.double().eval().requires_grad_(False)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_is_pytorchs(networks, name):
    import torch

    params, theirs = networks
    width = next(shape for kernel, shape in kernels().items() if kernel.startswith(name))
    side = {"5": 9, "6": 10, "7": 8}[name[6]]  # the rule for edges shows at any size
    x = np.random.default_rng(1).standard_normal((2, side, side, width[1]), np.float32)
    expected = getattr(theirs, name)(torch.tensor(x, dtype=torch.float64).permute(0, 3, 1, 2))
    assert_close(jax.jit(partial(run, [BLOCKS[name]]))(params[name], x), nhwc(expected.numpy()))


def test_the_whole_network_is_pytorchs(networks):
    import torch

    params, theirs = networks
    x = np.random.default_rng(2).uniform(-1, 1, (1, 299, 299, 3)).astype(np.float32)
    found = jax.jit(network)(params, x)
    pool, spatial, logits = theirs(torch.tensor(x, dtype=torch.float64).permute(0, 3, 1, 2))
    for ours, expected in zip(found, (pool, spatial, logits), strict=True):
        assert ours.shape == expected.shape and ours.dtype == np.float32
        assert_close(ours, expected.numpy())
    probabilities = jax.nn.softmax(found.logits)
    # A probability's relative error is its logit's absolute one.
    np.testing.assert_allclose(probabilities, torch.softmax(logits, 1).numpy(), rtol=1e-4)


def test_images_are_resized_and_centred_first(monkeypatch):
    """uint8 in [0, 255] of another size; the network stands in for itself."""
    monkeypatch.setattr(inception, "network", lambda params, x: x)
    images = np.random.default_rng(3).integers(0, 256, (2, 40, 50, 3), np.uint8)
    expected = (legacy_bilinear(images.astype(np.float32), 299, 299) - 128) / 128
    np.testing.assert_array_equal(extract({}, images), expected)
    assert expected.shape == (2, 299, 299, 3) and expected.min() < -0.9 and expected.max() > 0.9
    np.testing.assert_array_equal(extract({}, images.astype(np.float32)), expected)


def test_float32_is_asked_of_every_multiplication():
    """Accelerators round float32 operands otherwise; a CPU cannot show it."""
    params = jax.eval_shape(lambda: params_from_torch(random_state_dict(), "random"))
    program = jax.jit(extract).lower(params, jax.ShapeDtypeStruct((1, 8, 8, 3), np.uint8)).as_text().splitlines()
    convolutions = [line for line in program if "stablehlo.convolution" in line]
    assert len(convolutions) >= len(kernels()) == 94
    assert all("HIGHEST" in line for line in program if "stablehlo.convolution" in line or "dot_general" in line)
