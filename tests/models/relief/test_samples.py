"""From where pseudo samples are seen, under which lights, and when."""

import math

import pytest
import torch

from models.errors import UserError
from models.relief.recipe import ShapeRecipe
from models.relief.samples import PseudoSampling, agreed, behind


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def test_views_have_the_spread_that_was_fitted():
    """The root of the mean square around the front; yaw a little more; none beyond the largest."""
    angles = torch.tensor([[0.3, 0.1], [-0.4, 0.05]])
    sampling = PseudoSampling(roll_std_deg=2.0, shift_std=0.01)
    spread = sampling.spread(angles)
    torch.testing.assert_close(spread, angles.square().mean(0).sqrt().flip(0))
    found = sampling.views(20_000, spread, draws()).std(0)
    wanted = torch.tensor([spread[0], 1.2 * spread[1], math.radians(2), 0.01, 0.01, 0.0])
    torch.testing.assert_close(found, wanted, rtol=0.03, atol=1e-6)
    assert float(sampling.views(500, 9 * spread, draws())[:, :3].abs().max()) == pytest.approx(math.radians(60))


def test_what_is_given_is_not_fitted():
    sampling = PseudoSampling(yaw_std_deg=10.0, pitch_std_deg=5.0)
    assert not sampling.fitted and PseudoSampling(yaw_std_deg=10.0).fitted
    torch.testing.assert_close(sampling.spread(), torch.deg2rad(torch.tensor([5.0, 10.0])))


def test_lights_are_those_of_the_source():
    """GAN2Shape: slopes within their ranges; what is added to the diffuse light dims the ambient one."""
    found = PseudoSampling().lights(torch.tensor([0.5, 0.4, 9.0, 9.0]), 5000, draws())
    added = found[:, 1] - 0.4
    torch.testing.assert_close(found[:, 0], 0.5 - 0.6 * added)
    for values, low, high in ((added, -0.1, 0.6), (found[:, 2], -1.0, 1.0), (found[:, 3], -0.2, 0.8)):
        assert low <= float(values.min()) < low + 0.01 and high - 0.01 < float(values.max()) <= high


def test_phases():
    """Lengths of the first cycle and of the others; what has no steps is left out."""
    recipe = ShapeRecipe(cycles=3, prior=5, first=(4, 3, 2), later=(1, 0, 2))
    names = [(p.name, p.cycle, p.begin, p.end) for p in recipe.phases]
    first = [("prior", 0, 0, 5), ("albedo", 1, 5, 9), ("project", 1, 9, 12), ("joint", 1, 12, 14)]
    assert names == [*first, ("albedo", 2, 14, 15), ("joint", 2, 15, 17), ("albedo", 3, 17, 18), ("joint", 3, 18, 20)]
    assert recipe.steps == 20 and recipe.ends == [5, 14, 17, 20]
    assert [recipe.at(step).name for step in (0, 4, 5, 11, 12, 19)] == [
        "prior", "prior", "albedo", "project", "joint", "joint",
    ]  # fmt: skip
    assert [recipe.roughens(p) for p in recipe.phases] == [False, False, True, False, False, True, False, True]
    assert [recipe.mirrors(p) for p in recipe.phases].count(True) == 8
    once = ShapeRecipe(cycles=2, mirror_in="first")
    assert [(p.name, p.cycle) for p in once.phases if once.mirrors(p)] == [("joint", 1)]


def test_the_sources_lengths():
    """GAN2Shape's for faces, four cycles as the paper has."""
    assert ShapeRecipe().steps == 1000 + 600 + 600 + 400 + 3 * (200 + 500 + 300)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cycles": 0}, r"recipe\.cycles is 0"),
        ({"first": (1, 1, 0)}, "of which step 3 has some"),
        ({"mirror_in": "last"}, "take every or first"),
        ({"samples": 0, "paper_only": True}, r"recipe\.samples must not be 0"),
    ],
)
def test_recipes_that_cannot_be(options, said):
    with pytest.raises(UserError, match=said):
        ShapeRecipe(**options)


def test_samplings_that_cannot_be():
    with pytest.raises(UserError, match=r"sampling\.dx is from 1.* give the lower end first"):
        PseudoSampling(dx=(1.0, -1.0))
    with pytest.raises(UserError, match=r"sampling\.yaw_std_deg is -1"):
        PseudoSampling(yaw_std_deg=-1.0)


def test_what_is_behind_a_head():
    """A slope of colour goes on behind it; nothing of the head's colour is left, nor of its blurred rim."""
    size = 48
    slope = torch.linspace(-0.5, 0.5, size).expand(1, 3, size, size)
    at = torch.linspace(-1, 1, size)
    distance = (at[None].square() + at[:, None].square()).sqrt()
    head = (0.5 + 6 * (0.5 - distance)).clamp(0, 1)[None, None]
    found = behind(torch.lerp(slope, torch.ones_like(slope), head), head)
    inner = head.expand_as(found) > 0.99
    assert float((found - slope)[inner].abs().max()) < 0.35
    assert float(found[..., : size // 4].mean()) < -0.15 < 0.15 < float(found[..., -size // 4 :].mean())
    assert float((found + found.flip(-1)).abs().max()) < 0.05  # as even as the slope: the white head is gone


def test_rates():
    recipe = ShapeRecipe(learning_rate=1e-3, rates={"D": 4e-3})
    assert [recipe.rate(network) for network in "VLDAE"] == [1e-3, 1e-3, 4e-3, 1e-3, 1e-3]


@pytest.mark.parametrize("rates", [{"X": 1e-3}, {"D": 0.0}, {"D": -1.0, "A": 1.0}])
def test_rates_that_are_none(rates):
    with pytest.raises(UserError, match="positive rates of V, L, D, A, E"):
        ShapeRecipe(rates=rates)


def test_what_offsets_have_in_common():
    """A smooth function of view and light comes back without each sample's own error; where nothing moved is none."""
    turned, lit = 0.3 * torch.randn(2, 400, 2, generator=draws()), torch.rand(2, 400, 1, generator=draws(1))
    x, y = turned.unbind(-1)
    smooth = torch.stack([x - 2 * x * y, 3 * y + y * y, torch.zeros_like(x), x - lit[..., 0]], -1)
    smooth[1] *= -2  # each head has its own
    own = 0.5 * torch.randn(smooth.shape, generator=draws(2))
    found = agreed(smooth + own, turned, lit)
    error = (found - smooth).square().mean((1, 2)).sqrt()
    assert found.dtype == smooth.dtype and float(error.max()) < 0.12
    moved = torch.zeros(1, 5, 2)
    assert torch.equal(agreed(own[:1, :5], moved, moved), torch.zeros_like(own[:1, :5]))
