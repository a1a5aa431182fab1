"""The networks of shapes: their sizes are the sources', what they say lies where it must."""

import pytest
import torch

from models.errors import UserError
from models.relief.networks import FreeMap, MapNetwork, OffsetEncoder, PictureEncoder, ReliefNetworks
from models.rendering.relief import Relief


def pictures(size, count=2):
    return 2 * torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) - 1


def small(seed=0, size=16):
    torch.manual_seed(seed)
    return ReliefNetworks(Relief(), size, width=8, encoder_width=8, code=16)


def test_sizes_are_the_sources():
    """Unsup3D's EDDeconv (zdim 256, nf 64) and Encoder (nf 64) at 64 px, counted from their layers; biases of V's last
    layer come on top."""
    down = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512 * 256)
    up = 16 * (256 * 512 + 512 * 256 + 256 * 128 + 128 * 64) + 9 * (512**2 + 256**2 + 128**2 + 64**2)
    end = 9 * 64 * 64 + 25 * (64 * 64 + 64)
    norms = 2 * (64 + 128 + 256) + 2 * 2 * (256 + 128 + 64) + 2 * 2 * 64
    assert sum(p.numel() for p in MapNetwork(64, 64, 1).parameters()) == down + up + end + norms
    encoder = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512 * 512) + 512 * 6
    assert sum(p.numel() for p in PictureEncoder(64, 64, 6).parameters()) == encoder + 6


@pytest.mark.parametrize(("size", "width"), [(16, 8), (64, 8), (128, 4)])
def test_shapes(size, width):
    image = pictures(size)
    assert MapNetwork(size, width, 3, code=16)(image).shape == (2, 3, size, size)
    assert PictureEncoder(size, width, 6)(image).shape == (2, 6)
    assert OffsetEncoder(size, 4, 10)(image).shape == (2, 10)


def test_where_it_starts():
    """Nearly at what the answers are offsets to, and nowhere at it."""
    networks, image = small(), pictures(16)
    view, light = networks.view(image, torch.ones(2, 6)), networks.light(image, torch.ones(2, 4))
    for offset in (view[:, :3] - 1, light - 1):
        assert bool((offset.abs() < 0.2).all() and (offset != 0).any())
    assert bool((view[:, 5] == 1).all())  # nothing moves along the camera's axis
    depth, albedo = networks.depth(image), networks.albedo(image)
    assert bool((depth > 0.9).all() and (depth < 1.1).all() and (albedo.abs() < 1).all())


def test_seeds():
    image = pictures(16)
    torch.testing.assert_close(small(1).depth(image), small(1).depth(image), rtol=0, atol=0)
    assert not torch.equal(small(1).depth(image), small(2).depth(image))


def test_what_does_not_fit():
    with pytest.raises(UserError, match=r"16, 32, 64, \.\.\. px, and this generator's have 48"):
        MapNetwork(48, 8, 1)
    with pytest.raises(UserError, match=r"networks\.width \(6\) must be a multiple of networks\.group \(4\)"):
        MapNetwork(16, 6, 1)


def test_free_maps():
    """Any map can be had; they are of the one picture, which tells them nothing."""
    networks = ReliefNetworks(Relief(), 16, width=8, encoder_width=8, code=16, free_maps=True)
    image = pictures(16, 1)
    assert bool((networks.albedo(image) == 0).all())
    assert [p.shape[-1] for p in networks.A.parameters()] == [4, 8, 16]
    target = pictures(16, 1).flip(-1)
    optimizer = torch.optim.Adam(networks.A.parameters(), 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (networks.albedo(image) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert float(loss) < 1e-3
    torch.testing.assert_close(networks.albedo(image.flip(-1)), networks.albedo(image), rtol=0, atol=0)
    with pytest.raises(ValueError, match="a free map is of one picture, got 2"):
        networks.depth(pictures(16, 2))
    with pytest.raises(UserError, match="px, and this generator's have 48"):
        FreeMap(48, 1)


def test_slack_bounds_what_is_told():
    """However far V and L go, views and lights stay near what they are offsets to."""
    networks = ReliefNetworks(Relief(), 16, 4, 4, 8, 2, slack=0.1)
    around, lit = torch.tensor([[0.3, -0.2, 0.0, 0.01, 0.0, 0.0]]), torch.tensor([[0.5, 0.4, 0.2, 0.1]])
    with torch.no_grad():
        for module in (networks.V, networks.L):
            module.out.bias.fill_(50.0)  # all of them at the end of their ranges
    image = pictures(16, 1)
    turn = torch.pi / 3
    view = torch.tensor([[turn, turn, turn, 0.1, 0.1, 0.0]])
    torch.testing.assert_close(networks.view(image, around), around + 0.1 * view)
    torch.testing.assert_close(networks.light(image, lit), lit + torch.tensor([[0.05, 0.05, 0.1, 0.1]]))
