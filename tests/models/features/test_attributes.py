"""Attributes measured in pictures: shares of parts, and expressions between the points of a face."""

import math

import pytest
import torch

from datamodules.mannequins.render import RIG, render
from datamodules.mannequins.scene import Z_NAMES, Scene, sample_z
from models.errors import UserError
from models.faces.reader import LEFT_EYE, RIGHT_EYE
from models.features.attributes import FaceMeasures, HeadPose, SegmentShares, Tones, measures
from models.features.base import AttributeScorer
from models.features.embedded import EmbeddedParser
from models.features.landmarks import FaceLandmarks
from models.files import ROOT
from models.image import read_image


class TestShares:
    def test_they_are_those_of_the_truth(self):
        """Of heads with and without glasses and hair."""
        z = sample_z(6, torch.Generator().manual_seed(2))
        z[:3, Z_NAMES.index("glasses")], z[3:, Z_NAMES.index("glasses")] = 2.0, -2.0
        z[::2, Z_NAMES.index("hair_style")] = -2.5  # bald
        truth = render(Scene.from_z(z), RIG.camera(0.0).repeat_interleave(6), 64)
        shares = SegmentShares(EmbeddedParser(), ["glasses", "hair"])
        assert isinstance(shares, AttributeScorer) and shares.names == ("glasses", "hair")
        found = shares(truth.image)
        labels = [EmbeddedParser(weights=None).segments.index(name) for name in shares.names]
        wanted = torch.stack([(truth.segmentation == label).float().flatten(1).mean(1) for label in labels], 1)
        torch.testing.assert_close(found, wanted, atol=0.03, rtol=0)
        assert float(found[:3, 0].min()) > 4 * float(found[3:, 0].max())

    def test_parts(self):
        parser = EmbeddedParser(weights=None)
        everything = SegmentShares(parser)
        assert everything.names == parser.segments[1:]
        with pytest.raises(UserError, match="the parser knows no 'hat', it knows: background, skin"):
            SegmentShares(parser, ["hat"])


class Turned(torch.nn.Module):
    def forward(self, image):
        return image[:, :2, 0, 0]


def test_pose_and_tones():
    image = torch.rand(3, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pose, tones = HeadPose(Turned()), Tones()
    assert isinstance(pose, AttributeScorer) and isinstance(tones, AttributeScorer)
    assert pose.names == ("yaw", "pitch") and torch.equal(pose(image), image[:, :2, 0, 0])
    for row, picture in zip(tones(image), image.double(), strict=True):
        red, green, blue = (float(channel.mean()) for channel in picture)
        assert row.tolist() == pytest.approx([0.299 * red + 0.587 * green + 0.114 * blue, red - blue], abs=1e-6)


@pytest.fixture(scope="module")
def points():
    return FaceLandmarks().canonical.vertices * torch.tensor([1.0, -1.0, -1.0])


class TestMeasures:
    """The mean face, with points moved."""

    def moved(self, points, rows, shift):
        changed = points.clone()
        changed[list(rows)] += torch.tensor(shift)
        return measures(changed) - measures(points)

    @pytest.mark.parametrize(
        ("name", "rows", "shift"),
        [
            ("smile", (61, 291), (0.0, -0.5, 0.0)),  # corners up
            ("mouth_open", (14,), (0.0, 1.0, 0.0)),
            ("brow_raise", (105, 334), (0.0, -0.5, 0.0)),
            ("blink", (*RIGHT_EYE[4:], *LEFT_EYE[4:]), (0.0, -0.3, 0.0)),  # lower lids up
        ],
    )
    def test_each_rises_alone(self, points, name, rows, shift):
        change = dict(zip(FaceMeasures.names, self.moved(points, rows, shift).tolist(), strict=True))
        assert change.pop(name) > 0.01 and max(map(abs, change.values())) < 1e-6

    def test_a_head_may_be_turned_and_of_any_size(self, points):
        angle = 0.4
        turn = torch.tensor(
            [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1.0]]
        )
        torch.testing.assert_close(measures(3 * points @ turn.T + 5), measures(points), atol=1e-5, rtol=1e-4)

    def test_in_pictures(self):
        picture = read_image(ROOT / "tests" / "fixtures" / "faces" / "astronaut_256.png")
        scorer = FaceMeasures()
        assert isinstance(scorer, AttributeScorer)
        small = torch.nn.functional.interpolate(picture, (64, 64), mode="area")
        found = [scorer(image)[0] for image in (picture, picture.flip(3), small)]
        torch.testing.assert_close(found[1], found[0], atol=0.08, rtol=0)
        torch.testing.assert_close(found[2], found[0], atol=0.15, rtol=0)
        assert bool(scorer(torch.zeros(1, 3, 64, 64)).isnan().all())
