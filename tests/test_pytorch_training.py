"""A training step of a flow, written in plain PyTorch, against our loss and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from terdit_jax.config_sections import DiffusionConfig  # noqa: E402
from terdit_jax.diffusion.objective import Flow  # noqa: E402
from terdit_jax.interop.published import (  # noqa: E402
    StateDict,
    params_leaves,
    params_tree,
    published_tensors,
    read_leaves,
)
from terdit_jax.interop.pytorch import TerDiT  # noqa: E402
from terdit_jax.training.step import loss_and_grads  # noqa: E402
from tests.golden_models import (  # noqa: E402
    BY_CHANNEL,
    DIT,
    assert_trees_close,
    golden_config,
    golden_params,
    nhwc,
    random_params,
    tiny_config,
)
from tests.torch_models import fields_of  # noqa: E402

FLOW = Flow(DiffusionConfig(objective="flow"))


def examples(config):
    """(x_0, noise) NCHW, t and y."""
    generator = np.random.default_rng(5)
    shape = (4, config.in_channels, config.input_size, config.input_size)
    x_0, noise = generator.standard_normal((2, *shape), np.float32)
    return x_0, noise, np.array([0.02, 0.35, 0.6, 0.97], np.float32), np.array([0, 3, 9, 10])


@partial(jax.jit, static_argnums=0)
def jax_step(config, params, x_0, noise, t, y):
    batch = {"x_0": x_0, "noise": noise, "x_t": FLOW.noised(x_0, t, noise), "t": t, "y": y}
    sums, grads = loss_and_grads(config, FLOW, params, batch)
    return sums["loss"], grads


def straight_through(config, weight, alphas, matrices):
    """alpha T of every matrix of a weight (matrices x out, in), with dL/dW that of alpha T times alpha."""
    parts = []
    for part, alpha in zip(weight.chunk(matrices), alphas.chunk(matrices), strict=True):
        gamma = part.abs().mean(1, keepdim=True) if config.gamma_per == "channel" else part.abs().mean()
        scaled = part / (gamma + 1e-6)
        codes = scaled.round().clamp(-1, 1) if config.threshold == 0.5 else scaled.sign() * (scaled.abs() > 0.7)
        parts.append(alpha[:, None] * (part + (codes - part).detach()))
    return torch.cat(parts)


def torch_step(config, params, x_0, noise, t, y):
    """The loss on the linear path and its gradients by published name; a ternary model is the full-precision one with
    the weights that its masters make."""
    masters = {
        name: torch.tensor(array).requires_grad_(name != "pos_embed")
        for name, array in published_tensors(config, params_leaves(params))
    }
    weights = {name: master for name, master in masters.items() if not name.endswith(".alphas")}
    for name, alphas in masters.items():
        if name.endswith(".alphas"):
            weight = name.removesuffix("alphas") + "weight"
            weights[weight] = straight_through(config, masters[weight], alphas, 3 if ".qkv." in name else 1)
    model = TerDiT(fields_of(config) | {"ternary": False}, dtype=torch.float32)
    x_0, noise, t, y = map(torch.from_numpy, (x_0, noise, t, y))
    at = t[:, None, None, None]
    assert weights.keys() == model.state_dict().keys()
    out = torch.func.functional_call(model, weights, (at * x_0 + (1 - at) * noise, t, y))
    loss = ((out[:, : x_0.shape[1]] - (x_0 - noise)) ** 2).mean()
    loss.backward()
    return loss.item(), {name: (master if name == "pos_embed" else master.grad) for name, master in masters.items()}


@pytest.mark.parametrize(
    "fields",
    [
        None,
        {**DIT, "adaln_rms_norm": False},
        {"adaln_rms_norm": False},
        {**DIT, **BY_CHANNEL, "adaln_rms_norm": False},
        {**BY_CHANNEL, "adaln_rms_norm": False, "num_heads": 8, "num_kv_heads": 2},
    ],
    ids=["SiT", "ternary SiT", "TerDiT", "ternary SiT by channel", "TerDiT by channel"],
)
def test_a_step_of_a_flow_is_that_of_plain_pytorch(fields):
    if fields is None:
        config, params = golden_config("sit_tiny"), golden_params(golden_config("sit_tiny"), "sit_tiny")
    else:
        config = tiny_config(depth=2, **fields)
        params = random_params(config)
    assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(params))
    x_0, noise, t, y = examples(config)
    loss, grads = jax_step(config, params, nhwc(x_0), nhwc(noise), t, y)
    torch_loss, torch_grads = torch_step(config, params, x_0, noise, t, y)
    assert torch_loss == pytest.approx(float(loss), rel=1e-5)
    state_dict = StateDict.of({name: grad.detach().numpy() for name, grad in torch_grads.items()})
    ours = params_tree((path, jnp.asarray(leaf)) for path, leaf in read_leaves(config, state_dict))
    assert_trees_close(grads, ours)
