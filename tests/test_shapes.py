"""Names and shapes of tensors tell an architecture, and a description that contradicts them is refused."""

import numpy as np
import pytest

from terdit_jax.errors import UserError
from terdit_jax.interop.published import published_layout
from terdit_jax.interop.shapes import check_architecture, read_facts
from tests.deployed import VARIANTS, small_config
from tests.golden_models import DIT

FLOAT = np.dtype(np.float32)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("x_embedder.weight", None, "lacks tensor 'x_embedder.weight'"),
        ("x_embedder.weight", (FLOAT, (64,)), "lacks matrices"),
        ("y_embedder.embedding_table.weight", None, "lacks tensor 'y_embedder"),
        ("y_embedder.embedding_table.weight", (FLOAT, ()), "lacks"),
        ("layers.0.attention.wk.weight", None, "lacks tensor 'layers.0.attention.wk"),
        ("layers.0.attention.wk.weight", (FLOAT, ()), "lacks"),
        ("layers.0.feed_forward.w1.weight", None, "lacks tensor 'layers.0.feed_forward"),
    ],
)
def test_another_networks_tensors_are_refused(name, tensor, message):
    layout = dict(published_layout(small_config(), True))
    layout.pop(name) if tensor is None else layout.update({name: tensor})
    with pytest.raises(UserError, match=f"a.pth: not a TerDiT or Large-DiT checkpoint, it {message}"):
        read_facts(layout, "a.pth")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("pos_embed", None, "lacks tensor 'pos_embed'"),
        ("pos_embed", (FLOAT, (16, 32)), "lacks matrices"),
        ("pos_embed", (FLOAT, (1, 16, 64)), "lacks matrices"),
        ("x_embedder.proj.weight", None, "lacks tensor 'x_embedder.proj.weight'"),
        ("x_embedder.proj.weight", (FLOAT, (32, 16)), "lacks matrices"),
        ("y_embedder.embedding_table.weight", None, "lacks tensor 'y_embedder"),
        ("final_layer.linear.weight", (FLOAT, ()), "lacks matrices"),
    ],
)
def test_tensors_that_are_not_quite_those_of_dit_are_refused(name, tensor, message):
    layout = dict(published_layout(small_config(**DIT), False))
    layout.pop(name) if tensor is None else layout.update({name: tensor})
    with pytest.raises(UserError, match=f"a.pt: not a DiT or SiT checkpoint, it {message}"):
        read_facts(layout, "a.pt")


@pytest.mark.parametrize("names", [(), ("conv1.weight",), ("cls_token", "patch_embed.proj.weight")])
def test_tensors_of_no_family_are_refused(names):
    with pytest.raises(UserError, match="a.pt: not a checkpoint of TerDiT, Large-DiT, DiT or SiT, it has neither"):
        read_facts(dict.fromkeys(names, (FLOAT, (64, 3, 7, 7))), "a.pt")


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_every_kind_of_model_fits_its_own_tensors(overrides):
    model = small_config(**overrides)
    for packed in {model.ternary, False}:
        check_architecture(model, published_layout(model, packed), "a")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 64}, "hidden_size=64, its tensors have 32"),
        ({"depth": 3}, "depth=3, its tensors have 2"),
        ({"in_channels": 3}, "patch_width=12, its tensors have 16"),
        ({"num_classes": 11}, "num_classes=11, its tensors have 10"),
        ({"num_kv_heads": 1}, "kv_width=16, its tensors have 32"),
        ({"ffn_multiple_of": 64}, "mlp_width=128, its tensors have 96"),
        ({"qk_norm": False}, "qk_norm=False, its tensors have True"),
        ({"adaln_rms_norm": False}, "adaln_rms_norm=False, its tensors have True"),
        ({"ternary": False}, "ternary=False, its tensors have True"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_a_description_of_another_model_is_refused(overrides, message, packed):
    layout = published_layout(small_config(), packed)
    check_architecture(small_config(), layout, "a")
    with pytest.raises(UserError, match=f"a: describes a model with {message}"):
        check_architecture(small_config(**overrides), layout, "a")


def test_a_full_precision_model_has_no_adaln_norm_whatever_the_field_says():
    for adaln_rms_norm in (True, False):
        model = small_config(ternary=False, adaln_rms_norm=adaln_rms_norm)
        check_architecture(model, published_layout(model, False), "a")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"input_size": 16}, "input_size=16, its tensors have 8"),
        ({"in_channels": 3}, "in_channels=3, its tensors have 4"),
        ({"learn_sigma": False}, "learn_sigma=False, its tensors have True"),
        ({"patch_size": 4}, "patch_size=4, its tensors have 2"),
    ],
)
def test_a_description_of_another_dit_is_refused(overrides, message):
    layout = published_layout(small_config(**DIT), False)
    with pytest.raises(UserError, match=f"a: describes a model with {message}"):
        check_architecture(small_config(**DIT, **overrides), layout, "a")
