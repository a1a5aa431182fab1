"""Losses of shapes against loops written by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from models.generators.stylegan2 import StyleGAN2Discriminator
from models.losses.relief import feature_loss, identity_loss, mean_within, reconstruction_loss


def pictures(seed, count=2, size=8):
    return 2 * torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) - 1


def mask(seed, count=2, size=8):
    return (torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(seed)) > 0.4).float()


def perceptual(a, b):
    return (a - b).square().flatten(1).sum(1)


def test_reconstruction():
    """Eq. 11, in NumPy, pixel by pixel."""
    image, target, seen = pictures(0), pictures(1), mask(2)
    found = reconstruction_loss(image, target, seen, perceptual, 0.5)
    a, b, m = (t.double().numpy() for t in (image, target, seen))
    for row in range(2):
        inside = [np.abs(a[row, c, y, x] - b[row, c, y, x])
                  for c in range(3) for y in range(8) for x in range(8) if m[row, 0, y, x]]  # fmt: skip
        wanted = np.mean(inside) + 0.5 * (((a[row] - b[row]) * m[row]) ** 2).sum()
        assert float(found[row]) == pytest.approx(wanted, rel=1e-5)
    assert float(reconstruction_loss(image, image, seen, perceptual).abs().max()) == 0
    torch.testing.assert_close(
        reconstruction_loss(image, target, seen, None), mean_within((image - target).abs(), seen)
    )


def test_an_empty_mask_is_no_loss():
    image = pictures(0).requires_grad_()
    loss = reconstruction_loss(image, pictures(1), torch.zeros(2, 1, 8, 8), perceptual)
    loss.sum().backward()
    assert not bool(loss.any()) and bool(image.grad.isfinite().all())


def test_features():
    """Of Eq. 16: means over what each level's mask keeps, summed; no gradient reaches the target."""
    torch.manual_seed(0)
    discriminator = StyleGAN2Discriminator(channels=[4, 6, 6], minibatch_group=1)
    image, target, seen = pictures(0, size=16), pictures(1, size=16).requires_grad_(), mask(3, size=16)
    found = feature_loss(discriminator, image.requires_grad_(), target, seen)
    wanted = torch.zeros(2)
    features = zip(discriminator(image).features[:4], discriminator(target).features[:4], strict=True)
    for a, b in features:
        weight = torch.nn.functional.avg_pool2d(seen, 16 // a.shape[-1])
        wanted += ((a - b).abs().mean(1, keepdim=True) * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    assert target.grad is None and bool((image.grad != 0).any())


def test_identity():
    class Mean(nn.Module):
        dim = 3

        def forward(self, image):
            return image.mean((2, 3))

    a, b = pictures(0), pictures(1)
    wanted = ((a.mean((2, 3)) - b.mean((2, 3))) ** 2).sum(1)
    torch.testing.assert_close(identity_loss(a, b, Mean()), wanted)
