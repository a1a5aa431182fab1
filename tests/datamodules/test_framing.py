"""Framing: which face, from where, how turned, and what a person may say of it."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut, cat

from datamodules.artworks import Artwork, ArtworkDataModule, read_artworks
from datamodules.framing import Edits, Framing, five_points, reader, recipe_of
from datamodules.mannequins import RIG, Scene, render, subject_z
from datamodules.poses import check_camera
from models import artifact
from models.errors import UserError
from models.faces.pose import yaw_pitch_roll
from models.faces.reader import FaceReader
from models.faces.recipes import RECIPES, STANDARD, head_rotation

EYES = ((203, 102), (248, 104))  # of the astronaut, by eye
MOUTH = ((202, 139), (246, 142))
POINTS = "203,102 248,104 222,131 202,139 246,142"


def tensor(pixels):
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None] / 127.5 - 1


@pytest.fixture(scope="module")
def person():
    return tensor(astronaut())


def alike(one, other):
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) > 0.9


def framing(recipe="embedded", size=64, crop="face"):
    return Framing(RECIPES[recipe], size, crop)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_photo(person, recipe):
    framed = framing(recipe)(person, "x")
    assert framed.image.shape == (3, 64, 64) and framed.faces == 1 and framed.presence > 0.9
    assert torch.allclose(framed.five[[0, 1, 3, 4]], torch.tensor([*EYES, *MOUTH]).float(), atol=4)
    assert framed.points.shape == (468, 2) and 0 < float(framed.points.min()) < float(framed.points.max()) < 1
    assert framed.estimated and abs(math.degrees(framed.angles[0])) < 6  # she looks into the camera
    eyes = framed.square.to_frame(torch.tensor(EYES).float())
    tilt = math.degrees(math.atan2(*(eyes[1] - eyes[0]).flip(0).tolist()))
    assert abs(tilt) < 2 or recipe == "eg3d-wild"  # turned level
    assert abs(float(eyes[:, 0].mean()) - 0.5) < 0.06


def test_only_what_is_used_is_run(person, monkeypatch):
    """The person's mask is the stages' own, of their own frames."""
    monkeypatch.setattr(FaceReader, "person", None)
    assert framing()(person, "x").points is not None


@pytest.mark.parametrize("degrees", [-50, 20, 90])
def test_a_turned_picture_gives_the_same_frame(person, degrees):
    turned = Image.fromarray(astronaut()).rotate(-degrees, Image.Resampling.BICUBIC, expand=True)
    straight, tilted = framing()(person, "x"), framing()(tensor(np.array(turned)), "x")
    assert math.degrees(tilted.square.angle - straight.square.angle) == pytest.approx(degrees, abs=2.5)
    assert tilted.angles == pytest.approx(straight.angles, abs=math.radians(4))
    middle = (slice(None), slice(20, 46), slice(16, 48))
    assert alike(tilted.image[middle], straight.image[middle])


def test_the_border_is_padded_and_nothing_is_shrunk(person):
    whole, cut = framing()(person, "x"), framing()(person[..., 60:160, 170:280], "x")
    assert cut.square.side == pytest.approx(whole.square.side, rel=0.05) and cut.square.side > 130
    assert any("beyond the picture" in warning for warning in cut.warnings)
    assert torch.allclose(cut.five + torch.tensor([170.0, 60.0]), whole.five, atol=4)
    assert float(cut.image.std(dim=(1, 2)).min()) > 0.1  # not black or flat


@pytest.fixture(scope="module")
def couple():
    small = np.array(Image.fromarray(astronaut()).resize((300, 300)))
    canvas = np.full((512, 812, 3), 150, np.uint8)
    canvas[:, 300:], canvas[100:400, :300] = astronaut(), small
    return tensor(canvas)


class TestSeveral:
    def test_the_largest_or_another(self, couple, caplog):
        caplog.set_level("INFO")
        first, second = framing()(couple, "x"), framing()(couple, "x", Edits(face=2))
        assert first.faces == 2 and "number 1 of 2 by size" in caplog.text
        assert float(first.five[0, 0]) == pytest.approx(503, abs=5)
        assert float(second.five[0, 0]) == pytest.approx(203 * 300 / 512, abs=5)

    def test_that_are_not_there(self, couple):
        with pytest.raises(UserError, match=r"x: found 2 faces, where number 3 is asked for: .*--points"):
            framing()(couple, "x", Edits(face=3))

    def test_of_one_size(self, caplog):
        twins = tensor(np.concatenate([astronaut(), astronaut()], 1))
        with pytest.raises(UserError, match=r"found 2 faces of about one size \(1 at x=.*2 at x=.*choose with --face"):
            framing()(twins, "x")
        framed = framing(crop="auto")(twins, "x")
        assert "taking the first: choose with --face" in caplog.text and len(framed.warnings) == 1
        assert framing()(twins, "x", Edits(face=2)).faces == 2


class TestNone:
    def test_is_said(self, caplog):
        grey = torch.zeros(1, 3, 96, 128)
        with pytest.raises(UserError, match=r"found no face, where one is needed.*--points.*--crop centre"):
            framing()(grey, "x")
        framed = framing(crop="auto")(grey, "x")
        assert "taking the centred square" in caplog.text and framed.angles is framed.points is framed.camera is None
        assert framed.square.centre == (64, 48) and framed.square.side == 96

    def test_by_hand(self, person):
        found, given = framing()(person, "x"), framing()(person, "x", Edits(points=POINTS))
        assert torch.allclose(given.square.corners(), found.square.corners(), atol=8)
        assert given.angles == pytest.approx(found.angles, abs=2e-2)  # the mesh is read there

    def test_by_hand_where_the_mesh_sees_none(self):
        drawn = torch.zeros(1, 3, 200, 200)
        framed = framing()(drawn, "x", Edits(points="80,80 120,80 100,105 85,125 115,125"))
        assert abs(framed.angles[0]) < 0.1 and framed.points is None and framed.estimated
        assert framed.square.angle == pytest.approx(0, abs=1e-3)
        assert any("no human face" in warning for warning in framed.warnings)


def test_points_that_are_no_faces_are_of_a_picture(person, monkeypatch):
    """The finder's, where the mesh is not present: a face upside down."""
    (face,) = reader().find(person)
    upside_down = replace(face, presence=0.1, keypoints=face.keypoints * torch.tensor([1.0, -1.0]))
    monkeypatch.setattr(FaceReader, "find", lambda self, image: [upside_down])
    with pytest.raises(UserError, match=r"^x: the five points are not a face's: .*--points"):
        framing()(person, "x")


def test_the_pose_of_points_where_there_is_no_mesh():
    """The standard face's own points in a picture of nothing: its pose, as no mesh saw it, is not calibrated."""
    five = (STANDARD @ head_rotation(0.3, 0.1).T)[:, :2] * torch.tensor([60, -60]) + 128
    framed = framing("stylesdf")(torch.zeros(1, 3, 256, 256), "x", Edits(points=five.tolist()))
    assert framed.points is None and framed.angles == pytest.approx((0.3, 0.1), abs=1e-4)


def test_an_animal():
    framed = framing()(tensor(cat()), "x")
    assert framed.points is None and any("as with animals" in warning for warning in framed.warnings)


@pytest.mark.parametrize(("seed", "yaw", "pitch"), [(1_000_201, -17, -11), (1_000_203, 22, 6), (1_000_206, -28, -2)])
def test_mannequins_get_their_frame_back(seed, yaw, pitch):
    camera = RIG.camera(math.radians(yaw), math.radians(pitch))
    framed = framing()(render(Scene.from_z(subject_z([seed])), camera, 128, supersample=1, compiled=False).image, "x")
    assert framed.square.side == pytest.approx(128, rel=0.12)
    assert framed.square.centre == pytest.approx((64, 64), abs=6)
    assert abs(math.degrees(framed.square.angle)) < 4
    assert [math.degrees(angle) for angle in framed.angles] == pytest.approx([yaw, pitch], abs=8)


def test_a_profile():
    seen = render(Scene.from_z(subject_z([1_000_071])), RIG.camera(math.radians(70)), 128, compiled=False).image
    framed = framing()(seen, "x")
    assert any("a profile" in warning for warning in framed.warnings)
    assert math.degrees(framed.angles[0]) == pytest.approx(70, abs=15)


def test_a_face_of_3_percent():
    canvas = np.full((1400, 3300, 3), 120, np.uint8)
    canvas[700:1212, 2300:2812] = astronaut()
    framed = framing()(tensor(canvas), "x")
    assert torch.allclose(framed.five[:2], torch.tensor(EYES).float() + torch.tensor([2300.0, 700.0]), atol=5)


def test_a_tiny_face_is_said(person):
    small = tensor(np.array(Image.fromarray(astronaut()).resize((128, 128))))
    assert any("its eyes are 11 pixels apart" in warning for warning in framing()(small, "x").warnings)


def test_framed_pictures_stay_as_they_are(person):
    framed = framing(size=96)(person, "x").image[None]
    again = framing(size=96, crop="auto")(framed, "x")
    assert torch.equal(again.image, framed[0]) and again.boxed
    assert again.estimated and again.points is not None  # what its face shows is known all the same
    noise = torch.rand(1, 3, 64, 64) * 2 - 1
    for crop in ("auto", "centre", "none"):
        assert torch.equal(framing(crop=crop)(noise, "x").image, noise[0])
    # A picture of the face alone is not framed.
    tight = person[..., 80:160, 185:265]
    assert not framing(size=96, crop="auto")(tight, "x").boxed


class TestEdits:
    def test_of_the_square(self, person):
        plain = framing()(person, "x", Edits(points=POINTS))
        eyes = torch.tensor(EYES).float().mean(0)
        before = plain.square.to_frame(eyes)
        larger = framing()(person, "x", Edits(points=POINTS, scale=1.25)).square
        assert larger.side == pytest.approx(plain.square.side / 1.25) and larger.centre == plain.square.centre
        moved = framing()(person, "x", Edits(points=POINTS, shift=[0.1, -0.05])).square.to_frame(eyes)
        assert torch.allclose(moved - before, torch.tensor([0.1, -0.05]), atol=1e-5)
        assert framing()(person, "x", Edits(points=POINTS, roll_deg=30)).square.angle == pytest.approx(math.radians(30))

    def test_of_the_pose(self, person):
        framed = framing()(person, "x", Edits(yaw_deg=20))
        assert not framed.estimated and framed.angles[0] == pytest.approx(math.radians(20))
        seen = framing()(person, "x").angles
        assert framed.angles[1] == pytest.approx(seen[1])
        assert torch.allclose(framed.camera.yaw, torch.tensor(math.radians(20)), atol=1e-5)

    def test_what_is_only_seen_is_not_beyond_the_rig(self):
        """A head seen from 40 degrees above: the yaw that is given is not refused for a pitch that nobody gave."""
        above = RIG.camera(0.0, math.radians(40))
        image = render(Scene.from_z(subject_z([1_000_203])), above, 128, compiled=False).image
        framed = framing()(image, "x", Edits(yaw_deg=0))
        assert [math.degrees(angle) for angle in framed.angles] == pytest.approx([0, 25], abs=1e-5)
        check_camera(Artwork("x", framed.image, angles=framed.angles), RIG)
        assert math.degrees(framing()(image, "x").angles[1]) == pytest.approx(25, abs=1e-5)
        given = framing()(image, "x", Edits(yaw_deg=0, pitch_deg=40)).angles
        with pytest.raises(UserError, match="pitch 40 degrees are beyond"):
            check_camera(Artwork("x", framed.image, angles=given), RIG)

    def test_of_a_box(self, person):
        framed = framing()(person, "x", Edits(crop=[100, 20, 256, 200], scale=2))
        assert framed.square.centre == (228, 120) and framed.square.side == 100

    @pytest.mark.parametrize(
        ("edits", "match"),
        [
            (Edits(yaw_deg=181), "yaw_deg is 181, it must be between"),
            (Edits(roll_deg=math.nan), "roll_deg is nan"),
            (Edits(scale=0), "scale is 0, it must be between 0.1 and 10"),
            (Edits(shift=[0.1]), "shift must be"),
            (Edits(shift=["a", 0]), "shift must be"),
            (Edits(points="1,2 3,4"), "points must be five pairs of numbers"),
            (Edits(points=[[1, 2]] * 4 + [["a", 3]]), "points must be five pairs of numbers"),
            (Edits(points="248,104 203,102 222,131 246,142 202,139"), "five points are not a face's"),
            (Edits(points=[[5, 5]] * 5), "five points are not a face's"),
            (Edits(points="1e9,0 2e9,0 1e9,1e9 1e9,2e9 2e9,2e9"), r"points .* are not in the image of 512 x 512"),
        ],
    )
    def test_that_are_none(self, person, edits, match):
        with pytest.raises(UserError, match=f"^x: .*{match}"):
            framing()(person, "x", edits)


def test_points_are_read():
    pairs = [[1, 2], [5, 2], [3, 4], [2, 6], [4, 6]]
    assert five_points("1,2 5,2 3,4 2,6 4,6", "x").tolist() == five_points(pairs, "x").tolist() == pairs


def test_lists_say_how(tmp_path):
    Image.fromarray(astronaut()).save(tmp_path / "a.png")
    points = five_points(POINTS, "x").tolist()
    entry = {"file": "a.png", "yaw_deg": 5, "points": points, "roll_deg": 3, "scale": 1.2, "shift": [0.05, 0]}
    (tmp_path / "artworks.json").write_text(json.dumps({"items": [entry]}))
    (item,) = read_artworks(str(tmp_path), size=64)
    edits = Edits(yaw_deg=5, points=points, roll_deg=3, scale=1.2, shift=[0.05, 0])
    expected = framing()(tensor(astronaut()), "x", edits)
    assert torch.equal(item.image, expected.image) and item.angles == expected.angles and not item.estimated


def test_options_of_the_data_module(tmp_path):
    Image.fromarray(astronaut()).save(tmp_path / "a.png")
    (item,) = ArtworkDataModule(str(tmp_path / "a.png"), size=64, recipe="eg3d", points=POINTS).items
    expected = framing("eg3d")(tensor(astronaut()), "x", Edits(points=POINTS))
    assert torch.equal(item.image, expected.image) and item.estimated
    assert torch.equal(item.label, expected.camera.label()[0])
    Image.fromarray(astronaut()).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"points are of one picture, .* has 2: write them in artworks\.json"):
        _ = ArtworkDataModule(str(tmp_path), size=64, points=POINTS).items
    (wild,) = ArtworkDataModule(str(tmp_path / "a.png"), size=64, recipe="eg3d-wild").items
    rotation = reader().canonical.head_pose(reader().find(tensor(astronaut()))[0].points[None])
    roll = yaw_pitch_roll(rotation)[2]
    # An upright crop's camera is tilted as the head is.
    up = -wild.camera.cam2world[0, :3, 1]
    assert wild.estimated and wild.angles is None and abs(float(up[0])) == pytest.approx(abs(math.sin(roll)), abs=0.02)
    given = ArtworkDataModule(str(tmp_path / "a.png"), size=64, recipe="eg3d-wild", yaw_deg=10, pitch_deg=0).items[0]
    there = RECIPES["eg3d"].rig.camera(math.radians(10), 0.0)
    assert torch.allclose(given.camera.position, there.position, atol=1e-5)
    # The head's rotation in the camera's axes.
    head = torch.diag(torch.tensor([1.0, -1.0, -1.0])) @ given.camera.cam2world[0, :3, :3].T
    assert float(yaw_pitch_roll(head[None])[2]) == pytest.approx(float(roll), abs=0.02)


class TestRecipes:
    def test_of_artifacts(self, tmp_path):
        assert recipe_of("eg3d").name == "eg3d"
        assert recipe_of("assets/prior").name == recipe_of("assets/inverter").name == "embedded"
        module = artifact.load("assets/faces").module("mask")
        for name, extra, stage in (
            ("eg3d", {"recipe": "eg3d"}, "zoo"),
            ("old", {"family": "irse50"}, "zoo"),
            ("odd", {"recipe": "x"}, "zoo"),
        ):
            artifact.save(tmp_path / name, stage=stage, modules={"mask": module}, extra=extra)
        assert recipe_of(str(tmp_path / "eg3d")).name == "eg3d"
        made = artifact.save(
            tmp_path / "made",
            stage="anchor",
            modules={"mask": module},
            parents={"prior": artifact.load(tmp_path / "eg3d")},
        )
        assert recipe_of(str(made.path)).name == "eg3d"
        (made.path / "mask.safetensors").unlink()  # large with others: nothing but the manifest is read
        assert recipe_of(str(made.path)).name == "eg3d"
        with pytest.raises(UserError, match="does not say how faces are framed for it: name a recipe"):
            recipe_of(str(tmp_path / "old"))
        with pytest.raises(UserError, match="there is no recipe 'x'"):
            recipe_of(str(tmp_path / "odd"))
        with pytest.raises(UserError, match="'none' is neither a recipe"):
            recipe_of("none")


def test_boxes_of_whole_pixels_are_only_resized():
    image = torch.rand(1, 3, 40, 60) * 2 - 1
    framed = framing(size=20)(image, "x", Edits(crop=[10, 5, 20, 20]))
    assert torch.equal(framed.image, image[0, :, 5:25, 10:30])
