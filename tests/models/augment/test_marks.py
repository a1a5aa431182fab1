"""Marks on photos."""

import math

import pytest
import torch

from models.augment.marks import paint_mark, random_marks

GREY = torch.zeros(3, 64, 64)
RED = (0.7, -0.8, -0.7)


def covered(photo):
    """How much of each pixel is painted."""
    return photo[0] / RED[0]


def test_a_spot_has_the_area_of_a_disc_and_its_colour():
    photo = paint_mark(GREY, "spot", [(0.25, 0.5)], RED, width=0.2)
    cover = covered(photo)
    assert float(cover.sum()) == pytest.approx(math.pi * 6.4**2, rel=0.05)
    columns, rows = (cover.sum(0) * torch.arange(64)).sum(), (cover.sum(1) * torch.arange(64)).sum()
    assert float(columns / cover.sum()) + 0.5 == pytest.approx(16, abs=0.3)
    assert float(rows / cover.sum()) + 0.5 == pytest.approx(32, abs=0.3)
    assert photo[:, 32, 16].tolist() == pytest.approx(RED) and not photo[:, 0].any() and not GREY.any()


def test_a_line_goes_through_its_places_in_every_picture_of_a_batch():
    photo = paint_mark(GREY.expand(2, -1, -1, -1), "line", [(0.1, 0.1), (0.5, 0.5), (0.9, 0.5)], RED)
    assert torch.equal(photo[0], photo[1])
    assert (covered(photo[0])[[7, 20, 32, 32], [7, 20, 40, 55]] > 0.5).all()
    assert covered(photo[0])[50:].sum() == 0


def test_glasses_are_two_rings_and_a_bridge():
    cover = covered(paint_mark(GREY, "glasses", [(0.7, 0.4), (0.3, 0.4)], RED, width=0.04, radius=0.12))
    row = cover[26]
    rings = [19.2 - 7.2, 19.2 + 6.2, 44.8 - 7.2, 44.8 + 6.2]
    assert (row[[round(x) for x in rings]] > 0.2).all() and row[32] > 0.9  # the bridge
    assert row[19] == row[45] == 0  # the eyes are seen through them
    assert cover == pytest.approx(cover.flip(1).numpy(), abs=0.3)


@pytest.mark.parametrize(
    ("kind", "places", "message"),
    [
        ("hat", [(0.5, 0.5)], "a mark is one of"),
        ("line", [(0.5, 0.5)], "line takes 2 or more places, got 1"),
        ("spot", [], "spot takes 1 or more places, got 0"),
        ("glasses", [(0.1, 0.5)] * 3, "glasses takes 2 places, got 3"),
    ],
)
def test_refusals(kind, places, message):
    with pytest.raises(ValueError, match=message):
        paint_mark(GREY, kind, places)


def test_random_marks_fall_on_a_share_of_the_photos_and_follow_their_generator():
    photos = torch.rand(200, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def paint(share, seed):
        marks = random_marks(len(photos), share, torch.Generator().manual_seed(seed))
        return torch.stack([mark(photo) for mark, photo in zip(marks, photos, strict=True)])

    painted, again, other = paint(0.4, 1), paint(0.4, 1), paint(0.4, 2)
    assert torch.equal(painted, again) and not torch.equal(painted, other)
    changed = (painted != photos).flatten(1)
    assert 60 < int(changed.any(1).sum()) < 100  # 80 expected, deviation 7
    assert float(changed.float().mean(1).max()) < 0.25  # marks, not new pictures
    assert torch.equal(paint(0.0, 1), photos)
