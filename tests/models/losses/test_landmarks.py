"""Distances of points, worked out by hand."""

import pytest
import torch

from models.losses.landmarks import OUTER_CORNERS, eye_distance, landmark_distance


def face(width=0.5):
    """All points at the origin but for the outer corners of the eyes."""
    points = torch.zeros(1, 468, 3)
    points[0, OUTER_CORNERS[1], 0] = width
    return points


def test_the_unit_is_what_lies_between_the_outer_corners():
    assert float(eye_distance(face(0.5))) == 0.5
    tilted = face()
    tilted[0, OUTER_CORNERS[1]] = torch.tensor([0.3, 0.4, 9.0])
    assert float(eye_distance(tilted)) == pytest.approx(0.5)  # in the picture


def test_a_mean_in_that_unit():
    moved = face() + torch.tensor([0.03, 0.04, 7.0])  # 0.05 in the picture, a tenth of the unit
    assert float(landmark_distance(moved, face())) == pytest.approx(0.1)
    one = face()
    one[0, 5, 1] = 0.468
    assert float(landmark_distance(one, face())) == pytest.approx(0.468 / 468 / 0.5, rel=1e-3)
    assert float(landmark_distance(4 * moved, 4 * face())) == pytest.approx(0.1)  # of any size


def test_points_count_by_weight():
    moved, weights = face(), torch.ones(468)
    moved[0, 5, 1] = 0.25
    weights[5] = 533
    assert float(landmark_distance(moved, face(), weights)) == pytest.approx(0.5 * 533 / 1000, rel=1e-3)
    assert float(landmark_distance(moved, face(), torch.zeros(468).index_fill(0, torch.tensor(7), 1.0))) < 1e-5


def test_a_batch_is_its_faces_and_the_gradient_of_equal_ones_is_finite():
    found = torch.cat([face(), face(0.25)]).requires_grad_()
    wanted = torch.cat([face(), face()])
    distance = landmark_distance(found, wanted)
    torch.testing.assert_close(distance, torch.cat([landmark_distance(found[i : i + 1], wanted[:1]) for i in (0, 1)]))
    (slope,) = torch.autograd.grad(distance.sum(), found)
    assert slope.isfinite().all() and (slope[..., 2] == 0).all()
