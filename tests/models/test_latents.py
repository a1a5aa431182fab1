"""Latents: groups of codes and their arithmetic."""

import pytest
import torch
from torch.testing import assert_close

from models.latents import Latents
from tests.models.generators.protocol import seeded


def two_groups(seed: int = 0) -> Latents:
    noise = seeded(seed)
    sizes = {"renderer": (3, 4, 5), "decoder": (3, 2, 7)}
    return Latents({name: torch.randn(size, generator=noise) for name, size in sizes.items()})


def rows(latents: Latents) -> list[torch.Tensor]:
    """All codes in order, whatever their group."""
    return [row for t in latents.groups.values() for row in t.unbind(1)]


def test_lerp():
    a, b = two_groups(), two_groups(1)
    for found, x, y in zip(rows(a.lerp(b, 0.3)), rows(a), rows(b), strict=True):
        assert_close(found, 0.7 * x + 0.3 * y)
    for found, x in zip(rows(a.lerp(b, 0)), rows(a), strict=True):
        assert torch.equal(found, x)


@pytest.mark.parametrize("layer", range(8))
def test_mix_counts_layers_through_the_groups(layer):
    a, b = two_groups(), two_groups(1)
    for index, (found, x, y) in enumerate(zip(rows(a.mix(b, layer)), rows(a), rows(b), strict=True)):
        assert torch.equal(found, x if index < layer else y)


@pytest.mark.parametrize("cutoff", [None, 0, 3, 5, 6])
def test_truncate(cutoff):
    codes = two_groups()
    centre = codes.mean()
    truncated = codes.truncate(centre, 0.4, cutoff)
    for index, (found, x, c) in enumerate(zip(rows(truncated), rows(codes), rows(centre), strict=True)):
        inside = cutoff is None or index < cutoff
        assert_close(found, c + 0.4 * (x - c) if inside else x)
    for found, c in zip(rows(codes.truncate(centre, 0.0)), rows(centre), strict=True):
        assert_close(found, c.expand_as(found))


def test_mean_index_and_repeat():
    codes = two_groups()
    assert len(codes) == 3 and len(codes.mean()) == 1 and len(codes[1]) == 1 and len(codes[-1]) == 1
    assert torch.equal(codes[-1].groups["decoder"], codes.groups["decoder"][2:])
    repeated = codes.repeat_interleave(2)
    assert len(repeated) == 6 and torch.equal(repeated[slice(0, 6, 2)].groups["decoder"], codes.groups["decoder"])


def test_groups_must_match_and_be_named():
    codes = two_groups()
    with pytest.raises(ValueError, match="groups differ"):
        codes.lerp(Latents({"ws": torch.zeros(3, 4, 5)}), 0.5)
    with pytest.raises(ValueError, match="name one"):
        codes.ws
    assert Latents({"ws": codes.groups["decoder"]}).ws.shape == (3, 2, 7)


def test_sums_differences_and_parts():
    codes, other = two_groups(), two_groups().map(lambda t: 2 * t + 1)
    for name, tensor in (codes + other - codes).groups.items():
        torch.testing.assert_close(tensor, other.groups[name])
    again = Latents.cat([codes[:1], codes[1:]])
    assert list(again.groups) == list(codes.groups)
    assert all(torch.equal(again.groups[name], tensor) for name, tensor in codes.groups.items())
    with pytest.raises(ValueError, match="groups differ"):
        _ = codes - Latents({"ws": torch.zeros(3, 4, 5)})
