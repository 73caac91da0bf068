"""diffusers loads a folder for the Hub by its AutoModel, and computes what our JAX model computes."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import terdit_jax
from terdit_jax.errors import UserError
from terdit_jax.interop.exports import export
from terdit_jax.interop.weights import HUB_WEIGHTS
from tests.deployed import golden_weights, random_weights, small_config
from tests.golden_models import BY_CHANNEL, DIT
from tests.runs import ROOT

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

DIGITS = {  # of configs/digits.py
    "input_size": 8, "in_channels": 1, "patch_size": 4, "hidden_size": 96, "depth": 4, "num_heads": 4,
    "num_classes": 10, "positions": "rope_1d_sincos_2d",
}  # fmt: skip
MODELS = {
    "digits": lambda: random_weights(small_config(**DIGITS)),
    "TerDiT as published": lambda: golden_weights("terdit_tiny"),
    "Large-DiT as published": lambda: golden_weights("largedit_tiny"),
    "SiT as published": lambda: golden_weights("sit_tiny"),
    "ternary DiT": lambda: random_weights(small_config(**DIT, depth=1)),
    "ternary DiT by channel, a flow": lambda: random_weights(
        small_config(**DIT, **BY_CHANNEL, learn_sigma=False, depth=1)
    ),
}
SLOW = ("Large-DiT as published", "SiT as published", "ternary DiT by channel, a flow")


@pytest.fixture(autouse=True)
def modules(monkeypatch, tmp_path):
    """Code of folders is copied to a place of the test's own."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def auto_model(path, **options):
    return diffusers.AutoModel.from_pretrained(str(path), trust_remote_code=True, **options)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MODELS])
def test_its_output_is_ours(tmp_path, name):
    export(MODELS[name](), tmp_path / "hub", "hub")
    theirs, ours = auto_model(tmp_path / "hub"), terdit_jax.load_model(tmp_path / "hub", dtype="float32")
    config, flow = ours.config, ours.description.diffusion.objective == "flow"
    random = np.random.default_rng(0)
    x = random.normal(size=(3, *config.sample_shape)).astype(np.float32)
    t, y = np.array([999, 500, 0]), np.array([0, 1, config.num_classes])
    t = (t / 1000).astype(np.float32) if flow else t
    expected = np.asarray(ours(jnp.asarray(x), t, y))
    found = theirs(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t), torch.tensor(y)).permute(0, 2, 3, 1).numpy()
    error = np.abs(found[..., : expected.shape[-1]] - expected).max() / np.abs(expected).max()
    assert error < 1e-5 and theirs.dtype == torch.float32 and not theirs.training
    assert theirs.description["name"] == "tiny" and str(theirs.device) == "cpu"


def test_its_weights_stay_packed_and_checked(tmp_path):
    export(MODELS["digits"](), tmp_path / "hub", "hub")
    model = auto_model(tmp_path / "hub", torch_dtype=torch.bfloat16)
    packed = [tensor for tensor in model.state_dict().values() if tensor.dtype == torch.uint8]
    assert len(packed) == 4 * 8 and model.dtype == torch.bfloat16
    unpacked = auto_model(tmp_path / "hub", packed=False)
    assert all(tensor.dtype == torch.float32 for tensor in unpacked.state_dict().values())
    with pytest.raises(TypeError, match="no argument 'quantization_config'"):
        auto_model(tmp_path / "hub", quantization_config={})
    file = tmp_path / "hub" / HUB_WEIGHTS
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="fails its SHA-256"):
        auto_model(tmp_path / "hub")


def test_config_json_has_what_diffusers_needs_and_the_architecture(tmp_path):
    weights = MODELS["digits"]()
    export(weights, tmp_path / "hub", "hub")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config.pop("auto_map") == {"AutoModel": "terdit.TerDiT"} and config.pop("_class_name") == "TerDiT"
    assert config == weights.description.to_dict()["model"]
    assert (tmp_path / "hub/terdit.py").read_text() == (ROOT / "terdit_jax/interop/pytorch.py").read_text()
    with pytest.raises(ValueError, match="trust_remote_code"):
        diffusers.AutoModel.from_pretrained(str(tmp_path / "hub"))


def test_classes_go_by_their_names_as_in_diffusers(tmp_path):
    names = ("tench, Tinca tinca", *map(str, range(1, 9)), "ship")
    export(random_weights(small_config(**DIGITS), class_names=names), tmp_path / "hub", "hub")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["id2label"] == {str(label): name for label, name in enumerate(names)}
    for model in (auto_model(tmp_path / "hub"), terdit_jax.load_model(tmp_path / "hub")):
        assert model.get_label_ids(["ship", "tench", "Tinca tinca"]) == [9, 0, 0] and model.get_label_ids("ship") == [9]
        with pytest.raises((ValueError, UserError), match="cat"):
            model.get_label_ids(["ship", "cat"])
    export(MODELS["digits"](), tmp_path / "nameless", "hub")
    with pytest.raises(ValueError, match="'ship' is the name of no class"):
        auto_model(tmp_path / "nameless").get_label_ids("ship")


def test_a_name_on_the_hub_is_fetched(tmp_path, monkeypatch):
    """The part of it that is ours: diffusers has fetched the code, which fetches the weights."""
    export(MODELS["digits"](), tmp_path / "hub", "hub")
    model, asked = type(auto_model(tmp_path / "hub")), []

    def hf_hub_download(*names, **options):
        asked.append((names, options))
        return str(tmp_path / "hub" / names[1])

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    monkeypatch.chdir(tmp_path)
    model.from_pretrained("someone/digits", revision="v1", token=None, subfolder=None)
    assert asked == [(("someone/digits", HUB_WEIGHTS), {"revision": "v1", "subfolder": None})]


def test_it_draws_in_a_line_and_decodes_latents(tmp_path):
    export(MODELS["digits"](), tmp_path / "hub", "hub")
    images = auto_model(tmp_path / "hub").draw([3, 1], num_steps=2, seed=1)
    assert images.shape == (2, 8, 8, 1) and images.dtype == torch.uint8
    export(random_weights(small_config(), latent_scale=0.5), tmp_path / "latents", "hub")
    model = auto_model(tmp_path / "latents")

    class VAE:
        dtype = torch.bfloat16

        def decode(self, latents):
            assert latents.dtype == self.dtype and not torch.is_grad_enabled()
            self.latents = latents
            return SimpleNamespace(sample=latents[:, :3])

    vae = VAE()
    images = model.draw([0], vae=vae, num_steps=2)
    size = model.fields["input_size"]
    assert images.shape == (1, size, size, 3) and vae.latents.shape == (1, 4, size, size)
    with pytest.raises(ValueError, match="decode latents with their autoencoder"):
        model.draw([0], num_steps=2)
