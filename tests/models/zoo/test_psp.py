"""pSp and e4e: official numbers, files that are not what they should be, and back to the official layout.

An encoder has 123 million weights: each fixture is replayed once.
"""

from typing import Any

import pytest
import torch

from models.encoders.pyramid import Encoder4Editing, GradualStyleEncoder
from models.generators.stylegan2 import StyleGAN2Generator
from models.zoo import family
from models.zoo.family import Official, ZooError
from models.zoo.parity import Fixture, replay
from models.zoo.psp import export
from tests.models.zoo.fixtures import fixture_folder

CLASSES = {"psp": GradualStyleEncoder, "e4e": Encoder4Editing}


@pytest.mark.parametrize("name", CLASSES)
def test_numbers_of_the_official_network(name):
    fixture = Fixture.load(fixture_folder(f"{name}_encoder"))
    results = list(replay(fixture))
    assert len(results) == sum(map(len, fixture.targets().values())) and [r for r in results if not r.passed] == []
    encoder = fixture.memory["encoder"]
    assert type(encoder) is CLASSES[name] and encoder.num_ws == len(fixture.input("enc", "latent_avg"))


def encoder(name="psp", num_ws=8, **changes):
    torch.manual_seed(0)
    settings = {"w_dim": 6, "resolution": 32, "widths": (4, 6, 8, 10), "depths": (1, 2, 1, 1), "reduction": 2}
    built = CLASSES[name](num_ws, **(settings | changes)).eval()
    torch.nn.init.normal_(built.latent_avg)
    return built


def official(name="psp", *, add=None, drop=(), options=None, average: Any = ..., **changes):
    """A small file."""
    file = export({"encoder": encoder(name, **changes)})
    state = {key: value for key, value in (file["state_dict"] | (add or {})).items() if key not in drop}
    values = {"opts": file["opts"] | (options or {}), "latent_avg": file["latent_avg"] if average is ... else average}
    return Official({"state_dict": state}, {key: value for key, value in values.items() if value is not None})


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    "settings", [{}, {"num_ws": 2}, {"num_ws": 18}, {"channels": 1}, {"resolution": 64}, {"reduction": None}], ids=str
)
@torch.no_grad()
def test_configuration_is_read_off_the_file(name, settings):
    file, ours = official(name, **settings), encoder(name, **settings)
    found = family(name).convert(file, {})
    again = found.modules["encoder"]
    assert isinstance(again, GradualStyleEncoder) and type(again) is type(ours) and not again.training
    assert again.init_args == {k: list(v) if isinstance(v, tuple) else v for k, v in ours.init_args.items()}
    image = torch.rand(1, ours.channels, ours.resolution, ours.resolution)
    torch.testing.assert_close(again.codes(image).ws, ours.codes(image).ws)
    back = export(found.modules)
    assert family(name).export is export
    assert back["opts"] == file.values["opts"] and torch.equal(back["latent_avg"], file.values["latent_avg"])
    assert back["state_dict"].keys() == file.states["state_dict"].keys()
    assert all(torch.equal(back["state_dict"][key], value) for key, value in file.states["state_dict"].items())


@torch.no_grad()
def test_decoder():
    torch.manual_seed(0)
    generator = StyleGAN2Generator((4, 4, 4, 4), style_dim=6, mapping_layers=2)  # 32 px, 8 codes
    ours = encoder()
    file = export({"encoder": ours, "generator": generator})
    states = Official({"state_dict": file.pop("state_dict")}, file)
    found = family("psp").convert(states, {})
    again = found.modules["generator"]
    assert isinstance(again, StyleGAN2Generator) and "StyleGAN2 of 32 px" in found.found
    torch.testing.assert_close(again.w_avg, ours.latent_avg.mean(0))
    codes = ours.codes(torch.rand(1, 3, 32, 32))
    torch.testing.assert_close(again.synthesis(codes).image, generator.synthesis(codes).image)
    back = export(found.modules)["state_dict"]
    assert back.keys() == states.states["state_dict"].keys()
    assert all(torch.equal(back[key], value) for key, value in states.states["state_dict"].items())

    states.values["opts"]["start_from_latent_avg"] = False
    estimated = family("psp").convert(states, {}).modules["generator"]
    generator.update_mean()
    assert isinstance(estimated, StyleGAN2Generator)
    torch.testing.assert_close(estimated.w_avg, generator.w_avg)

    wrong = export({"encoder": encoder(num_ws=10), "generator": generator})
    with pytest.raises(ZooError, match="psp: the decoder takes 8 codes of 6, the encoder gives 32 px, 10 codes of 6"):
        family("psp").convert(Official({"state_dict": wrong.pop("state_dict")}, wrong), {})


def mean_code(file):
    encoder = family("psp").convert(file, {}).modules["encoder"]
    assert isinstance(encoder, GradualStyleEncoder)
    return encoder.latent_avg


def test_mean_code():
    mean = torch.randn(6)
    for given in (mean, mean[None]):
        assert torch.equal(mean_code(official(average=given)), mean.expand(8, 6))
    for file in (
        official(options={"start_from_latent_avg": False}),
        official(average=None, options={"start_from_latent_avg": False}),
    ):
        assert not mean_code(file).any()


def test_type_comes_from_the_options():
    psp, e4e, nameless = official("psp"), official("e4e"), official()
    nameless.values.pop("opts")
    assert [family(name).matches(psp) for name in CLASSES] == [True, False]
    assert [family(name).matches(e4e) for name in CLASSES] == [False, True]
    assert [family(name).matches(nameless) for name in CLASSES] == [True, True]
    assert not family("psp").matches(Official({"": {"a": torch.zeros(1)}}))
    with pytest.raises(ZooError, match="psp: the file holds a Encoder4Editing, not a GradualStyleEncoder"):
        family("psp").convert(e4e, {})


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (official(drop=["encoder.styles.5.linear.bias"]), r"the key 'styles\.5\.linear\.bias' is missing"),
        (official(drop=["encoder.styles.0.linear.weight"]), r"the key 'encoder\.styles\.0\.linear\.weight' is missing"),
        (official(drop=["encoder.body.4.res_layer.1.weight"]), r"its trunk has 3 stages, expected 4"),
        (official(add={"encoder.extra": torch.zeros(1)}), r"the key 'extra' is not known"),
        (official(add={"discriminator.weight": torch.zeros(1)}), r"the key 'discriminator\.weight' is not known"),
        (
            official(add={"encoder.latlayer1.bias": torch.zeros(3)}),
            r"'latlayer1\.bias' has shape \(3,\), expected \(10,\)",
        ),
        (official(average=torch.zeros(5, 6)), r"latent_avg has shape \(5, 6\), expected \(8, 6\)"),
        (official(average=None), r"start from latent_avg, which the file does not have"),
    ],
    ids=["missing", "mark", "stage", "extra", "part", "shape", "mean", "no mean"],
)
def test_first_mismatch_is_named(file, message):
    with pytest.raises(ZooError, match=message) as error:
        family("psp").convert(file, {})
    assert "\n" not in str(error.value)


def test_settings_are_refused():
    with pytest.raises(ZooError, match="e4e has no setting 'size'"):
        family("e4e").convert(official("e4e"), {"size": 1024})
