"""Recipes against numbers recorded from the official preparations, and the mannequins' own points."""

import json
import math
from pathlib import Path

import pytest
import torch

from datamodules.mannequins import Scene, shapes
from datamodules.mannequins.scene import Z_DIM
from models.camera import Rig
from models.errors import UserError
from models.faces.pose import yaw_pitch_roll
from models.faces.recipes import (
    CALIBRATION,
    MANNEQUIN,
    RECIPES,
    STANDARD,
    Square,
    find_recipe,
    head_rotation,
    pose_of_five,
)
from models.generators.gram import sphere_camera

RECORDED = json.loads((Path(__file__).parents[2] / "fixtures" / "alignment.json").read_text())["cases"]
FIVE = torch.tensor([[40.0, 50.0], [80.0, 50.0], [60.0, 70.0], [45.0, 90.0], [75.0, 90.0]])


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def five(case):
    return tensor(case["five"]) + 0.5  # whole numbers are centres there


def viewing_angles(rotation):
    return [float(angle) for angle in yaw_pitch_roll(rotation[None])]


def seen(recipe, rotation):
    return recipe.camera(recipe.angles(rotation), viewing_angles(rotation)[2])


def box(case, name):
    left, top, right, bottom = case[name]
    return tensor([[left, top], [left, bottom], [right, bottom], [right, top]])


@pytest.mark.parametrize("case", RECORDED)
class TestOfficial:
    def test_ffhq(self, case):
        for name in ("ffhq", "stylesdf"):
            corners = RECIPES[name].square(five(case), case["size"]).corners()
            assert torch.allclose(corners, tensor(case["ffhq"]) + 0.5, atol=1e-2)

    @pytest.mark.parametrize(
        ("name", "recorded", "pixels"), [("eg3d", "eg3d", 1500), ("gram", "gram", 1024), ("anifacegan", "gram", 1024)]
    )
    def test_crops_of_ffhq(self, case, name, recorded, pixels):
        aligned = RECIPES["ffhq"].square(five(case), case["size"])
        expected = aligned.to_picture(box(case, recorded) / pixels)
        square = RECIPES[name].square(five(case), case["size"])
        one = square.side / RECIPES[name].size  # pixel of the crop
        assert float((square.corners() - expected).norm(dim=1).max()) < 0.05 * one

    def test_eg3d_in_the_wild(self, case):
        square = RECIPES["eg3d-wild"].square(five(case), case["size"])
        assert square.angle == 0
        assert float((square.corners() - box(case, "eg3d_wild")).norm(dim=1).max()) < square.side / 512

    def test_labels(self, case):
        rotation = tensor(case["rotation"])
        phi, theta = tensor(case["gram_pose"]).float()[:, None]
        for name in ("eg3d", "eg3d-wild"):
            assert torch.allclose(seen(RECIPES[name], rotation).label()[0], tensor(case["label"]).float(), atol=1e-5)
        for name in ("gram", "anifacegan"):
            expected = sphere_camera(phi, theta, 12, 256).label()
            assert torch.allclose(seen(RECIPES[name], rotation).label(), expected, atol=1e-5)


def test_mean_mannequin():
    knob = shapes.named(Scene.from_z(torch.zeros(1, Z_DIM)).parameters()[0].tolist())

    def surface(x, y):
        z = torch.linspace(1.2, 0.3, 9001)
        inside = shapes.skin(knob, torch.full_like(z, x), torch.full_like(z, y), z) < 0
        return float(z[inside.nonzero()[0, 0]])

    lips = shapes.mouth(knob, torch.zeros(1), torch.zeros(1))
    corner, height = float(lips.half_width), shapes.MOUTH_HEIGHT + knob["mouth_height"]
    nose = max((surface(0.0, y), y) for y in torch.linspace(-0.35, -0.05, 61).tolist())
    eye = (knob["eye_spacing"], shapes.EYE_HEIGHT)
    for k, expected in enumerate([(-eye[0], *eye[1:]), eye, (0.0, nose[1]), (-corner, height), (corner, height)]):
        expected = (*expected, surface(*expected))
        assert torch.allclose(MANNEQUIN[k], torch.tensor(expected, dtype=torch.float32), atol=6e-3)


@pytest.mark.parametrize("yaw, pitch, roll", [(0.0, 0.0, 0.0), (0.4, -0.2, 0.3), (-0.7, 0.2, -1.0)])
def test_mannequins_are_framed_as_they_are_seen(yaw, pitch, roll):
    """A picture of the mean mannequin, turned, enlarged and moved, gets the frame of the rig back."""
    seen = Rig().camera(yaw, pitch).project(MANNEQUIN[None])[0][0].double()
    frame = Square((300.0, 200.0), 150.0, roll)
    square = RECIPES["embedded"].square(frame.to_picture(seen), (640, 480), (yaw, pitch))
    assert torch.allclose(square.corners(), frame.corners(), atol=1e-3)
    assert torch.allclose(frame.to_frame(frame.to_picture(seen)), seen)


@pytest.mark.parametrize("yaw, pitch, roll", [(0.3, -0.2, 0.5), (-0.6, 0.3, -2.0), (0.0, 0.0, 0.0)])
def test_rotations(yaw, pitch, roll):
    rotation = head_rotation(yaw, pitch, roll)
    assert viewing_angles(rotation) == pytest.approx((yaw, pitch, roll), abs=1e-9)
    # The head's own x, y and z as the rig's camera sees them, from far away.
    far = Rig(radius=1e4, focal=1e4, pivot=(0, 0, 0), near=1, far=2e4).camera(yaw, pitch)
    ends, _ = far.project(torch.eye(3)[None])
    flat = (ends[0].double() - 0.5) * tensor([1, -1])
    upright = head_rotation(yaw, pitch)
    assert torch.allclose(flat, upright[:2].T, atol=1e-3)
    turned = Square((0.0, 0.0), 1.0, roll).to_picture(flat * tensor([1, -1]) + 0.5) * tensor([1, -1])
    assert torch.allclose(turned, rotation[:2].T, atol=1e-3)


def test_pose_of_five_points():
    for angles in ((0.3, -0.2, 0.5), (-0.6, 0.3, 0.0)):
        points = (STANDARD @ head_rotation(*angles).T)[:, :2] * tensor([90, -90]) + 200
        assert viewing_angles(pose_of_five(points)) == pytest.approx(angles, abs=1e-6)


def test_angles_are_the_rigs():
    rotation = head_rotation(0.3, 0.1, 0.2)
    assert RECIPES["embedded"].angles(rotation) == pytest.approx((0.3, 0.1), abs=1e-6)
    for recipe in RECIPES.values():
        same = recipe.rig.camera(*recipe.angles(rotation))
        assert torch.allclose(same.position, seen(recipe, rotation).position, atol=1e-5)


def test_only_the_meshs_angles_are_calibrated():
    rotation = head_rotation(0.3, 0.1, 0.2)
    assert RECIPES["stylesdf"].angles(rotation) == pytest.approx((0.3, 0.1), abs=1e-6)
    assert RECIPES["stylesdf"].angles(rotation, meshed=True) == pytest.approx((0.315, 0.108), abs=1e-6)


def test_rigs_are_the_generators():
    from models.generators import eg3d, stylesdf
    from models.generators.gram import grid_focal

    assert Rig(**eg3d.RIG) == RECIPES["eg3d"].rig
    assert RECIPES["stylesdf"].rig == stylesdf.RIG
    assert RECIPES["gram"].rig.focal == pytest.approx(grid_focal(12, 256))
    assert CALIBRATION.keys() == RECIPES.keys()


@pytest.mark.parametrize(
    "points",
    [
        torch.zeros(5, 2),
        FIVE * math.nan,
        FIVE[:4],
        FIVE[[1, 0, 2, 4, 3]],
        torch.arange(10.0).reshape(5, 2),
    ],
)
def test_points_that_are_no_face(points):
    for recipe in RECIPES.values():
        with pytest.raises(UserError, match="five points are not a face's"):
            recipe.square(points, (128, 128))


def test_unknown():
    with pytest.raises(UserError, match=r"no recipe 'x'.*embedded, ffhq"):
        find_recipe("x")
