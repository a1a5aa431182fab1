"""StyleGAN2: the protocol, noise, derivatives, and its layers against their definition."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from models.generators.stylegan2 import (
    ResidualBlock,
    StyleGAN2Discriminator,
    StyleGAN2Generator,
    stylegan2_channels,
)
from models.latents import Latents
from tests.models.generators.protocol import DiscriminatorContract, GeneratorContract, awaken, seeded


def small(**changes):
    options = {"channels": (12, 8, 6), "style_dim": 10, "mapping_layers": 2}
    return StyleGAN2Generator(**{**options, **changes})


class TestGenerator(GeneratorContract):
    random = True
    free_resolution = False
    bounded = False

    def make(self):
        return small()


class TestDiscriminator(DiscriminatorContract):
    batch_free = False

    def make(self):
        return StyleGAN2Discriminator((6, 8, 12))


class TestDiscriminatorOfPoses(DiscriminatorContract):
    """GRAM's pose regularisation: one head more."""

    pose = True
    batch_free = False

    def make(self):
        return StyleGAN2Discriminator((6, 8, 12), pose="regress")


def test_an_unknown_pose_is_refused():
    with pytest.raises(ValueError, match="pose must be none or regress"):
        StyleGAN2Discriminator((6, 8, 12), pose="condition")


@pytest.mark.parametrize(
    ("resolution", "multiplier", "expected"),
    [
        (8, 2, (512, 512)),
        (256, 2, (512, 512, 512, 512, 512, 256, 128)),
        (256, 1, (512, 512, 512, 512, 256, 128, 64)),
        (1024, 2, (512, 512, 512, 512, 512, 256, 128, 64, 32)),
    ],
)
def test_channels(resolution, multiplier, expected):
    assert stylegan2_channels(resolution, multiplier) == expected


@pytest.mark.parametrize("resolution", [4, 48, 0])
def test_other_resolutions_are_refused(resolution):
    with pytest.raises(ValueError, match="power of two"):
        stylegan2_channels(resolution)


@torch.no_grad()
@pytest.mark.parametrize("side", [8, 64, 1024])
def test_sizes(side):
    channels = (2,) * len(stylegan2_channels(side))
    generator = small(channels=channels)
    image = generator(generator.sample_z(2, seeded())).image
    assert image.shape == (2, 3, side, side)
    assert StyleGAN2Discriminator(channels)(image).logits.shape == (2, 1)
    assert generator.num_ws == 2 * side.bit_length() - 4  # 2 log2(side) - 2


@torch.no_grad()
def test_noise_from_everywhere():
    generator = awaken(small())
    ws = generator.mapping(generator.sample_z(2, seeded()))
    maps = [layer.noise for block in generator.backbone.blocks for layer in block.layers]
    assert generator.noise_sides == [len(noise) for noise in maps] == [4, 8, 8, 16, 16]
    stored = generator.synthesis(ws).image
    assert_close(generator.synthesis(ws, randomness=[noise[None, None] for noise in maps]).image, stored)
    flat = torch.cat([noise.flatten() for noise in maps])[None]
    assert_close(generator.synthesis(ws, randomness=flat).image, stored)
    own = torch.cat([flat, 0 * flat])
    both = generator.synthesis(ws, randomness=own).image
    assert_close(both[:1], stored[:1])
    assert (both[1] - stored[1]).abs().max() > 1e-4
    for wrong in (flat[:, 1:], maps, [noise[None, None] for noise in maps[1:]]):
        with pytest.raises(ValueError, match="noise must be"):
            generator.synthesis(ws, randomness=wrong)


@torch.no_grad()
def test_style_mixing_changes_details_only():
    generator = awaken(small())
    one, other = (generator.mapping(generator.sample_z(1, seeded(seed))) for seed in (0, 1))
    taps = ("block4", "image4", "block8")
    plain, mixed = (generator.synthesis(ws, taps=taps).taps for ws in (one, one.mix(other, 2)))
    assert_close(plain["block4"], mixed["block4"])
    assert_close(plain["image4"], mixed["image4"])
    assert not torch.allclose(plain["block8"], mixed["block8"], atol=1e-3)


def test_codes_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="codes must be"):
        small().synthesis(Latents({"ws": torch.zeros(1, 5, 10)}))


def test_generator_passes_gradgradcheck():
    torch.manual_seed(0)
    generator = awaken(small(channels=(3, 2), style_dim=3)).double()
    ws = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)

    def image(ws):
        return F.avg_pool2d(generator.synthesis(Latents({"ws": ws})).image, 4)

    assert torch.autograd.gradcheck(image, ws, fast_mode=True)
    assert torch.autograd.gradgradcheck(image, ws, fast_mode=True)


def test_discriminator_passes_gradgradcheck():
    torch.manual_seed(0)
    discriminator = awaken(StyleGAN2Discriminator((2, 3))).double()
    image = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    weight = discriminator.blocks[0].second.weight
    assert torch.autograd.gradcheck(lambda x, _: discriminator(x).logits, (image, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, _: discriminator(x).logits, (image, weight), fast_mode=True)


def test_residual_block_by_definition():
    torch.manual_seed(0)
    block = awaken(ResidualBlock(2, 3))
    x, taps = torch.randn(2, 2, 8, 8), torch.tensor([1.0, 3, 3, 1])
    kernel = torch.outer(taps, taps) / 64

    def filtered(x, pad):
        return F.conv2d(F.pad(x, [pad] * 4), kernel.expand(2, 1, 4, 4), groups=2)

    def act(x, bias):
        return F.leaky_relu(x + bias[:, None, None], 0.2) * 2**0.5

    main = act(F.conv2d(x, block.first.weight / 18**0.5, padding=1), block.first.bias)
    main = act(F.conv2d(filtered(main, 2), block.second.weight / 18**0.5, stride=2), block.second.bias)
    skip = F.conv2d(filtered(x, 1), block.skip.weight / 2**0.5, stride=2)
    assert_close(block(x, kernel), (main + skip) / 2**0.5)


@torch.no_grad()
def test_a_discriminator_of_smaller_pictures():
    """Its last layers are the larger one's: from their features on both say the same."""
    torch.manual_seed(0)
    large = StyleGAN2Discriminator([4, 6, 8, 8], minibatch_group=2)
    small = large.narrowed(16)
    assert small.resolution == 16 and small.minibatch_group == 2
    seen = torch.randn(2, 3, 16, 16)
    features = torch.rand(2, 6, 16, 16)  # which the activation after the first layer leaves as they are
    large.blocks[0].register_forward_hook(lambda *_: features)
    small.stem.register_forward_hook(lambda *_: features.clone())
    torch.testing.assert_close(small(seen).logits, large(torch.randn(2, 3, 32, 32)).logits)
    assert small.narrowed(16).resolution == 16
    with pytest.raises(ValueError, match="for 32 px has no layers that judge 64 px"):
        large.narrowed(64)
    with pytest.raises(ValueError, match="judge 4 px"):
        large.narrowed(4)
