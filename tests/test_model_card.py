"""The card says what is known of a model and names what is not; nothing that a file says becomes more than text."""

import dataclasses
import json

import pytest

from terdit_jax.config import RunConfig
from terdit_jax.config_sections import DataConfig, TrainConfig
from terdit_jax.errors import UserError
from terdit_jax.interop.model_card import CardFacts, make_card, read_scores
from tests.deployed import random_weights, small_config
from tests.golden_models import DIT

SCORES = {
    "fid": 12.345678, "num_samples": 5000, "seconds": 99.5, "network": {"sha256": "ab"},
    "flags": {"samples": "/home/me/secret/samples.npz", "cfg_scale": 1.5, "method": None},
}  # fmt: skip


def card_of(weights, name="digits_hub", **facts):
    return make_card(weights, CardFacts(name, **facts), 123_456)


def of_run(**train):
    """Weights of a run of four fields that are not at their default."""
    weights = random_weights(small_config(in_channels=1), provenance={"data_fingerprint": "abc", "seed": "5"})
    config = RunConfig(data=DataConfig(dir="/home/me/secret/cifar10"), train=TrainConfig(batch_size=96, **train))
    return dataclasses.replace(weights, run={"config": config.to_dict()})


def test_a_run_tells_its_data_and_its_recipe():
    card = card_of(of_run(init_from="/home/me/secret/before", teacher="~/secret/large.safetensors"))
    for said in (
        "| Data set | `cifar10` |", "| Fingerprint | `abc` |", "| Encoded by | nothing, pixels |", "| Steps | 7 |",
        "| Images seen | 672, 96 a step |", "| seed | `5` |", "| Started from | `before` |",
        "| Taught by | `large.safetensors` |", "\ntrain.batch_size=96\n", "\noptimizer.learning_rate=0.0005\n",
        "this file: 0.1 MB", "None were given.", "None was given for the weights.",
    ):  # fmt: skip
        assert said in card
    assert "secret" not in card  # paths of the machine that it was made on


def test_what_a_file_does_not_record_is_named_as_such():
    card = card_of(random_weights(small_config(), step=None, provenance={}))
    for said in (
        "| Data set | not recorded in the weights |",
        "| Steps | not recorded |",
        "records no more of the train",
    ):
        assert said in card
    assert "Images seen" not in card and "train." not in card


def test_scores_and_licence_are_those_that_were_given(tmp_path):
    (tmp_path / "scores.json").write_text(json.dumps(SCORES))
    card = card_of(of_run(), licence="cc-by-nc-4.0", scores=read_scores(tmp_path / "scores.json"))
    assert "| `fid` | 12.3457 |\n| `num_samples` | 5,000 |\n" in card and "seconds" not in card
    assert "Measured with `samples=samples.npz, cfg_scale=1.5`." in card
    assert card.startswith("---\nlicense: cc-by-nc-4.0\n") and "The weights: cc-by-nc-4.0." in card


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("[1]", "not a JSON dict"),
        ("{'fid': 1}", "not sound JSON"),
        ('{"fid": NaN}', "NaN is no number of JSON"),
        ('{"fid": true, "name": "x", "seconds": 1}', "holds no numbers"),
        (" " * (2 << 20), "too long for scores"),
    ],
)
def test_scores_that_are_none_are_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "scores.json").write_text(content)
    with pytest.raises(UserError, match=f"--scores=.*{message}"):
        read_scores(tmp_path / "scores.json")


@pytest.mark.parametrize("licence", ["", "MIT License", "mit\nlibrary_name: x", "Apache-2.0", "-", "x" * 99])
def test_a_licence_that_the_hub_does_not_write_so_is_refused(licence):
    with pytest.raises(UserError, match="^--license="):
        CardFacts("x", licence)


@pytest.mark.parametrize(
    ("overrides", "fields", "kind", "papers"),
    [
        ({}, {}, "TerDiT", ["TerDiT", "DiT"]),
        ({"ternary": False}, {}, "Large-DiT", ["DiT"]),
        (DIT, {}, "ternary DiT", ["TerDiT", "DiT"]),
        ({**DIT, "ternary": False, "learn_sigma": False}, {}, "SiT", ["DiT", "SiT"]),
    ],
)
def test_the_kind_of_model_is_named(overrides, fields, kind, papers):
    card = card_of(random_weights(small_config(**overrides), **fields))
    assert f"| Kind | {kind}, class-" in card
    (line,) = [line for line in card.splitlines() if line.startswith("| Papers")]
    assert [part.split("]")[0] for part in line.split("[")[1:]] == papers
    assert ("- ternary\n" in card) == ("Ter" in kind or "ter" in kind)


@pytest.mark.parametrize(
    ("codec", "vae"), [("sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse"), ("vae-1234-float32", "FOLDER_OF_THE_AUTOENC")]
)
def test_latents_are_decoded_by_their_autoencoder(codec, vae):
    card = card_of(random_weights(small_config(), codec=codec), name='a"b')
    assert f'AutoencoderKL.from_pretrained("{vae}' in card and f'load_vae("{vae}' in card
    assert r'load_model("a\"b")' in card and f"| Encoded by | `{codec}` |" in card


def test_classes_are_named_as_far_as_there_is_room():
    names = tuple(f"class {label}" for label in range(12))
    few = card_of(random_weights(small_config(num_classes=2), class_names=names[:2]))
    many = card_of(random_weights(small_config(num_classes=12), class_names=names))
    assert "| Classes | 2 `class 0, class 1` |" in few
    assert f"| Classes | 12 `{', '.join(names[:10])}` ... |" in many
    assert "| Classes | 12 |" in card_of(random_weights(small_config(num_classes=12)))


def test_text_of_others_stays_text():
    evil = "`x` | y\n## Licence\n<b>mit</b>"
    names = (evil,) * small_config().num_classes
    weights = random_weights(small_config(), name=evil, codec=evil, provenance={evil: evil}, class_names=names)
    card = card_of(weights, scores={"a`|\n## b": 1.0, "flags": {"c\n## d": "e\n## f"}})
    headings = [line for line in card.splitlines() if line.startswith("#")]
    sections = ("Use", "Model", "Data", "Recipe", "Scores", "Size", "Licence")
    assert headings == ["# x  y Licencebmit/b", *(f"## {name}" for name in sections)]


@pytest.mark.parametrize("config", [{"train": {"batch_size": "many"}}, None, [1], {"data": {"dir": 3}}])
def test_a_forged_run_is_one_line(config):
    weights = dataclasses.replace(of_run(), run={"config": config})
    with pytest.raises(UserError, match="^memory: its checkpoint('s config.[a-z_.]+=| does not describe a run)"):
        card_of(weights)


def test_the_hub_reads_the_front_matter():
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(card_of(of_run(), licence="mit"))
    assert (card.data.license, card.data.library_name) == ("mit", "terdit_jax")
    assert card.data.pipeline_tag == "unconditional-image-generation" and "ternary" in card.data.tags
    assert card.text.lstrip().startswith("# tiny")
