"""What teaches ADA, against sums written out, and a few steps of it."""

import torch
from torch.nn import functional as F
from torch.testing import assert_close

from models.augment.perspective import random_corners, warp
from models.encoders.alignment import ResidualAligner
from models.heads.pixel_aligned import Query
from models.losses.alignment import distortion_loss, residual_loss
from tests.models.generators.protocol import seeded


def taps(place, size=8):
    """Weights of the pixels of a row that one of half as many is made of: a triangle two of these wide."""
    weights = {2 * place + k: w for k, w in ((-1, 1), (0, 3), (1, 3), (2, 1)) if 0 <= 2 * place + k < size}
    return {k: w / sum(weights.values()) for k, w in weights.items()}


def test_residual_against_a_sum_in_float64():
    draws = seeded()
    image, coarse = (torch.randn(2, 3, side, side, generator=draws, dtype=torch.float64) for side in (8, 4))
    found = torch.randn(2, 3, 4, 4, generator=draws, dtype=torch.float64).requires_grad_()
    image.requires_grad_()
    query = Query(None, coarse.requires_grad_(), None, found, None)  # type: ignore[arg-type]
    loss = residual_loss(query, image)
    pixels = image.detach()
    for item in range(2):
        total = 0.0
        for c in range(3):
            for i in range(4):
                for j in range(4):
                    pixel = sum(
                        a * b * float(pixels[item, c, k, m]) for k, a in taps(i).items() for m, b in taps(j).items()
                    )
                    total += abs(float(found.detach()[item, c, i, j]) - (pixel - float(coarse.detach()[item, c, i, j])))
        assert_close(float(loss[item].detach()), total / 48)
    loss.sum().backward()
    assert found.grad.abs().min() > 0 and image.grad is None and coarse.grad is None


def test_distortion_is_what_the_aligner_leaves_of_a_change_of_perspective():
    draws = seeded()
    residual, target = (torch.randn(3, 3, 8, 8, generator=draws, dtype=torch.float64) for _ in range(2))
    corners = random_corners(3, seeded(1), 0.5, 0.7)
    idle = distortion_loss(lambda moved, _: moved, residual, target, corners)
    for item in range(3):
        moved = warp(residual[item : item + 1], corners[item : item + 1])
        pairs = zip(moved.flatten(), residual[item].flatten(), strict=True)
        assert_close(idle[item], sum(abs(a - b) for a, b in pairs) / 192)
    assert idle.max() > 0.1
    still = random_corners(3, seeded(1), probability=0.0)
    assert not distortion_loss(lambda moved, _: moved, residual, target, still).any()
    seen = []
    distortion_loss(lambda moved, other: seen.append((moved, other)) or moved, residual, target, corners)
    assert torch.equal(seen[0][0], warp(residual, corners)) and torch.equal(seen[0][1], target)


def test_a_few_steps_teach_it():
    """Smooth details of the target itself: an aligner can find out where they belong."""
    torch.manual_seed(0)
    network, draws = ResidualAligner([8, 12, 16, 16]), seeded()
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)

    def loss(count):
        target = F.interpolate(torch.randn(count, 3, 4, 4, generator=draws), (32, 32), mode="bicubic").clamp(-1, 1)
        return distortion_loss(network, 0.5 * target, target, random_corners(count, draws, 0.3)).mean()

    first = loss(8).item()
    for _ in range(25):
        optimiser.zero_grad()
        loss(8).backward()
        optimiser.step()
    assert loss(8).item() < 0.6 * first
