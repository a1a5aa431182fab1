"""GRAM against the official numbers, and its files."""

import math

import pytest
import torch
from torch.testing import assert_close

from models.zoo import gram, parity, recognise
from models.zoo.family import Official, ZooError
from tests.models.zoo.fixtures import fixture_folder

NAMES = ("gram_face_like", "gram_carla_like")
KEY = "representation.rf_network.output_sigma.3.weight"


@pytest.fixture(scope="module")
def state():
    return parity.Fixture.load(fixture_folder(NAMES[0])).state("generator")


@pytest.mark.parametrize("name", NAMES)
def test_parity(name):
    for comparison in parity.replay(parity.Fixture.load(fixture_folder(name))):
        assert comparison.passed, comparison


def test_round_trip(state):
    official = Official({"": state})
    assert recognise(official) is gram.FAMILY
    converted = gram.FAMILY.convert(official, {"preset": "cats", "img_size": 32})
    assert "cats" in converted.found and converted.modules["generator"].resolution == 32
    exported = gram.FAMILY.export(converted.modules)
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[key], state[key]) for key in state)


def test_moving_average_overrides(state):
    average = [tensor + 1 for tensor in state.values()]
    official = Official({"generator": state}, {"ema/shadow_params": average, "ema/decay": 0.999})
    exported = gram.export(gram.convert(official, {}).modules)
    assert all(torch.equal(exported[key], tensor + 1) for key, tensor in state.items())
    with pytest.raises(ZooError, match=f"shadow_params has {len(state) - 1} parameters"):
        gram.convert(Official({"": state}, {"shadow_params": average[1:]}), {})
    with pytest.raises(ZooError, match=r"in shadow_params .*sample_network.network.0.weight"):
        gram.convert(Official({"": state}, {"shadow_params": average[::-1]}), {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(KEY), f"the key '{KEY}' is missing"),
        (lambda s: s.update(other=torch.zeros(1)), "the key 'other' is not known"),
        (lambda s: s.update({KEY: torch.zeros(2, 64)}), rf"'{KEY}' has shape \(2, 64\), expected \(1, 64\)"),
        (lambda s: s.pop("representation.rf_network.network.0.layer.weight"), r"network.0.layer.weight' is missing"),
        (lambda s: s.update({KEY.replace("3", "0"): torch.zeros(1)}), "has shape"),
    ],
)
def test_wrong_keys_are_named(state, change, message):
    changed = dict(state)
    change(changed)
    with pytest.raises(ZooError, match=message) as caught:
        gram.convert(Official({"": changed}), {})
    assert "\n" not in str(caught.value)


def test_settings(state):
    official = Official({"": state})
    generator = gram.convert(official, {"preset": "carla", "levels_start": 30, "v_stddev": 0.2}).modules["generator"]
    assert generator.levels[0] == 30 and len(generator.levels) == 48 and generator.white_back
    assert generator.rig.distribution == "uniform" and generator.rig.pitch_max == 0.2
    assert generator.rig.pitch_mean == pytest.approx(math.radians(47.5))  # cars are seen from above
    with pytest.raises(ZooError, match="no setting 'colour', but: preset"):
        gram.convert(official, {"colour": 1})
    with pytest.raises(ZooError, match="no preset 'dogs', but: ffhq"):
        gram.convert(official, {"preset": "dogs"})
    with pytest.raises(ZooError, match="a setting is wrong: colour_clamp must be"):
        gram.convert(official, {"rgb_clamp_mode": "tanh"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"img_size": 0}, "img_size must be at least 2, not 0"),
        ({"img_size": -3}, "gram: img_size must be a whole number, not -3"),
        ({"img_size": True}, "gram: img_size must be a whole number, not True"),
        ({"num_samples": 2.5}, "gram: num_samples must be a whole number, not 2.5"),
        ({"num_samples": 1}, "num_samples must be at least 2, not 1"),
        ({"num_manifolds": 1}, "num_manifolds must be at least 2, not 1"),
        ({"fov": 180}, "fov must be between 0 and 180 degrees, not 180"),
        ({"fov": math.nan}, "gram: fov must be a number, not nan"),
        ({"normalize": 0}, "normalize must be above 0, not 0"),
        ({"center": [1, 2]}, r"gram: center must be 3 numbers, not \[1, 2\]"),
        ({"background": "maybe"}, "gram: background must be true or false, not 'maybe'"),
        ({"preset": 3}, "gram: preset must be text, not 3"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(state, settings, message):
    with pytest.raises(ZooError, match=message):
        gram.convert(Official({"": state}), settings)


@pytest.mark.parametrize("average", [5, [1, 2]])
def test_what_is_no_moving_average(state, average):
    with pytest.raises(ZooError, match="generator: shadow_params is not a list of tensors"):
        gram.convert(Official({"generator": state}, {"ema/shadow_params": average}), {})


def test_one_manifold_without_background(state):
    settings = {"preset": "carla", "num_manifolds": 1}
    assert len(gram.convert(Official({"": state}), settings).modules["generator"].levels) == 1


def test_the_mean_code_is_estimated(state):
    generator = gram.convert(Official({"": state}), {}).modules["generator"]
    z = generator.sample_z(4_000, torch.Generator().manual_seed(7))
    with torch.no_grad():
        mean = generator.mapping(z).ws.mean(0)
    assert_close(generator.mean_latents.ws[0], mean, atol=0.05, rtol=0)


def test_only_gram_generators_are_exported():
    with pytest.raises(ZooError, match="is not a GRAMGenerator"):
        gram.export({"generator": None})
