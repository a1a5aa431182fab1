"""The random perspective: as torchvision's, but each picture draws for itself."""

import pytest
import torch
from torch.testing import assert_close
from torchvision.transforms.functional import perspective

from models.augment.perspective import random_corners, random_perspective, warp


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


SQUARE = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])


def test_corners_that_stay_leave_the_picture_as_it_is():
    image = torch.randn(3, 3, 12, 10)
    assert torch.equal(warp(image, SQUARE.expand(3, -1, -1)), image)
    for options in ({"scale": 0.0}, {"probability": 0.0}):
        assert torch.equal(random_perspective(image, seeded(), **options), image)


def test_against_torchvision():
    image, corners = torch.randn(4, 3, 16, 24, generator=seeded()), random_corners(4, seeded(1), 0.5, 1.0)
    found = warp(image.double(), corners.double())
    size = torch.tensor([24.0, 16.0])
    for one, given, ours in zip(image.double(), corners, found, strict=True):
        start, end = (((c + 1) / 2 * size).tolist() for c in (SQUARE, given))
        assert_close(ours, perspective(one, start, end), atol=1e-4, rtol=0)  # its coefficients are fp32
    assert_close(warp(image, corners), found.float(), atol=1e-4, rtol=0)


def test_every_picture_draws_for_itself_and_from_the_generator_alone():
    state = torch.get_rng_state()
    corners = random_corners(400, seeded(), 0.15, 0.8)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(corners, random_corners(400, seeded(), 0.15, 0.8))
    assert not torch.equal(corners, random_corners(400, seeded(1), 0.15, 0.8))
    stays = (corners == SQUARE).all(-1).all(-1)
    assert 0.74 < 1 - float(stays.float().mean()) < 0.86
    inwards = (SQUARE - corners) * SQUARE
    assert inwards.min() >= 0 and 0.149 < inwards.max() <= 0.15 + 1e-6
    assert len(corners[~stays].unique(dim=0)) == int((~stays).sum())
    # The numbers of one picture do not depend on how likely a move is.
    assert torch.equal(random_corners(400, seeded(), 0.15, 1.0)[~stays], corners[~stays])


def test_it_differentiates_and_keeps_the_kind_of_number():
    image = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    corners = random_corners(2, seeded(), 0.4, 1.0)
    assert torch.autograd.gradcheck(lambda x: warp(x, corners), image)
    assert warp(torch.ones(2, 3, 8, 8, dtype=torch.bfloat16), corners).dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{"scale": 1.5}, {"probability": -0.1}])
def test_what_it_refuses(options):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        random_corners(1, seeded(), **options)
