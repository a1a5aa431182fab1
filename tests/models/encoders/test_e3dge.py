"""E3DGE's encoders and fusion: shapes, where details come from, what they may change, and their gradients."""

import pytest
import torch
from torch.testing import assert_close

from models.camera import Camera
from models.configurable import build, spec
from models.encoders.e3dge import (
    AlignmentFusion,
    GlobalEncoder,
    LocalEncoder,
    TextureFusion,
    pixel_features,
    positional_encoding,
    within,
)
from models.errors import UserError
from models.generators.stylesdf import StyleSDF

TRUNK = {"widths": (4, 6, 8, 10), "depths": (1, 1, 1, 1), "reduction": 2}
SMALL = {"w_dim": 5, "resolution": 64, "decoder_dim": 7, **TRUNK}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def encoder(**changes):
    torch.manual_seed(0)
    return GlobalEncoder(**(SMALL | changes)).eval()


@pytest.mark.parametrize(
    "changes", [{}, {"decoder_heads": 0}, {"decoder_heads": 10}, {"texture_side": 32}, {"style_width": 3}], ids=str
)
@torch.no_grad()
def test_codes_of_both_groups(changes):
    network = encoder(**changes)
    found = network(torch.rand(2, 3, 64, 64, generator=seeded()))
    shapes = {"renderer": (2, 9, 5)} | ({"decoder": (2, 10, 7)} if changes.get("decoder_heads", 1) else {})
    assert {name: tuple(t.shape) for name, t in found.groups.items()} == shapes
    assert build(spec(network)).state_dict().keys() == network.state_dict().keys()


@torch.no_grad()
def test_decoder_codes_are_one_or_each_its_own():
    """The released encoder owns ten networks and reads the first; the paper has one for each code."""
    image = torch.rand(1, 3, 64, 64, generator=seeded())
    shared, own = (encoder(decoder_heads=10, decoder_shared=kind)(image).groups["decoder"] for kind in (True, False))
    assert torch.equal(shared, own[:, :1].expand(-1, 10, -1))
    assert len(own[0].unique(dim=0)) == 10
    with pytest.raises(UserError, match="decoder_heads is 3: 10 codes take one each, or share one"):
        encoder(decoder_heads=3, decoder_shared=False)


@torch.no_grad()
def test_geometry_and_texture_read_different_levels():
    network, image = encoder(), torch.rand(1, 3, 64, 64, generator=seeded())
    before = network(image).groups["renderer"]
    network.latlayer128.weight.mul_(2)
    after = network(image).groups["renderer"]
    assert torch.equal(before[:, :6], after[:, :6]) and not torch.equal(before[:, 6:], after[:, 6:])


@torch.no_grad()
def test_codes_start_from_the_mean_and_images_have_a_size():
    network, image = encoder(), torch.rand(1, 3, 64, 64, generator=seeded())
    mean = network(image).map(torch.ones_like)
    for name, codes in network.codes(image, mean).groups.items():
        assert_close(codes, network(image).groups[name] + 1)
    large = image.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert_close(network(large).groups, network(image).groups)
    with pytest.raises(ValueError, match="images must be"):
        network(image[..., :32, :32])


@pytest.mark.parametrize(
    "options",
    [{}, {"norm": "batch"}, {"strided": 128}, {"depth": 1, "stacks": 1}, {"width": 48, "channels": 24}],
    ids=str,
)
def test_details_are_a_quarter_of_the_picture_and_every_parameter_makes_them(options):
    torch.manual_seed(0)
    network = LocalEncoder(**({"stem": 4, "features": 6, "channels": 128, "stacks": 2, "depth": 2} | options))
    draws = seeded()
    details = network(torch.randn(1, 3, 32, 32, generator=draws), torch.rand(1, 1, 32, 32, generator=draws))
    assert details.shape == (1, 6, 8, 8)
    (details * torch.randn(details.shape, generator=draws)).sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
    with pytest.raises(ValueError, match="norm must be one of"):
        LocalEncoder(norm="layer")


def test_a_point_finds_the_pixel_that_it_projects_to():
    generator = StyleSDF(width=4, depth=1)
    camera = generator.rig.camera(torch.tensor([0.2, -0.3]), 0.1)
    side = 8
    v, u = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    picture = torch.stack([u, v]).expand(2, -1, -1, -1) / side
    origins, directions = camera.rays(side)
    found = pixel_features(picture, camera, origins + directions)
    assert_close(found, picture.flatten(2).mT, atol=1e-4, rtol=0)
    assert within(origins + directions, camera).all()
    away = torch.tensor([[[9.0, 0.0, 0.0]]]).expand(2, -1, -1)
    assert not within(away, camera).any() and not pixel_features(picture, camera, away).any()


def test_positional_encoding():
    points = torch.tensor([[[0.1, -0.2, 0.3]]])
    found = positional_encoding(points, 7)
    assert found.shape == (1, 1, 45)
    assert_close(found[..., :3], points)
    assert_close(found[..., 3:9], torch.cat([points.sin(), points.cos()], -1))
    assert_close(found[..., -3:], (64 * points).cos())


def test_texture_fusion_paints_and_does_not_move():
    torch.manual_seed(0)
    generator = StyleSDF(z_dim=4, width=6, depth=2, raw_resolution=8, samples=6)
    fusion = TextureFusion(width=6, channels=3, frequencies=2)
    camera = generator.rig.camera(torch.tensor([0.1, -0.1]))
    ws, details = generator.mapping(torch.randn(2, 4)), torch.randn(2, 3, 4, 4, requires_grad=True)
    plain = generator.synthesis(ws, camera, taps=["field"])

    def fuse(points, features):
        return fusion(features, fusion.local(pixel_features(details, camera, points), points))

    fused = generator.synthesis(ws, camera, taps=["field"], edit=fuse)
    assert_close(fused.taps["field"], plain.taps["field"])
    assert_close(fused.depth, plain.depth)
    assert (fused.image - plain.image).abs().mean() > 1e-3
    fused.image.square().mean().backward()
    assert details.grad.abs().sum() > 0
    features, local = torch.randn(1, 2, 9), torch.randn(1, 2, 18)
    assert torch.equal(fusion(features, local)[..., 6:], features[..., 6:])


def test_alignment_fusion_weighs_its_residual():
    torch.manual_seed(0)
    fusion, local, aligned = AlignmentFusion(4), torch.randn(1, 5, 4), torch.randn(1, 5, 5)
    assert_close(fusion(local, aligned, 0.0), local)
    assert_close(fusion(local, aligned, 0.5), (fusion(local, aligned) + local) / 2)
    assert AlignmentFusion(4, visibility=False)(local, local).shape == local.shape


def test_fusions_differentiate_twice():
    torch.manual_seed(0)
    fusion, alignment = TextureFusion(2, 3, None).double(), AlignmentFusion(2).double()
    draws = [torch.randn(1, 2, size, dtype=torch.float64, requires_grad=True) for size in (2, 3)]
    for network in (fusion, alignment):
        assert torch.autograd.gradcheck(network, draws)
        assert torch.autograd.gradgradcheck(network, draws)
    camera = Camera(torch.eye(4, dtype=torch.float64)[None], torch.eye(3, dtype=torch.float64)[None])
    points = torch.tensor([[[0.3, 0.4, 1.0]]], dtype=torch.float64, requires_grad=True)
    details = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d, p: pixel_features(d, camera, p), (details, points))
