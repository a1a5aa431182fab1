"""Generators between two."""

import copy
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from models.errors import UserError
from models.generators.blending import Blend, blended, layer_sides
from models.generators.stylegan2 import StyleGAN2Generator
from models.generators.stylesdf import StyleSDF
from tests.models.generators.protocol import awaken, seeded


def pair():
    torch.manual_seed(0)
    original = awaken(StyleGAN2Generator(channels=[6, 6, 4, 4], style_dim=6, mapping_layers=2)).eval()
    original.update_mean()
    adapted = copy.deepcopy(original)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.startswith("backbone"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded(1)))
    return original, adapted


def test_layers_are_swapped_by_resolution():
    original, adapted = pair()
    mixed = blended(original, adapted, Blend(swap=16))
    first, second, found = (dict(g.named_parameters()) for g in (original, adapted, mixed))
    for k in range(4):
        names = [name for name in found if name.startswith(f"backbone.blocks.{k}.")]
        source = second if k < 2 else first  # sides 4 and 8 of the adapted one, 16 and 32 of the original
        assert names and all(torch.equal(found[name], source[name]) for name in names)
    ws = original.mapping(original.sample_z(2, seeded()))
    kept = adapted.synthesis(ws, taps=("block8",)).taps["block8"]
    assert torch.equal(mixed.synthesis(ws, taps=("block8",)).taps["block8"], kept)


@pytest.mark.parametrize(
    ("blend", "share"), [({"fine": 1.0}, 1.0), ({"coarse": 0.0}, 0.0), ({"coarse": 0.4, "fine": 0.4}, 0.4)]
)
def test_ends_and_strength(blend, share):
    """One share of all layers is a style's strength: the original at 0, the adapted one at 1."""
    original, adapted = pair()
    found = blended(original, adapted, Blend(swap=16, **blend)).state_dict()
    for name, tensor in original.state_dict().items():
        assert_close(found[name], torch.lerp(tensor, adapted.state_dict()[name], share))


def test_a_smooth_blend_falls_over_some_octaves():
    blend = Blend(swap=32, width=2.0)
    shares = [blend.share(side) for side in (4, 8, 16, 32, 64, 128)]
    assert all(a > b for a, b in pairwise(shares)) and shares[0] > 0.98 and shares[-1] < 0.02
    assert shares[2] + shares[3] == pytest.approx(1)  # the middle is between 16 and 32
    hard = Blend(swap=32)
    assert [hard.share(side) for side in (4, 16, 32, 64)] == [1, 1, 0, 0]


def test_what_does_not_fit():
    original, _ = pair()
    other = StyleGAN2Generator(channels=[6, 6, 4], style_dim=6, mapping_layers=2)
    with pytest.raises(UserError, match="have other layers"):
        blended(original, other, Blend())
    field = StyleSDF(6, 8, 2, 1, raw_resolution=8, samples=4)
    assert layer_sides(field) == {}
    with pytest.raises(UserError, match="StyleSDF has no layers of growing resolution"):
        blended(field, copy.deepcopy(field), Blend())
    with pytest.raises(UserError, match=r"blend\.swap"):
        Blend(swap=0)
