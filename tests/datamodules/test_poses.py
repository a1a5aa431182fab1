"""Cameras of artworks: given, made from angles, estimated; and those that a generator cannot have."""

import math
from types import SimpleNamespace

import pytest
import torch

from datamodules.artworks import Artwork
from datamodules.poses import check_camera, check_labels, find_camera
from models.camera import Rig
from models.errors import UserError

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
