"""Image losses against kornia and plain loops."""

import pytest
import torch
from kornia.losses import total_variation as kornia_total_variation

from models.losses.image import locality_codes, locality_loss, pixel_mse, smoothness_loss, total_variation


def test_pixel_mse():
    a, b = torch.rand(2, 3, 5, 4), torch.rand(2, 3, 5, 4)
    for i in range(2):
        total = sum((float(x) - float(y)) ** 2 for x, y in zip(a[i].flatten(), b[i].flatten(), strict=True))
        torch.testing.assert_close(pixel_mse(a, b)[i], torch.tensor(total / 60))


def test_total_variation_against_kornia():
    image = torch.rand(3, 3, 7, 9)
    torch.testing.assert_close(total_variation(image), kornia_total_variation(image, reduction="mean").mean(1))
    image = torch.rand(1, 1, 3, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(total_variation, (image,))


def test_smoothness_loss_against_loops():
    maps = torch.rand(2, 1, 4, 5, dtype=torch.double)
    for i in range(2):
        z = maps[i, 0].tolist()
        along = [abs(r[x] - 2 * r[x + 1] + r[x + 2]) for r in z for x in range(3)]
        down = [abs(z[y][x] - 2 * z[y + 1][x] + z[y + 2][x]) for y in range(2) for x in range(5)]
        across = [abs(z[y][x] - z[y][x + 1] - z[y + 1][x] + z[y + 1][x + 1]) for y in range(3) for x in range(4)]
        wanted = sum(along) / len(along) + sum(down) / len(down) + 2 * sum(across) / len(across)
        assert float(smoothness_loss(maps)[i]) == pytest.approx(wanted)
    slope = torch.arange(5.0).expand(1, 1, 4, 5) + 3 * torch.arange(4.0)[:, None]
    assert smoothness_loss(slope).tolist() == [0.0]


def test_locality_codes_lie_at_the_distance_towards_the_samples():
    pivot, samples = torch.randn(4, 8), torch.randn(3, 4, 8)
    codes = locality_codes(pivot, samples, 30.0)
    moved = (codes - pivot).flatten(1)
    torch.testing.assert_close(moved.norm(dim=1), torch.full((3,), 30.0))
    cosine = torch.cosine_similarity(moved, (samples - pivot).flatten(1), dim=1)
    torch.testing.assert_close(cosine, torch.ones(3))
    assert torch.isfinite(locality_codes(pivot, pivot[None])).all()


def test_locality_loss_is_of_both_terms_and_spares_the_original():
    tuned = torch.zeros(2, 3, 4, 4, requires_grad=True)
    original = torch.ones(2, 3, 4, 4, requires_grad=True)
    loss = locality_loss(tuned, original, lambda a, b: (a - b).abs().flatten(1).amax(1) / 2)
    torch.testing.assert_close(loss, torch.full((2,), 1.5))
    loss.sum().backward()
    assert tuned.grad is not None and original.grad is None
