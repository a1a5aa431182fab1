"""AniFaceGAN against the official numbers, and its files."""

import pytest
import torch

from models.zoo import anifacegan, parity, recognise
from models.zoo.family import Official, ZooError
from tests.models.generators.test_anifacegan import make
from tests.models.zoo.fixtures import fixture_folder

SIZES = {
    "img_size": 16, "num_steps": 6, "levels_start": 200, "levels_end": 60, "center": (0, 0, -12.5),
}  # fmt: skip


def files():
    """Small official files."""
    torch.manual_seed(0)
    return anifacegan.export({"generator": make(box=0.24)})


def test_parity():
    for comparison in parity.replay(parity.Fixture.load(fixture_folder("anifacegan"))):
        assert comparison.passed, comparison


def test_round_trip():
    official = Official(files())
    assert recognise(official) is anifacegan.FAMILY
    converted = anifacegan.FAMILY.convert(official, SIZES)
    generator = converted.modules["generator"]
    expected = make(box=0.24).init_args
    assert {name: generator.init_args[name] for name in expected} == expected
    exported = anifacegan.FAMILY.export(converted.modules)
    assert exported.keys() == official.states.keys()
    for name, state in official.states.items():
        assert exported[name].keys() == state.keys()
        assert all(torch.equal(exported[name][key], state[key]) for key in state)


def test_files_go_by_their_keys():
    """Renamed files are still known; two VAEs without a telling name are told apart by their sizes."""
    names = {"generator": "a", "dif": "b", "expression/vae": "c", "identity/vae": "d"}
    official = Official({names[name]: state for name, state in files().items()})
    assert len(anifacegan.convert(official, {}).modules["generator"].expressions) == 4
    names = {"generator": "a", "dif": "b", "expression/vae": "identity/vae", "identity/vae": "expression/vae"}
    official = Official({names[name]: state for name, state in files().items()})
    assert len(anifacegan.convert(official, {}).modules["generator"].expressions) == 5


def test_moving_average_overrides_the_generator():
    official = files()
    average = [tensor + 1 for tensor in official["generator"].values()]
    converted = anifacegan.convert(Official(official, {"ema/shadow_params": average}), SIZES)
    exported = anifacegan.export(converted.modules)
    assert all(torch.equal(exported["generator"][key], tensor + 1) for key, tensor in official["generator"].items())
    assert all(torch.equal(exported["dif"][key], tensor) for key, tensor in official["dif"].items())


@pytest.mark.parametrize("name", ["generator", "dif", "identity/vae"])
def test_missing_files_are_named(name):
    official = files()
    del official[name]
    with pytest.raises(ZooError, match=r"files with a (generator|deformation|VAE); needed are generator.pth"):
        anifacegan.convert(Official(official), {})


@pytest.mark.parametrize(
    ("name", "key", "change", "message"),
    [
        ("generator", "siren.output_color.1.bias", None, "generator: the key 'siren.output_color.1.bias' is missing"),
        ("dif", "final_layer.bias", None, "deformation: the key 'final_layer.bias' is missing"),
        ("identity/vae", "decoder.1.0.weight", None, "identity: the key 'decoder.1.0.weight' is missing"),
        ("expression/vae", "fc_var.bias", (2,), r"'fc_var.bias' has shape \(2,\)"),
        ("dif", "other", (1,), "deformation: the key 'other' is not known"),
        ("identity/vae", "encoder.0.0.weight", (1,), "'encoder.0.0.weight' has shape"),
    ],
)
def test_wrong_keys_are_named(name, key, change, message):
    official = files()
    official[name].pop(key, None)
    if change:
        official[name][key] = torch.zeros(change)
    with pytest.raises(ZooError, match=message) as caught:
        anifacegan.convert(Official(official), {})
    assert "\n" not in str(caught.value)


def test_unknown_settings_are_named():
    with pytest.raises(ZooError, match="no setting 'preset', but: img_size"):
        anifacegan.convert(Official(files()), {"preset": "ffhq"})


def test_only_its_own_generators_are_exported():
    with pytest.raises(ZooError, match="is not an AniFaceGANGenerator"):
        anifacegan.export({"generator": make().identity_vae})
