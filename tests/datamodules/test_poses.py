"""Cameras of artworks: given, made from angles, estimated; and those that a generator cannot have."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from datamodules.artworks import Artwork, ArtworkDataModule
from datamodules.mannequin_artworks import MannequinArtworks
from datamodules.poses import check_camera, check_labels, find_camera, nearest_camera
from models import artifact
from models.camera import Rig
from models.errors import UserError
from models.features.embedded import EmbeddedPose
from models.features.landmarks import FaceLandmarks
from models.files import ROOT

RIG = Rig()
NEAR = Rig(radius=2.7, near=2.2, far=3.3, yaw_max=math.radians(30), yaw_mean=0.1)  # another generator's


def artwork(**options):
    return Artwork("a", torch.zeros(3, 8, 8), **options)


def generator():
    """No more of one than its rig."""
    return SimpleNamespace(rig=NEAR)


def degrees(*angles):
    return tuple(math.radians(angle) for angle in angles)


class TestCheck:
    @pytest.mark.parametrize(
        ("angles", "match"),
        [
            ((61, 0), "yaw 61 and pitch 0 degrees are beyond .* of which 60 and 0 are the nearest"),
            ((0, -26), "pitch -26 degrees are beyond .* of which 0 and -25 are the nearest"),
            ((float("nan"), 0), "yaw nan"),
        ],
    )
    def test_angles_beyond_the_rigs(self, angles, match):
        with pytest.raises(UserError, match=match):
            check_camera(artwork(angles=degrees(*angles)), RIG)

    def test_the_generators_rig_counts_and_no_other(self):
        check_camera(artwork(angles=degrees(59, 0)), RIG)
        with pytest.raises(UserError, match="a: yaw 59"):
            check_camera(artwork(angles=degrees(59, 0)), NEAR)
        wide = Rig(yaw_max=math.radians(90))
        check_camera(artwork(angles=degrees(85, 0)), wide)

    def test_another_worlds_label(self):
        check_camera(artwork(label=RIG.camera(0.3).label()[0]), RIG)
        with pytest.raises(UserError, match=r"camera is 7 from the head, where the generator sees from 2\.2 to 3\.3"):
            check_camera(artwork(label=RIG.camera(0.3).label()[0]), NEAR)

    def test_one_that_is_to_be_estimated(self):
        check_camera(artwork(), NEAR)
        with pytest.raises(UserError, match="has no camera: give"):
            check_camera(artwork(), NEAR, estimated=False)


class TestLabels:
    def test_the_first_that_is_wrong_is_named(self):
        good, bad = NEAR.camera(0.1).label()[0], RIG.camera(0.1).label()[0]
        check_labels({}, NEAR, "")
        check_labels({"a": good, "b": good}, NEAR, "")
        with pytest.raises(UserError, match=r"^b: its camera is 7 from the head, .* from 2\.2 to 3\.3: do this$"):
            check_labels({"a": good, "b": bad, "c": bad}, NEAR, "do this")


class TestFind:
    def test_given(self):
        label = RIG.camera(0.3, -0.1).label()
        assert torch.equal(
            find_camera(artwork(label=label[0]), generator(), None, None, torch.device("cpu")).label(), label
        )

    def test_made_from_angles(self):
        found = find_camera(artwork(angles=(0.2, 0.1)), generator(), None, None, torch.device("cpu"))
        assert torch.equal(found.label(), NEAR.camera(0.2, 0.1).label())

    def test_estimated_within_the_rig(self):
        found = find_camera(artwork(), generator(), lambda image: torch.tensor([[2.0, 0.1]]), None, torch.device("cpu"))
        yaw, pitch = NEAR.angles(found)
        assert (float(yaw), float(pitch)) == pytest.approx((0.1 + math.radians(30), 0.1), abs=1e-5)

    def test_seen_in_the_face_within_the_rig(self):
        item = artwork(angles=(2.0, 0.1), estimated=True)
        check_camera(item, NEAR)
        yaw, pitch = NEAR.angles(find_camera(item, generator(), None, None, torch.device("cpu")))
        assert (float(yaw), float(pitch)) == pytest.approx((0.1 + math.radians(30), 0.1), abs=1e-5)

    def test_the_face_comes_before_the_pose_network(self):
        item = artwork(angles=(0.2, 0.1), estimated=True)
        found = find_camera(item, generator(), lambda image: torch.tensor([[-0.2, 0.0]]), None, torch.device("cpu"))
        assert torch.equal(found.label(), NEAR.camera(0.2, 0.1).label())

    def test_unknown(self):
        with pytest.raises(UserError, match="a has no camera"):
            find_camera(artwork(), generator(), None, None, torch.device("cpu"))

    def test_what_is_given_wins(self):
        """Neither network is asked."""

        def never(*_):
            raise AssertionError

        faces = SimpleNamespace(find=never)
        label = RIG.camera(0.3, -0.1).label()
        for item in (artwork(label=label[0]), artwork(label=label[0], angles=(0.2, 0.1), estimated=True)):
            assert torch.equal(find_camera(item, generator(), never, faces, torch.device("cpu")).label(), label)
        found = find_camera(artwork(angles=(0.2, 0.1)), generator(), never, faces, torch.device("cpu"))
        assert torch.equal(found.label(), NEAR.camera(0.2, 0.1).label())


class TestChoice:
    """Between the camera that the face's mesh tells and that of the pose network, by heads of the shipped prior."""

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def networks(cls):
        cls.faces, cls.pose = FaceLandmarks(), EmbeddedPose()
        cls.heads = artifact.load(ROOT / "assets" / "prior").module("generator").requires_grad_(False)

    def degrees(self, item):
        camera = find_camera(item, self.heads, self.pose, self.faces, torch.device("cpu"))
        return [math.degrees(float(angle)) for angle in self.heads.rig.angles(camera)]

    def test_of_a_mannequin_the_pose_network_knows_more(self):
        (item,) = MannequinArtworks(split="val", subjects=1, styles=["ukiyoe"], size=64, views=2).items
        truth = [math.degrees(float(angle)) for angle in self.heads.rig.angles(item.camera)]
        misled = tuple(math.radians(angle + 15) for angle in truth)
        found = self.degrees(replace(item, label=None, angles=misled, estimated=True))
        assert found == pytest.approx(truth, abs=4)

    def test_of_a_portrait_of_a_person_the_mesh_does(self, caplog):
        picture = ROOT / "tests" / "fixtures" / "faces" / "astronaut_256.png"
        (item,) = ArtworkDataModule(str(picture), crop="face").items
        assert item.estimated and item.angles is not None
        seen = [math.degrees(angle) for angle in item.angles]
        with caplog.at_level("INFO"):
            assert self.degrees(item) == pytest.approx(seen, abs=1e-3)
        assert f"astronaut_256: its face shows yaw {seen[0]:.1f}, pitch {seen[1]:.1f} degrees" in caplog.text
        assert [math.degrees(a) for a in self.pose(item.image[None])[0].tolist()] != pytest.approx(seen, abs=5)

    def test_the_nearest_of_any_number(self):
        """A head of the prior itself is seen from where it is."""
        rig, ws = self.heads.rig, self.heads.mapping(self.heads.sample_z(1, torch.Generator().manual_seed(5)))
        image = self.heads.synthesis(ws, rig.camera(0.3, 0.0)).image
        cameras = {str(yaw): rig.camera(yaw, 0.0) for yaw in (-0.3, 0.0, 0.3, 0.6)}
        assert nearest_camera(self.heads, cameras, image, self.faces) == "0.3"

    def test_where_no_face_is_found_the_first_is_taken(self, monkeypatch):
        monkeypatch.setattr(self.faces, "find", lambda image: None)
        cameras = {"b": self.heads.rig.camera(0.3), "a": self.heads.rig.camera(0.0)}
        assert nearest_camera(self.heads, cameras, torch.zeros(1, 3, 64, 64), self.faces) == "b"
