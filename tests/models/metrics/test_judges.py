"""What scores are told by: each network names its own, and what is missing is left out."""

import pytest
import torch

from models.errors import UserError
from models.features.attributes import SegmentShares
from models.features.base import Frozen, frozen_of
from models.features.embedded import EmbeddedIdentity, EmbeddedLPIPS, EmbeddedParser, EmbeddedStyle
from models.metrics.distribution import EmbeddedDistribution
from models.metrics.judges import Judges


@pytest.fixture(scope="module")
def judges():
    return Judges(
        EmbeddedLPIPS(weights=None),
        EmbeddedIdentity(weights=None),
        EmbeddedStyle(weights=None),
        EmbeddedDistribution(weights=None),
        [SegmentShares(EmbeddedParser(weights=None))],
    )


@pytest.mark.parametrize(
    ("metric", "network"),
    [
        ("psnr_twin", ""),
        ("psnr_train_held_out", ""),
        ("lpips", "EmbeddedLPIPS"),
        ("lpips_source", "EmbeddedLPIPS"),
        ("diversity", "EmbeddedLPIPS"),
        ("id_photo", "EmbeddedIdentity"),
        ("cmmd", "EmbeddedStyle"),
        ("style_reference", "EmbeddedStyle"),
        ("fid", "EmbeddedDistribution"),
        ("kid", "EmbeddedDistribution"),
        ("recall", "EmbeddedDistribution"),
    ],
)
def test_a_score_names_its_network(judges, metric, network):
    assert judges.network(metric) == network


def test_attributes_are_told_by_their_scorer(judges):
    names = judges.attributes[0].module.names
    assert names and all(judges.network(f"{name}_error_photo") == "SegmentShares" for name in names)


@torch.no_grad()
def test_likeness(judges):
    found, truth = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scores = judges.likeness(found, truth)
    assert torch.equal(scores["lpips"], judges.perceptual.module(found, truth))
    assert {name for name in scores if name.endswith("_error")} == {
        f"{name}_error" for name in judges.attributes[0].module.names
    }
    assert list(Judges().likeness(found, truth)) == ["psnr"]


def test_what_is_missing_tells_nothing():
    assert Judges().network("lpips") == Judges().network("kid") == ""


def test_its_networks_are_frozen_and_its_owners(judges):
    class Owner:
        pass

    owner = Owner()
    owner.judges, owner.other = judges, Frozen(EmbeddedIdentity(weights=None))
    held = list(frozen_of(owner))
    assert len(held) == 6 and owner.other in held
    assert not any(p.requires_grad for network in held for p in network.module.parameters())


def test_a_network_that_scores_no_attribute():
    with pytest.raises(UserError, match="EmbeddedIdentity scores no attributes"):
        Judges(attributes=[EmbeddedIdentity(weights=None)])


@pytest.mark.parametrize("kind", [EmbeddedIdentity, EmbeddedDistribution])
def test_other_weights_are_named(kind):
    """Two networks of one class are told apart in tables."""
    shipped, other = Judges(identity=kind()), Judges(identity=kind(weights="assets/features"))
    assert (shipped.network("id"), other.network("id")) == (kind.__name__, f"{kind.__name__} (features)")
