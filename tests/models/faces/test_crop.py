"""Turned squares against arithmetic and against the whole picture."""

from __future__ import annotations

import math

import pytest
import torch

from models.faces.crop import cut


def ramp(height: int, width: int) -> torch.Tensor:
    """A picture whose first channel is x, the second y, in units of 1000 pixels: linear, so resampling keeps it."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([x, y, torch.zeros_like(x)])[None] / 1000


@pytest.mark.parametrize("angle", [0.0, 0.3, -2.0, math.pi / 2])
@pytest.mark.parametrize("size", [24, 90, 200])
def test_every_pixel_is_where_the_turned_square_puts_it(angle: float, size: int) -> None:
    x, y, side = 151.3, 130.7, 90.0
    got = cut(ramp(260, 300), torch.tensor([x, y]), side, angle, size)[0] * 1000
    for row, column in ((0, 0), (0, size - 1), (size // 2, size // 3), (size - 1, size // 2)):
        u, v = ((column + 0.5) / size - 0.5) * side, ((row + 0.5) / size - 0.5) * side
        want = (x + u * math.cos(angle) - v * math.sin(angle), y + u * math.sin(angle) + v * math.cos(angle))
        assert got[:2, row, column].tolist() == pytest.approx(want, abs=0.02 * side / min(size, 90) + 0.35)


def test_the_whole_picture_at_its_own_size_is_the_picture() -> None:
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(cut(image, torch.tensor([16.0, 16.0]), 32.0, 0.0, 32), image, atol=1e-5, rtol=0)


def test_beyond_the_picture_is_black() -> None:
    image = torch.ones(1, 3, 20, 20)
    got = cut(image, torch.tensor([10.0, 10.0]), 40.0, 0.0, 40)
    assert (got[..., :9, :] == -1).all() and (got[..., 11:29, 11:29] > 0.99).all()
    assert (cut(image, torch.tensor([500.0, 10.0]), 40.0, 0.0, 8) == -1).all()


def test_shrinking_averages() -> None:
    """A checkerboard of single pixels becomes grey, with no moire."""
    board = ((torch.arange(256)[:, None] + torch.arange(256)) % 2 * 2.0 - 1).expand(1, 3, -1, -1)
    got = cut(board, torch.tensor([128.0, 128.0]), 128.0, 0.4, 16)
    assert float(got.abs().max()) < 0.02


def test_gradients_reach_the_picture() -> None:
    image = (torch.rand(1, 1, 9, 9, dtype=torch.float64) * 2 - 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cut(x, torch.tensor([4.2, 5.1]), 6.0, 0.3, 5), image)

    def test_far_away(self):
        ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64).contiguous()
        for place in ((1e6, 32.0), (-3e8, 5e7)):
            crop = cut(ramp, torch.tensor(place), 100, 0.3, 32, "blurred")
            assert float(crop.std()) < 1e-5 and abs(float(crop.mean())) < 0.1
