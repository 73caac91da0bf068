"""Published checkpoints are described by shapes, names and what lies beside them, or say what is missing."""

import dataclasses
from pathlib import Path

import pytest

from terdit_jax.config_sections import DiffusionConfig, ModelConfig, SampleConfig
from terdit_jax.errors import UserError
from terdit_jax.interop.description import architecture
from terdit_jax.interop.known import (
    DIT_HEADS,
    DIT_SIZES,
    PUBLISHED_SHAPES,
    Told,
    describe_published,
    public_model_args,
    public_remark,
)
from terdit_jax.interop.published import published_layout
from tests.deployed import describe, small_config
from tests.golden_models import DIT, tiny_config

FILE = Path("out/consolidated_ema.00-of-01.pth")
FLOW = DiffusionConfig(objective="flow")


def model_of(**fields):
    return architecture(ModelConfig(**fields))


def published_model(name, **fields):
    width, depth = PUBLISHED_SHAPES[name]
    return model_of(hidden_size=width, depth=depth, **fields)


@pytest.mark.parametrize("name", PUBLISHED_SHAPES)
def test_published_checkpoints_are_described_by_their_shapes(name):
    model = published_model(name)
    arguments = {"model": name, "image_size": 256, "vae": "mse"}
    description = describe_published(published_layout(model, packed=True), arguments, True, "a.pth")
    assert (description.name, description.model) == (name, model)
    assert (description.ema, description.step) == (True, None)
    assert (description.codec, description.latent_scale) == ("sd-vae-ft-mse", 0.18215)
    assert description.sample == SampleConfig()


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        ({"input_size": 64}, {"image_size": 512}),
        ({"qk_norm": False}, {}),
        ({"num_kv_heads": 8}, {}),
        ({"num_classes": 10}, {"num_classes": 10}),
        ({"adaln_rms_norm": False}, {}),
        ({"ternary": False, "adaln_rms_norm": False}, {}),
    ],
)
def test_a_published_model_with_something_different(fields, arguments):
    model = published_model("DiT_Llama_600M_patch2", **fields)
    for packed in {model.ternary, False}:
        layout = published_layout(model, packed)
        assert describe_published(layout, arguments, False, "a.pth").model == model


def test_a_shape_that_was_never_published_is_refused():
    with pytest.raises(UserError, match="a.pth: width 64 with 3 layers is none of the published models"):
        describe_published(published_layout(tiny_config(), True), {}, True, "a.pth")


@pytest.mark.parametrize(
    "arguments",
    [{"image_size": "256"}, {"image_size": 0}, {"image_size": True}, {"image_size": 1 << 40}, {"image_size": 10**400},
     {"image_size": None}, {"vae": "kl"}, {"vae": None}, {"vae": ["ema"]}, {"vae": "x" * 10_000}],
)  # fmt: skip
def test_model_args_that_make_no_sense_are_named(arguments):
    layout = published_layout(published_model("DiT_Llama_600M_patch2"), True)
    with pytest.raises(UserError, match="a.pth: model_args has image_size=.*, vae=") as caught:
        describe_published(layout, arguments, True, "a.pth")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("size", [4, 250])
def test_an_image_size_that_makes_no_model_is_refused(size):
    layout = published_layout(published_model("DiT_Llama_600M_patch2"), True)
    with pytest.raises(UserError, match="model.input_size="):
        describe_published(layout, {"image_size": size}, True, "a.pth")


@pytest.mark.parametrize("name", PUBLISHED_SHAPES)
@pytest.mark.parametrize("image_size", [256, 512])
def test_model_args_of_a_published_model_describe_it_again(name, image_size):
    model = published_model(name, input_size=image_size // 8)
    description = describe(model, codec="sd-vae-ft-mse", latent_scale=0.18215)
    arguments = public_model_args(description)
    assert public_remark(description, FILE) is None
    assert arguments == {
        "model": name, "image_size": image_size, "num_classes": 1000, "qk_norm": True, "vae": "mse",
    }  # fmt: skip
    again = describe_published(published_layout(model, True), arguments, True, "a.pth")
    assert (again.model, again.codec, again.latent_scale) == (model, description.codec, description.latent_scale)


@pytest.mark.parametrize(
    "fields",
    [{"depth": 8}, {"num_heads": 16}, {"num_kv_heads": 8}, {"positions": "rope_1d_sincos_2d"}, {"num_classes": 10},
     {"adaln_rms_norm": False}, {"in_channels": 16}, {"patch_size": 4}, {"ffn_multiple_of": 512}],
)  # fmt: skip
def test_a_model_that_the_public_sampler_cannot_build_says_so(fields):
    model = published_model("DiT_Llama_600M_patch2", **{"num_classes": 1000, **fields} if "depth" not in fields else {})
    model = dataclasses.replace(model, **fields)
    remark = public_remark(describe(model), FILE)
    assert remark.startswith("note: the public sampler knows three shapes only") and "\n" not in remark


def test_pixels_are_not_counted_eightfold():
    arguments = public_model_args(describe(small_config(in_channels=1)))
    assert (arguments["image_size"], arguments["vae"]) == (8, "ema")


def dit_model(size, **fields):
    width, depth = DIT_SIZES[size]
    return model_of(hidden_size=width, depth=depth, num_heads=DIT_HEADS[size], ternary=False, **DIT, **fields)


def describe_dit(model, file, **told):
    return describe_published(published_layout(model, False), {}, True, f"checkpoints/{file}", Told(**told))


@pytest.mark.parametrize("size", DIT_SIZES)
@pytest.mark.parametrize("patch_size", [2, 4, 8])
@pytest.mark.parametrize("image_size", [256, 512])
def test_dit_of_every_size_is_described_by_its_shapes(size, patch_size, image_size):
    model = dit_model(size, patch_size=patch_size, input_size=image_size // 8, adaln_rms_norm=False)
    name = f"DiT-{size}-{patch_size}-{image_size}x{image_size}"
    description = describe_dit(model, f"{name}.pt")
    assert (description.name, description.model, description.step) == (name, model, None)
    assert (description.codec, description.latent_scale) == ("sd-vae-ft-ema", 0.18215)
    assert (description.diffusion, description.sample) == (DiffusionConfig(), SampleConfig())
    flags = f"--model=DiT-{size}/{patch_size} --image-size={image_size} --ckpt={FILE}"
    assert public_remark(description, FILE) == f"note: the public sampler of DiT takes it by {flags}"
    assert public_model_args(description)["image_size"] == image_size


@pytest.mark.parametrize("name", ["SiT-XL-2-256", "SiT-XL-2-256x256", "SiT-XL-2"])
def test_sit_is_told_by_its_name_alone(name):
    description = describe_dit(dit_model("XL"), f"{name}.pt")
    assert description.name == name and description.model == describe_dit(dit_model("XL"), "DiT-XL-2.pt").model
    assert (description.diffusion, description.sample) == (FLOW, SampleConfig(method="sde"))
    assert (description.sample.num_steps, description.sample.cfg_scale) == (250, 4.0)


@pytest.mark.parametrize(
    "name", ["0400000.pt", "dit-xl-2.pt", "sit-XL-2-256.pt", "my DiT-XL-2.pt", "DiT-XXL-2.pt", "DiT-XL-21.pt"]
)
@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_other_names_need_the_objective(name, objective):
    with pytest.raises(
        UserError, match=f"checkpoints/{name}: give .*: --objective=ddpm for DiT or flow for SiT .its name"
    ):
        describe_dit(dit_model("S"), name)
    assert describe_dit(dit_model("S"), name, objective=objective).diffusion.objective == objective


def test_other_sizes_need_the_number_of_heads():
    model = small_config(ternary=False, **DIT)
    with pytest.raises(
        UserError, match="DiT-S-2.pt: give .*: --num_heads .no size with width 32 and 2 layers"
    ) as caught:
        describe_dit(model, "DiT-S-2.pt")
    assert "--objective" not in str(caught.value)
    with pytest.raises(UserError, match="a.pt: give .*: --num_heads .*, --objective=ddpm for DiT"):
        describe_dit(model, "a.pt")
    for heads in (2, 4):
        found = describe_dit(model, "DiT-S-2.pt", num_heads=heads).model
        assert (found.num_heads, found.num_kv_heads) == (heads, heads)
    with pytest.raises(UserError, match="DiT-S-2.pt: makes no model: model.hidden_size=32 is not divisible by .*=5"):
        describe_dit(model, "DiT-S-2.pt", num_heads=5)


def test_a_published_size_and_name_say_more_than_the_caller():
    told = Told(num_heads=8, objective="flow")
    description = describe_dit(dit_model("S"), "DiT-S-2.pt", **vars(told))
    assert (description.model.num_heads, description.diffusion.objective) == (6, "ddpm")
    for field, message in (("num_heads", "has num_heads=6, but num_heads=8"), ("objective", "has objective=ddpm, but")):
        with pytest.raises(UserError, match=f"a.pt: {message}"):
            Told(**{field: getattr(told, field)}).check_agrees(description, "a.pt")
    for agreeing in (Told(), Told(6), Told(6, "ddpm"), Told(objective="ddpm")):
        agreeing.check_agrees(description, "a.pt")


@pytest.mark.parametrize(
    "fields", [{"num_heads": 0}, {"num_heads": True}, {"num_heads": "6"}, {"num_heads": 1 << 40}, {"num_heads": 6.0},
               {"objective": "sit"}, {"objective": ""}, {"objective": 3}],
)  # fmt: skip
def test_what_no_model_has_is_refused(fields):
    with pytest.raises(UserError, match=next(iter(fields))) as caught:
        Told(**fields).check()
    assert "\n" not in str(caught.value)


def test_a_model_without_the_variance_can_only_be_a_sit():
    model = dit_model("S", learn_sigma=False, adaln_rms_norm=False)
    assert describe_dit(model, "SiT-S-2.pt").model == model
    with pytest.raises(UserError, match="DiT-S-2.pt: a DiT has output channels for the variance, and this has none"):
        describe_dit(model, "DiT-S-2.pt")


def test_a_dit_of_pixels_has_no_autoencoder():
    description = describe_dit(dit_model("S", in_channels=3), "DiT-S-2.pt")
    assert (description.codec, description.latent_scale) == ("none", 1.0)


def test_sits_sampler_takes_the_variance_under_one_name_alone():
    def remark(**fields):
        return public_remark(describe(dit_model("XL", **fields), diffusion=FLOW), FILE)

    flags = f"--model=SiT-XL/2 --image-size=512 --ckpt={FILE}"
    assert remark(learn_sigma=False, input_size=64) == f"note: the public sampler of SiT takes it by {flags}"
    assert remark().endswith(f"of SiT takes a copy of {FILE} as pretrained_models/SiT-XL-2-256x256.pt")
    assert "this is none of them" in remark(input_size=64)


@pytest.mark.parametrize(
    "fields",
    [{"depth": 8}, {"num_heads": 8, "num_kv_heads": 8}, {"ternary": True}, {"num_classes": 10}, {"in_channels": 16},
     {"patch_size": 1}, {"input_size": 16}],
)  # fmt: skip
def test_a_model_that_dits_sampler_cannot_build_says_so(fields):
    model = dataclasses.replace(dit_model("S"), **fields)
    remark = public_remark(describe(model), FILE)
    assert remark.startswith("note: the public samplers of DiT and SiT know") and "\n" not in remark
