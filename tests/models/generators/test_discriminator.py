"""The image discriminator."""

import pytest
import torch

from models.generators.discriminator import ImageDiscriminator, minibatch_std
from tests.models.generators.protocol import DiscriminatorContract, seeded

CHANNELS = [8, 12, 16]


class TestRegressing(DiscriminatorContract):
    pose = True
    batch_free = False

    def make(self):
        return ImageDiscriminator(CHANNELS)


class TestConditional(DiscriminatorContract):
    conditional = True

    def make(self):
        return ImageDiscriminator(CHANNELS, minibatch_group=0, pose="condition")


class TestPlain(DiscriminatorContract):
    def make(self):
        return ImageDiscriminator(CHANNELS, minibatch_group=0, pose="none")


def test_minibatch_std_by_hand():
    x = torch.randn(6, 2, 3, 3, generator=seeded())
    found = minibatch_std(x, 4)  # the largest divisor of 6 up to 4 is 3: items 0, 2, 4 and items 1, 3, 5
    assert found.shape == (6, 3, 3, 3) and torch.equal(found[:, :2], x)
    for start in range(2):
        expected = (x[start::2].var(0, unbiased=False) + 1e-8).sqrt().mean()
        torch.testing.assert_close(found[start::2, 2], expected.expand(3, 3, 3))


@pytest.mark.parametrize("side", [64, 128, 256])
def test_resolution_follows_the_channels(side):
    blocks = side.bit_length() - 3
    discriminator = ImageDiscriminator([4] * (blocks + 1), minibatch_group=0)
    assert discriminator.resolution == side
    features = discriminator(torch.zeros(1, 3, side, side)).features
    assert [f.shape[-1] for f in features] == [side >> k for k in range(1, blocks + 1)]


def test_activations_keep_their_scale():
    """Equalised weights: deep blocks neither fade nor explode on unit Gaussian images."""
    torch.manual_seed(0)
    discriminator = ImageDiscriminator([32] * 5, minibatch_group=0)
    features = discriminator(torch.randn(4, 3, 64, 64, generator=seeded())).features
    assert all(0.2 < f.std() < 3 for f in features)


def test_unknown_pose_is_refused():
    with pytest.raises(ValueError, match="pose must be one of"):
        ImageDiscriminator(CHANNELS, pose="yes")
