"""Containers of what is rendered: rows, parts and differences of all fields at once."""

import pytest
import torch

from models.rendering.output import FieldSample, Rendering


def rendering(count, seed=0, **more):
    draws = torch.Generator().manual_seed(seed)
    size = {"image": 3, "depth": 1, "alpha": 1, "spread": 1}
    fields = {name: torch.randn(count, channels, 4, 4, generator=draws) for name, channels in size.items()}
    return Rendering(**fields, taps={"b4": torch.zeros(1, 2)}, **more)


def test_rows():
    whole = rendering(5)
    assert len(whole) == 5 and len(whole[1]) == 1 and len(whole[-1]) == 1 and len(whole[::2]) == 3
    assert torch.equal(whole[-1].image, whole.image[4:]) and torch.equal(whole[1::2].spread, whole.spread[1::2])
    assert torch.equal(whole[torch.tensor([3, 0])].depth, whole.depth[[3, 0]])
    assert whole[0].normals is None and whole[0].taps == {}  # taps have a row for each code


def test_parts_are_one_again():
    whole = rendering(5)
    joined = Rendering.cat([whole[:2], whole[2:]])
    for name in ("image", "depth", "alpha", "spread"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))
    assert Rendering.cat([whole[:2], Rendering(whole.image[2:])]).depth is None  # not of all


def test_differences_and_sums():
    a, b = rendering(3), rendering(3, seed=1)
    change = a - b
    assert torch.equal(change.depth, a.depth - b.depth) and change.normals is None
    torch.testing.assert_close((b + change).alpha, a.alpha)
    assert (a - Rendering(b.image)).depth is None


def test_to_and_detach():
    learnt = rendering(2).map(lambda t: t.requires_grad_())
    assert not learnt.detach().image.requires_grad and learnt.to(torch.float64).spread.dtype == torch.float64
    assert learnt.replace(raw=learnt.image).raw is learnt.image


def test_samples_of_a_field():
    sample = FieldSample(torch.ones(2, 5, 3), sdf=torch.zeros(2, 5, 1))
    assert len(sample[:1]) == 1 and sample[:1].sdf.shape == (1, 5, 1) and sample[0].density is None


def test_what_is_not_there_cannot_be_indexed():
    with pytest.raises(IndexError):
        _ = rendering(2)[torch.tensor([2])]
