"""Procrustes against SciPy, angles against cameras, and gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from models.camera import Camera
from models.faces.pose import CanonicalFace, similarity, yaw_pitch_roll
from models.faces.reader import FaceReader


@pytest.fixture(scope="module")
def canonical() -> CanonicalFace:
    return FaceReader.load().canonical


def seen(canonical: CanonicalFace, rotation: torch.Tensor) -> torch.Tensor:
    """Points that a mesh would have of the canonical face, turned so: pixels, y down, z away."""
    points = canonical.vertices.to(rotation.dtype) @ rotation.mT
    return 7 * points * torch.tensor([1, -1, -1], dtype=rotation.dtype) + 100


def test_the_rotation_is_scipys(canonical: CanonicalFace) -> None:
    """Wahba's problem is solved there by another's code; weighted, on points that do not fit."""
    draws = np.random.default_rng(0)
    turns = Rotation.random(5, rng=draws).as_matrix()
    points = seen(canonical, torch.from_numpy(turns)) + torch.from_numpy(draws.normal(0, 2, (5, 468, 3)))
    got = canonical.head_pose(points)
    weights = canonical.weights.double().numpy()
    here = canonical.vertices[canonical.basis].double().numpy()
    here = here - (weights[:, None] * here).sum(0) / weights.sum()
    for rotation, face in zip(got.numpy(), points.numpy(), strict=True):
        there = face[canonical.basis.numpy()] * [1, -1, -1]
        there = there - (weights[:, None] * there).sum(0) / weights.sum()
        want, _ = Rotation.align_vectors(there, here, weights)
        np.testing.assert_allclose(rotation, want.as_matrix(), atol=1e-9)


def test_a_similarity_is_found_again_and_is_no_mirror_image() -> None:
    points = torch.randn(3, 9, 3, dtype=torch.float64)
    turn = torch.from_numpy(Rotation.random(3, rng=np.random.default_rng(1)).as_matrix())
    shift = torch.randn(3, 1, 3, dtype=torch.float64)
    rotation, scale, moved = similarity(points, 2.5 * points @ turn.mT + shift)
    torch.testing.assert_close(rotation, turn)
    torch.testing.assert_close(scale, torch.full((3,), 2.5, dtype=torch.float64))
    torch.testing.assert_close(moved, shift[:, 0])
    mirrored = similarity(points, points * torch.tensor([-1.0, 1, 1]))[0]
    torch.testing.assert_close(torch.linalg.det(mirrored), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(("yaw", "pitch", "roll"), [(0, 0, 0), (30, 0, 0), (0, 20, 0), (0, 0, 15), (-40, 25, -70)])
def test_angles_are_those_of_the_camera_that_sees_the_head_so(canonical: CanonicalFace, yaw, pitch, roll) -> None:
    """A camera of models.camera at yaw and pitch, turned about its axis: the canonical face as it projects there."""
    y, p, r = (torch.tensor(math.radians(angle), dtype=torch.float64) for angle in (yaw, pitch, roll))
    position = 1e6 * torch.stack([y.sin() * p.cos(), p.sin(), y.cos() * p.cos()])[None]
    camera = Camera.look_at(position, torch.zeros(1, 3, dtype=torch.float64), 1.0)
    axes = camera.cam2world[0, :3, :3]  # columns: right, down, forward
    points = canonical.vertices.double() @ axes  # in the camera: x right, y down, z away
    turn = torch.stack([torch.stack([r.cos(), -r.sin()]), torch.stack([r.sin(), r.cos()])])  # clockwise, y being down
    points = torch.cat([points[:, :2] @ turn.T, points[:, 2:]], 1)[None]
    got = yaw_pitch_roll(canonical.head_pose(points))
    assert [math.degrees(float(angle)) for angle in got] == pytest.approx([yaw, pitch, roll], abs=1e-4)


def test_a_batch_is_its_faces_and_keeps_its_kind_of_numbers(canonical: CanonicalFace) -> None:
    turns = torch.from_numpy(Rotation.random(4, rng=np.random.default_rng(2)).as_matrix()).float()
    points = seen(canonical, turns)
    batch = canonical.head_pose(points)
    assert batch.dtype == torch.float32
    torch.testing.assert_close(batch, torch.cat([canonical.head_pose(one) for one in points.split(1)]))
    torch.testing.assert_close(batch, turns, atol=1e-5, rtol=0)


def test_angles_are_differentiable(canonical: CanonicalFace) -> None:
    turn = torch.from_numpy(Rotation.from_euler("yxz", [20, -10, 5], degrees=True).as_matrix())[None]
    points = seen(canonical, turn) + torch.randn(1, 468, 3, dtype=torch.float64)

    def angles(moved: torch.Tensor) -> torch.Tensor:
        return torch.stack(yaw_pitch_roll(canonical.head_pose(points.index_copy(1, canonical.basis[:4], moved))))

    start = points[:, canonical.basis[:4]].clone().requires_grad_()
    assert torch.autograd.gradcheck(angles, start)
