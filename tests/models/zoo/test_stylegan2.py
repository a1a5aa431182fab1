"""StyleGAN2: official numbers, files that are not what they should be, and back to the official layout."""

import pytest
import torch
from torch.testing import assert_close

from models.generators.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from models.zoo import family, recognise
from models.zoo.family import Official, ZooError
from models.zoo.parity import Fixture, replay
from models.zoo.stylegan2 import convert, official_generator
from tests.models.generators.protocol import awaken
from tests.models.zoo.fixtures import fixture_folder

SIZES = {"channels": (6, 5, 4), "style_dim": 7, "mapping_layers": 3}
FAMILY = family("stylegan2")


@pytest.mark.parametrize("name", ["stylegan2_rosinality_64", "stylegan2_rosinality_256"])
def test_numbers_of_the_official_network(name):
    fixture = Fixture.load(fixture_folder(name))
    results = list(replay(fixture))
    assert len(results) == sum(map(len, fixture.targets().values()))
    assert [result for result in results if not result.passed] == []


def networks(**changes):
    torch.manual_seed(0)
    generator = awaken(StyleGAN2Generator(**{**SIZES, **changes}))
    generator.update_mean(64)
    taps = changes.get("taps", (1, 3, 3, 1))
    channels = changes.get("channels", SIZES["channels"])[::-1]
    return {"generator": generator, "discriminator": awaken(StyleGAN2Discriminator(channels, taps=taps))}


def official(*, add=None, drop=(), values=None, states=("g_ema", "d"), **changes):
    """A small file."""
    file = FAMILY.export(networks(**changes))
    found = {name: {k: v for k, v in {**file[name], **(add or {})}.items() if k not in drop} for name in states}
    return Official(found, {"latent_avg": file["latent_avg"]} if values is None else values)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channels": (3, 2)},
        {"channels": (4, 8, 2, 2)},
        {"mapping_layers": 8},
        {"mapping_lr": 0.1},
        {"style_dim": 4},
        {"taps": (1, 1)},
        {"taps": (1, 4, 6, 4, 1)},
    ],
    ids=str,
)
@torch.no_grad()
def test_configuration_is_read_off_the_file_and_written_back(changes):
    ours, file = networks(**changes), official(**changes)
    assert recognise(file) is FAMILY
    found = FAMILY.convert(file, {"lr_mlp": changes["mapping_lr"]} if "mapping_lr" in changes else {})
    generator, discriminator = found.modules["generator"], found.modules["discriminator"]
    z = ours["generator"].sample_z(4, torch.Generator().manual_seed(0))
    image = ours["generator"](z).image
    assert_close(generator(z).image, image)
    assert_close(discriminator(image).logits, ours["discriminator"](image).logits)
    assert_close(generator.mapping(z, truncation=0.5).ws, ours["generator"].mapping(z, truncation=0.5).ws)
    assert f"{generator.resolution} px, {generator.num_ws} codes" in found.found
    back = FAMILY.export(found.modules)
    assert list(back) == ["g_ema", "latent_avg", "d"] and torch.equal(back["latent_avg"], file.values["latent_avg"])
    for name, state in file.states.items():
        assert list(back[name]) == list(state)
        for key, tensor in state.items():
            assert_close(back[name][key], tensor, atol=1e-7 if key.endswith("kernel") else 0, rtol=0)


def test_official_order_of_keys():
    fixture = Fixture.load(fixture_folder("stylegan2_rosinality_64"))
    file = FAMILY.export(networks(channels=(2,) * 5, mapping_layers=8))
    for name, model in (("g_ema", "generator"), ("d", "discriminator")):
        assert list(file[name]) == [key for key, _, _ in fixture.meta["models"][model]["state_dict"]]


@torch.no_grad()
def test_files_hold_different_networks():
    file = official()
    g_ema, d = file.states["g_ema"], file.states["d"]
    bare = FAMILY.convert(Official({"": g_ema}), {})
    assert list(bare.modules) == ["generator"] and "estimated" in bare.found
    assert bare.modules["generator"].w_avg.abs().max() > 0
    assert list(FAMILY.convert(Official({"": d}), {}).modules) == ["discriminator"]
    training = Official({"g": {k: v + 1 for k, v in g_ema.items()}, "d": d, "g_ema": g_ema}, file.values)
    assert_close(FAMILY.convert(training, {}).modules["generator"].state_dict(), bare_state(file))
    named = Official({"faces/g_ema": g_ema}, {"faces/latent_avg": file.values["latent_avg"][None]})
    assert_close(FAMILY.convert(named, {}).modules["generator"].w_avg, file.values["latent_avg"])
    assert not FAMILY.matches(Official({"": {"weight": torch.zeros(1)}})) and not FAMILY.matches(Official({}))


def bare_state(file):
    return FAMILY.convert(Official({"g_ema": file.states["g_ema"]}, file.values), {}).modules["generator"].state_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": ["convs.1.noise.weight"]}, "g_ema: the key 'convs.1.noise.weight' is missing"),
        ({"drop": ["to_rgbs.0.upsample.kernel"]}, "g_ema: the key 'to_rgbs.0.upsample.kernel' is missing"),
        ({"add": {"convs.9.weight": torch.zeros(1)}}, "g_ema: the key 'convs.9.weight' is not known"),
        (
            {"add": {"convs.0.conv.weight": torch.zeros(1, 5, 5, 3, 3)}},
            r"'convs.0.conv.weight' has shape \(1, 5, 5, 3, 3\), expected \(1, 5, 6, 3, 3\)",
        ),
        ({"add": {"to_rgb1.conv.weight": torch.zeros(3)}}, "'to_rgb1.conv.weight' has shape .3,., expected 5 dim"),
        ({"add": {"convs.0.conv.blur.kernel": torch.eye(4)}}, "'convs.0.conv.blur.kernel' is another filter"),
        ({"values": {"latent_avg": torch.zeros(3)}}, r"'latent_avg' has shape \(3,\), expected \(7,\)"),
        ({"states": ["d"], "drop": ["convs.1.skip.1.weight"]}, "d: the key 'convs.1.skip.1.weight' is missing"),
        ({"states": ["d"], "add": {"extra": torch.zeros(1)}}, "d: the key 'extra' is not known"),
        ({"states": []}, "no network in the file has the key 'style.1.weight'"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(changes, message):
    with pytest.raises(ZooError, match=message) as error:
        FAMILY.convert(official(**changes), {})
    assert "\n" not in str(error.value)


def test_settings_and_modules_of_others_are_refused():
    with pytest.raises(ZooError, match="no setting 'fov', but: lr_mlp"):
        FAMILY.convert(official(), {"fov": 12})
    modules = networks()
    with pytest.raises(ZooError, match="StyleGAN2Generator named generator"):
        FAMILY.export({"discriminator": modules["discriminator"]})
    with pytest.raises(ZooError, match="not a StyleGAN2Generator"):
        FAMILY.export({**modules, "discriminator": modules["generator"]})


class TestNoiseMaps:
    """Files of before they were saved: constants that nothing has trained."""

    def state(self):
        torch.manual_seed(0)
        return {k: t.clone() for k, t in official_generator(StyleGAN2Generator(channels=(8, 8), style_dim=8)).items()}

    def test_are_drawn_where_there_are_none(self):
        state = {key: tensor for key, tensor in self.state().items() if not key.startswith("noises.")}
        first, second = (convert(Official({"g_ema": state}, {}), {}) for _ in range(2))
        assert "noise maps drawn" in first.found
        a, b = (found.modules["generator"].state_dict() for found in (first, second))
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert all(a[key].std() > 0.5 for key in a if key.endswith(".noise"))

    def test_some_that_are_missing_are_refused(self):
        state = self.state()
        del state["noises.noise_1"]
        with pytest.raises(ZooError, match=r"noises\.noise_1' is missing"):
            convert(Official({"g_ema": state}, {}), {})

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
    def test_numbers_of_another_kind(self, dtype):
        state = self.state()
        state["style.1.weight"] = state["style.1.weight"].to(dtype)
        with pytest.raises(ZooError, match=r"style\.1\.weight' is of"):
            convert(Official({"g_ema": state}, {}), {})
