"""Points of a face in a picture: the differentiable way agrees with the one that finds, wherever the face is."""

import math

import pytest
import torch
from torch.nn import functional as F

from models.errors import UserError
from models.faces.crop import cut
from models.features.base import FaceParser, FacePoints
from models.features.landmarks import FaceLandmarks, FaceOval, inside
from models.files import ROOT
from models.image import read_image
from models.losses.landmarks import eye_distance, landmark_distance


@pytest.fixture(scope="module")
def faces():
    return FaceLandmarks()


@pytest.fixture(scope="module")
def picture():
    return read_image(ROOT / "tests" / "fixtures" / "faces" / "astronaut_256.png")


@pytest.fixture(scope="module")
def points(faces, picture):
    return faces.find(picture)


def turned(picture, degrees=0.0, shift=(0.0, 0.0), scale=1.0):
    """The picture turned, shifted by pixels and shrunk, and where its points come to lie in it."""
    side, angle = picture.shape[-1], math.radians(degrees)
    centre = torch.tensor([side / 2, side / 2]) - torch.tensor(shift)
    cos, sin = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[cos, -sin], [sin, cos]])

    def moved(points):
        return torch.cat([((points[:, :2] - centre / side) @ turn) / scale + 0.5, points[:, 2:] / scale], 1)

    return cut(picture, centre, side * scale, angle, side), moved


def apart(found, wanted):
    return float(landmark_distance(found[None], wanted[None]))


def test_it_is_what_the_stages_take(faces):
    assert not any(p.requires_grad for p in faces.parameters()) and isinstance(faces, FacePoints)
    assert faces.canonical.vertices.shape == (468, 3)


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        FaceLandmarks(str(tmp_path / "nowhere"))


def test_in_units_of_the_side(faces, picture, points, monkeypatch):
    (face, *_) = faces.reader.find(picture)
    torch.testing.assert_close(points * 256, face.points)
    monkeypatch.setattr(faces.reader, "find", lambda image: [])
    assert faces.find(picture) is None


def test_a_closer_look_sees_what_was_found(faces, picture, points):
    assert apart(faces(picture, points[None])[0], points) < 0.005
    rough = points[None, :, :2] + 0.02 * torch.tensor([1.0, -1.0])  # a tenth of the eyes' distance beside
    assert apart(faces(picture, rough)[0], points) < 0.02


@pytest.mark.parametrize("move", [{"degrees": 25}, {"degrees": -90}, {"shift": (20, -12)}, {"scale": 1.6}], ids=str)
def test_points_move_as_the_picture_does(faces, picture, points, move):
    """Where the square is turned along and the face as large, the network sees the same picture again."""
    image, moved = turned(picture, **move)
    found, wanted = faces(image, moved(points)[None])[0], moved(points)
    assert apart(found, wanted) < 0.02
    depth = (found[:, 2] - wanted[:, 2]).abs().mean() / eye_distance(wanted[None])
    assert float(depth) < 0.02


def test_of_large_pictures_no_pixel_is_skipped(faces, points):
    """A fine pattern is a grey to the network, not one of its own: stripes would alias to broad bands."""
    image = F.interpolate(
        read_image(ROOT / "tests" / "fixtures" / "faces" / "astronaut_256.png"), 1024, mode="bicubic"
    ).clamp(-0.5, 0.5)
    stripes = 0.5 * (1 - 2 * (torch.arange(1024) % 2)).expand(1, 1, 1024, 1024)
    assert apart(faces(image + stripes, points[None])[0], faces(image, points[None])[0]) < 0.01


def test_a_batch_is_its_pictures(faces, picture, points):
    """Even where one face is small and another one large."""
    image, moved = turned(picture, degrees=30, scale=2.0)
    images, near = torch.cat([picture, image]), torch.stack([points, moved(points)])
    singles = torch.cat([faces(one, at) for one, at in zip(images.split(1), near.split(1), strict=True)])
    torch.testing.assert_close(faces(images, near), singles, atol=1e-5, rtol=0)


def test_a_step_along_the_gradient_brings_the_points_nearer(faces, picture, points):
    wanted = points + torch.tensor([0.0, 0.01, 0.0])
    image = picture.clone().requires_grad_()
    before = landmark_distance(faces(image, wanted[None]), wanted[None])
    (slope,) = torch.autograd.grad(before.sum(), image)
    assert slope.isfinite().all() and slope.abs().sum() > 0
    low, high = (points[:, :2].amin(0) * 256).long(), (points[:, :2].amax(0) * 256).long()
    outside = slope.abs().sum() - slope[..., low[1] : high[1], low[0] : high[0]].abs().sum()
    assert outside < slope.abs().sum()  # the face itself counts
    with torch.no_grad():
        after = landmark_distance(faces(picture - 0.02 * slope / slope.abs().max(), wanted[None]), wanted[None])
    assert after < before


def test_half_precision_moves_no_point(faces, picture, points):
    exact = faces(picture, points[None])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(faces(picture, points[None]), exact)
        assert torch.equal(faces.find(picture), points)
        assert apart(faces(picture.to(torch.bfloat16), points[None])[0], points) < 0.02


def test_the_person_is_masked_only_where_the_mask_holds_the_face(faces, picture, points):
    mask = faces.person(picture, points)
    assert mask is not None and mask.shape == (1, 1, 256, 256)
    assert mask[0, 0, 100:200, 90:150].mean() > 0.9
    assert faces.person(torch.zeros_like(picture), points) is None  # nobody there


class TestOval:
    def test_a_polygon(self):
        """Which pixels' centres it holds, by hand: a triangle of 8 px under the diagonal."""
        found = inside(torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), 8)
        wanted = torch.tensor([[float(x < y) for x in range(8)] for y in range(8)])
        on_it = torch.eye(8)
        assert torch.equal(found * (1 - on_it), wanted)

    def test_the_face_is_in_it(self, faces, picture, points):
        parser = FaceOval(faces)
        assert isinstance(parser, FaceParser) and parser.segments == ("background", "face")
        blank = torch.zeros_like(picture)
        logits = parser(torch.cat([picture, blank]))
        assert logits.shape == (2, 2, *picture.shape[2:])
        face = logits.argmax(1)
        side = picture.shape[-1]
        for point in (1, 33, 263, 13, 61, 291):  # nose, eyes, mouth
            x, y = (points[point, :2] * side).long().tolist()
            assert face[0, y, x] == 1
        for x, y in ((0, 0), (side - 1, 0), (0, side - 1)):
            assert face[0, y, x] == 0
        hull = (points[:, :2].amax(0) - points[:, :2].amin(0)).prod()
        assert 0.6 < float(face[0].float().mean()) / float(hull) < 1
        assert bool((face[1] == 1).all())  # no face: all of it
