"""IR-SE identity networks: official numbers, files that are not what they should be, and the way back."""

import pytest
import torch

from models.encoders.irse import ArcFace
from models.zoo import irse50
from models.zoo.family import Official, ZooError
from models.zoo.parity import Fixture, replay
from tests.models.zoo.fixtures import fixture_folder

FAMILY = irse50.FAMILY


def test_numbers_of_the_official_network():
    fixture = Fixture.load(fixture_folder("irse50_id"))
    results = list(replay(fixture))
    assert len(results) == 6 and [r for r in results if not r.passed] == []


def official(changes=None, **settings):
    """A small file."""
    torch.manual_seed(0)
    network = ArcFace(
        **{"resolution": 32, "dim": 6, "widths": (4, 6, 8, 10), "depths": (1, 2, 1, 1), "reduction": 2} | settings
    )
    return irse50.official_state(network) | (changes or {})


@pytest.mark.parametrize("settings", [{}, {"reduction": None}, {"affine": False}, {"resolution": 64, "dim": 3}])
def test_configuration_is_read_off_the_file(settings):
    state = official(**settings)
    found = FAMILY.convert(Official({"": state}), {})
    network = found.modules["identity"]
    assert FAMILY.export is irse50.export
    assert {key: network.init_args[key] for key in settings} == settings
    assert not network.training and "IR" in found.found
    back = irse50.export(found.modules)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


def without(key):
    return {k: v for k, v in official().items() if k != key}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (without("body.2.res_layer.3.weight"), r"the key 'body\.2\.res_layer\.3\.weight' is missing"),
        (without("body.0.res_layer.1.weight"), r"the key 'body\.0\.res_layer\.1\.weight' is missing"),
        (official({"head.weight": torch.zeros(1)}), r"the key 'head\.weight' is not known"),
        (
            official({"body.1.res_layer.2.weight": torch.zeros(3)}),
            r"body\.1\.res_layer\.2\.weight' has shape \(3,\), exp",
        ),
        (
            official({"output_layer.3.weight": torch.zeros(3)}),
            r"'output_layer\.3\.weight' has shape \(3,\), expected 2 d",
        ),
        (without("output_layer.3.weight"), r"the file has no state dicts with a key 'output_layer\.3\.weight'"),
    ],
    ids=["missing", "first", "extra", "shape", "dimensions", "other"],
)
def test_first_mismatch_is_named(state, message):
    with pytest.raises(ZooError, match=message) as error:
        FAMILY.convert(Official({"": state}), {})
    assert "\n" not in str(error.value)


def test_settings_are_refused():
    with pytest.raises(ZooError, match="irse50 has no setting 'size'"):
        FAMILY.convert(Official({"": official()}), {"size": 112})


def test_matches():
    assert FAMILY.matches(Official({"": official()}))
    assert not FAMILY.matches(Official({"": without("output_layer.3.weight")}))
