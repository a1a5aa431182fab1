"""First crossings of level sets along rays."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from models.generators.gram import ScalarField
from models.rendering.manifolds import CrossingCache, ManifoldPredictor, first_brackets, first_crossings


def reference(values, level, flat, both_ways):
    """One ray and one level, by walking along the samples."""
    for i, (high, low) in enumerate(pairwise(values)):
        if high >= level >= low:
            return i + 1, (high - level) / (high - low) if high - low > flat else 1.0, True
        if both_ways and high <= level <= low:
            return i + 1, 1.0, False
    return len(values) - 1, 1.0, False


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("flat", [0.0, 0.5])
def test_brackets_are_those_of_a_walk(flat, both_ways):
    torch.manual_seed(0)
    values, levels = torch.randn(4, 50, 9), torch.tensor([1.0, 0.2, -0.6])  # many rays start inside a level
    found = first_brackets(values, levels, flat=flat, both_ways=both_ways)
    walked = [
        reference(ray, level, flat, both_ways) for ray in values.flatten(0, 1).tolist() for level in levels.tolist()
    ]
    after, fraction, valid = (torch.tensor(x).reshape(4, 50, 3) for x in zip(*walked, strict=True))
    assert torch.equal(found.after, after) and torch.equal(found.valid, valid)
    assert_close(found.fraction, fraction.float())
    assert valid.float().mean() > 0.2 and (~valid).float().mean() > 0.05


def test_samples_are_interpolated_where_they_cross():
    points = torch.stack([torch.linspace(0, 1, 6), torch.linspace(2, 0, 6)], -1)
    found = first_brackets(points[:, 1], torch.tensor([1.5, 0.5, -1.0]))
    assert_close(found.at(points), torch.tensor([[0.25, 1.5], [0.75, 0.5], [1.0, 0.0]]))
    assert found.valid.tolist() == [True, True, False]


def test_a_sphere_is_met_where_it_is():
    """|x| = r along the z axis, from z = 3: at distance 3 - r; no crossing is at ``far``."""
    origins = torch.tensor([0.0, 0.0, 3.0]).expand(1, 2, 3)
    directions = torch.tensor([[[0.0, 0.0, -1.0], [0.0, 1.0, 0.0]]])
    depth, valid = first_crossings(
        lambda x: x.norm(dim=-1), origins, directions, torch.tensor([1.0, 0.5]), near=1.0, far=4.0, samples=40
    )
    assert_close(depth[0, 0], torch.tensor([2.0, 2.5]), atol=1e-4, rtol=0)
    assert valid.tolist() == [[[True, True], [False, False]]] and (depth[0, 1] == 4.0).all()


def test_crossings_carry_gradients():
    radius = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    origins, directions = torch.tensor([[[0.1, 0.0, 3.0]]]).double(), torch.tensor([[[0.0, 0.0, -1.0]]]).double()

    def depth(radius, origins):
        level = torch.tensor([0.0]).double()
        return first_crossings(
            lambda x: x.norm(dim=-1) - radius, origins, directions, level, near=1.0, far=4.0, samples=20
        )[0]

    assert torch.autograd.gradgradcheck(depth, (radius, origins.requires_grad_()))
    (gradient,) = torch.autograd.grad(depth(radius, origins), radius)
    assert_close(gradient, -radius.detach() / (radius.detach() ** 2 - 0.01).sqrt(), atol=0.02, rtol=0)


def test_cache_drops_the_oldest_beyond_its_budget():
    class Item:
        def __init__(self, megabytes):
            self.tensor, self.note = torch.zeros(megabytes * 2**18), None

    cache, made = CrossingCache(megabytes=3), []
    for key in "abacb":
        cache.get(key, lambda key=key: made.append(key) or Item(1 if key != "c" else 2))
    assert made == ["a", "b", "c", "b"] and list(cache.items) == ["c", "b"]


@torch.no_grad()
def test_a_geometric_start_is_grams():
    """The same weights in the same cube; near ten times the distance from the centre, which an exact start is once."""
    centre, scale = (0.0, 0.0, -1.5), 2 / 0.24
    torch.manual_seed(0)
    ours = ManifoldPredictor(128, 3, centre, 0.0, activation="relu", start="geometric", scale=scale)
    torch.manual_seed(0)
    theirs = ScalarField(128, 3, centre, 0.0)
    points = 0.2 * torch.rand(500, 3) - 0.1
    assert_close(ours(points), theirs(points))
    distance = (points * scale - torch.tensor(centre)).norm(dim=-1)
    ratio = (ours(points) / (10 * distance)).log()
    assert abs(float(ratio.mean())) < 0.3 and float(ratio.std()) < 0.3
    exact = ManifoldPredictor(8, 1, centre, 0.5, scale=scale)
    assert_close(exact(points), distance - 0.5)
    with pytest.raises(ValueError, match="start must be exact or geometric"):
        ManifoldPredictor(start="gram")
