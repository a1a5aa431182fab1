"""What a reader of faces says of a head: by points made by hand, by a made-up reader, and on the shipped prior."""

import math
from types import SimpleNamespace

import pytest
import torch

from models import artifact
from models.faces.reader import FaceReader
from models.features.landmarks import FaceLandmarks
from models.files import ROOT
from models.latents import Latents
from models.metrics.faces import EXPECTED, YAWS_DEG, expression_scores, measured_expressions, score_faces
from models.rendering.output import Rendering

EYES = (33, 263)


def face(**moved):
    """Points at random places but for the eyes' outer corners, one apart; ``p13=(x, y)`` puts point 13 elsewhere."""
    points = torch.rand(468, 3, generator=torch.Generator().manual_seed(0))
    points[EYES[0]], points[EYES[1]] = torch.tensor([0.0, 0.0, 0.3]), torch.tensor([0.6, 0.8, 0.1])
    for name, place in moved.items():
        points[int(name[1:]), :2] = torch.tensor(place)
    return points


class TestExpressions:
    def test_an_open_mouth_is_a_difference(self):
        shut, opened = face(p13=(0.5, 0.5), p14=(0.5, 0.52)), face(p13=(0.5, 0.5), p14=(0.5, 0.7))
        measure, rest = expression_scores("mouth_open", shut, opened)
        assert measure == pytest.approx(0.18, abs=1e-6) and rest == 0
        twice = expression_scores("mouth_open", 2 * shut, 2 * opened)
        assert twice == pytest.approx((0.18, 0.0), abs=1e-6)  # in distances between the eyes

    def test_a_smile_is_wider(self):
        at_rest, wide = face(p61=(0.2, 0.9), p291=(0.5, 0.9)), face(p61=(0.15, 0.9), p291=(0.55, 0.9))
        assert expression_scores("smile", at_rest, wide)[0] == pytest.approx(0.1, abs=1e-6)
        assert expression_scores("smile", wide, at_rest)[0] == pytest.approx(-0.1, abs=1e-6)

    def test_a_blink_is_a_share(self):
        neutral, closed = face(), face()
        for upper, lower in ((159, 145), (158, 153), (160, 144), (157, 154), (161, 163),
                             (386, 374), (385, 380), (387, 373), (384, 381), (388, 390)):  # fmt: skip
            neutral[upper] = neutral[lower] + torch.tensor([0.0, -0.1, 0.0])
            closed[lower] = neutral[lower]
            closed[upper] = neutral[lower] + torch.tensor([0.0, -0.03, 0.5])
        measure, rest = expression_scores("blink", neutral, closed)
        assert measure == pytest.approx(0.3, abs=1e-5) and rest == 0

    def test_what_else_moves_is_told(self):
        neutral = face()
        nose = neutral.clone()
        nose[[1, 2, 4, 5, 6, 19, 94, 97, 168, 195, 197, 326], 0] += 0.1
        _, rest = expression_scores("mouth_open", neutral, nose)
        assert rest == pytest.approx(0.1 * 12 / (32 + 10 + 12), rel=1e-4)  # of eyes, brows and nose

    def test_a_face_that_is_lost_has_no_expression(self):
        for name, expected in EXPECTED.items():
            measure, rest = expression_scores(name, face(), None)
            assert math.isnan(rest) and expected.missing(measure, rest) == "no face is seen to judge it by"

    @pytest.mark.parametrize(
        ("name", "good", "bad", "says"),
        [
            ("blink", 0.6, 0.95, "the eyes only close to 0.95 of their opening"),
            ("mouth_open", 0.1, 0.012, "the mouth only opens by 0.01 of the eyes' distance"),
            ("smile", 0.03, -0.03, "the mouth widens by -0.03 of the eyes' distance"),
        ],
    )
    def test_why_it_is_none(self, name, good, bad, says):
        expected = EXPECTED[name]
        assert expected.missing(good, 0.02) == "" and expected.missing(bad, 0.02) == says
        assert expected.missing(good, 0.3) == "the rest of the face moves by 0.30 of the eyes' distance"


class MadeUp:
    """A reader of pictures that are their own description: yaw, and how far the mouth is open, in the first pixels."""

    def __init__(self, canonical, blind=()):
        self.canonical, self.blind = canonical, blind

    def find(self, image):
        yaw, mouth = image[0, 0, 0, :2].tolist()
        if any(abs(math.degrees(yaw) - lost) < 0.1 for lost in self.blind):
            return None
        cos, sin = math.cos(yaw), math.sin(yaw)
        # A camera on the side of +x sees the head turned the other way.
        turn = torch.tensor([[cos, 0.0, -sin], [0.0, 1.0, 0.0], [sin, 0.0, cos]])
        vertices = self.canonical.vertices.clone()
        vertices[14, 1] -= mouth
        return (vertices @ turn.T) * torch.tensor([1.0, -1.0, -1.0]) / 20 + 0.5


@pytest.fixture(scope="module")
def canonical():
    return FaceReader.load().canonical


class TestScores:
    def generator(self, expressions=("pucker", "mouth_open"), scale=1.0):
        rig = artifact.load(ROOT / "assets" / "prior").module("generator").rig

        def synthesis(ws, camera, expression=None, resolution=None):
            image = torch.zeros(1, 3, resolution, resolution)
            image[0, 0, 0, 0] = scale * float(rig.angles(camera)[0]) + float(ws.groups["ws"].sum())
            image[0, 0, 0, 1] = 0.0 if expression is None else float(expression[0, -1])
            return Rendering(image)

        return SimpleNamespace(rig=rig, expressions=expressions, free_resolution=True, synthesis=synthesis)

    def scores(self, faces, generator, ws=0.0, own=None):
        own = torch.zeros(1, len(generator.expressions)) if own is None else own
        camera = generator.rig.camera(math.radians(10))
        artwork = torch.zeros(1, 3, 128, 128)
        artwork[0, 0, 0, 0] = math.radians(10)
        found = score_faces(generator, Latents({"ws": torch.full((1, 1, 1), ws)}), own, camera, artwork, faces)
        return {(s.view, s.metric): s.value for s in found}

    def test_a_head_that_does_what_it_is_asked(self, canonical):
        found = self.scores(MadeUp(canonical), self.generator())
        for yaw in YAWS_DEG:
            assert found[f"yaw={yaw}", "face_found"] == 1
        assert found["", "found_36"] == 1
        assert found["", "yaw_offset_deg"] == pytest.approx(0, abs=0.01)
        assert found["", "yaw_slope"] == pytest.approx(1, abs=1e-3)
        assert found["input", "face_found"] == 1 and found["input", "points"] < 1e-4
        corners = float((canonical.vertices[EYES[0]] - canonical.vertices[EYES[1]])[:2].norm())

        assert found["front", "mouth_open"] == pytest.approx(1 / corners, rel=1e-3)
        assert found["front", "mouth_open_rest"] == pytest.approx(0, abs=1e-5)
        assert len(found) == 2 + len(YAWS_DEG) + 3 + 2  # pucker is nothing that points can tell

    def test_one_that_turns_too_little_and_looks_aside(self, canonical):
        found = self.scores(MadeUp(canonical), self.generator(scale=0.5), ws=math.radians(7))
        assert found["", "yaw_slope"] == pytest.approx(0.5, abs=1e-3)
        assert found["", "yaw_offset_deg"] == pytest.approx(7, abs=0.05)

    def test_views_without_a_face(self, canonical):
        found = self.scores(MadeUp(canonical, blind=(-36, 24)), self.generator())
        assert found["yaw=-36", "face_found"] == 0 and found["", "found_36"] == 0.5
        assert found["", "yaw_slope"] == pytest.approx(1, abs=1e-3)  # of the rest
        front = self.scores(MadeUp(canonical, blind=(0,)), self.generator())
        assert ("", "yaw_offset_deg") not in front and front["front", "mouth_open"] == 0  # lost is failed
        assert math.isnan(front["front", "mouth_open_rest"])
        no = self.scores(MadeUp(canonical, blind=(*YAWS_DEG, 10)), self.generator())
        assert {value for value in no.values() if not math.isnan(value)} == {0.0}
        assert len(no) == 1 + len(YAWS_DEG) + 1 + 2 and sum(map(math.isnan, no.values())) == 1

    def test_without_expressions(self, canonical):
        found = self.scores(MadeUp(canonical), self.generator(expressions=()))
        assert not any(view == "front" for view, _ in found)
        one = self.generator(expressions=())
        ws = Latents({"ws": torch.zeros(1, 1, 1)})
        assert measured_expressions(one, ws, torch.zeros(1, 0), MadeUp(canonical)) == {}

    def test_an_expression_is_told_from_the_heads_own(self, canonical):
        found = self.scores(MadeUp(canonical), self.generator(), own=torch.tensor([[0.0, 0.5]]))
        assert found["front", "mouth_open"] == pytest.approx(
            self.scores(MadeUp(canonical), self.generator())["front", "mouth_open"], rel=0.1
        )


def test_a_head_of_the_shipped_prior():
    generator = artifact.load(ROOT / "assets" / "prior").module("generator")
    ws = generator.mapping(generator.sample_z(1, torch.Generator().manual_seed(3)))
    own, camera = torch.zeros(1, len(generator.expressions)), generator.rig.camera(0.2)
    with torch.no_grad():
        artwork = generator.synthesis(ws, camera, resolution=128).image.clamp(-1, 1)
    found = {(s.view, s.metric): s.value for s in score_faces(generator, ws, own, camera, artwork, FaceLandmarks())}
    assert found["input", "face_found"] == 1 and found["input", "points"] < 0.01  # it is its own artwork
    assert sum(value for (_, name), value in found.items() if name == "face_found") >= 7
    assert found["", "yaw_offset_deg"] < 6 and 0.7 < found["", "yaw_slope"] < 1.3
    assert found["front", "mouth_open"] > 0.04 and all(math.isfinite(value) for value in found.values())
