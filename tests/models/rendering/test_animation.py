"""A picture with another expression: what moves and what does not, told by points, pixels and a reader of faces."""

import math

import pytest
import torch
from skimage.draw import polygon2mask
from torch.nn import functional as F
from torch.testing import assert_close

from models.camera import Rig
from models.faces.pose import DEPTH, lift
from models.faces.reader import FaceReader
from models.features.landmarks import FaceLandmarks
from models.files import ROOT
from models.image import read_image
from models.metrics.faces import expression_scores
from models.rendering.animation import EXPRESSIONS, animate, face_views, moved
from models.rendering.mesh import Mesh
from models.rendering.raster import rasterise

SIDE, RIG = 128, Rig()
# Of MediaPipe's drawing of its mesh, not of the code.
CORNERS, MOUTH, LIPS = (33, 263), (61, 291), (13, 14)
OVAL = (10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152, 148, 176, 149,
        150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109)  # fmt: skip
EYES = ((33, 246, 161, 160, 159, 158, 157, 173, 133, 155, 154, 153, 145, 144, 163, 7),
        (263, 466, 388, 387, 386, 385, 384, 398, 362, 382, 381, 380, 374, 373, 390, 249))  # fmt: skip
PARTS = {
    "eyes": EYES[0] + EYES[1],
    "brows": (70, 63, 105, 66, 107, 300, 293, 334, 296, 336),
    "nose": (1, 2, 4, 5, 6, 19, 94, 168, 195, 197),
    "lips": (61, 291, 0, 17, 13, 14, 37, 267, 84, 314),
    "chin": (152, 148, 377),
}


@pytest.fixture(scope="module")
def faces():
    return FaceLandmarks()


@pytest.fixture(scope="module")
def canonical():
    return FaceReader.load().canonical


@pytest.fixture(scope="module")
def picture():
    return read_image(ROOT / "tests" / "fixtures" / "faces" / "astronaut_128.png")


@pytest.fixture(scope="module")
def points(faces, picture):
    return faces.find(picture)


def change(before, after, a, b):
    """By how much two points have come apart, in distances between the eyes."""
    eyes = (before[CORNERS[0], :2] - before[CORNERS[1], :2]).norm()
    return float(((after[a] - after[b])[:2].norm() - (before[a] - before[b])[:2].norm()) / eyes)


def lowered(before, after, *part):
    """By how much points have gone down, in distances between the eyes, of an upright face."""
    eyes = (before[CORNERS[0], :2] - before[CORNERS[1], :2]).norm()
    return float((after[list(part), 1] - before[list(part), 1]).mean() / eyes)


def ellipse(polygon, size, grown=1.0):
    """Pixels of a polygon (n, 2) in units of the side, made larger."""
    middle = polygon.mean(0)
    corners = (middle + grown * (polygon - middle)).flip(1) * size
    return torch.from_numpy(polygon2mask((size, size), corners.numpy()))


class TestMoved:
    @pytest.mark.parametrize("name", EXPRESSIONS)
    def test_strength(self, points, canonical, name):
        full = moved(points, canonical, name)
        assert torch.equal(moved(points, canonical, name, 0.0), points)
        assert torch.equal(full[:, 2], points[:, 2]) and not torch.equal(full, points)
        assert_close(moved(points, canonical, name, 0.5), (full + points) / 2)
        assert_close(moved(points[:, :2], canonical, name), full[:, :2])

    def test_what_it_is(self, points, canonical):
        after = {name: moved(points, canonical, name) for name in EXPRESSIONS}
        assert change(points, after["smile"], *MOUTH) > 0.1 and lowered(points, after["smile"], *MOUTH) < -0.03
        assert change(points, after["pucker"], *MOUTH) < -0.1
        assert lowered(points, after["frown"], *MOUTH) > 0.03 and lowered(points, after["frown"], 107, 336) > 0.03
        assert change(points, after["mouth_open"], *LIPS) > 0.15 and lowered(points, after["mouth_open"], 152) > 0.1
        assert lowered(points, after["brow_raise"], *PARTS["brows"]) < -0.05
        for upper, lower in ((159, 145), (386, 374)):
            opening, closed = (float((p[upper] - p[lower])[:2].norm()) for p in (points, after["blink"]))
            assert closed < 0.15 * opening

    @pytest.mark.parametrize(
        ("name", "parts"),
        [
            ("smile", ("eyes", "brows", "nose", "chin")),
            ("frown", ("eyes", "nose", "chin")),
            ("mouth_open", ("eyes", "brows", "nose")),
            ("brow_raise", ("eyes", "nose", "lips", "chin")),
            ("blink", ("brows", "nose", "lips", "chin")),
            ("pucker", ("eyes", "brows", "nose", "chin")),
        ],
    )
    def test_the_rest_of_the_face_stays(self, points, canonical, name, parts):
        after = moved(points, canonical, name)
        eyes = (points[CORNERS[0], :2] - points[CORNERS[1], :2]).norm()
        for part in parts:
            distance = (after - points)[list(PARTS[part])].norm(dim=1).mean() / eyes
            assert distance < 0.03, part

    @pytest.mark.parametrize("name", EXPRESSIONS)
    def test_a_turned_face_of_any_size_does_the_same(self, points, canonical, name):
        cos, sin = math.cos(0.7), math.sin(0.7)
        turn = 3 * torch.tensor([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])
        assert_close(moved(points @ turn, canonical, name), moved(points, canonical, name) @ turn, atol=1e-5, rtol=0)

    def test_half_precision(self, points, canonical):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(moved(points, canonical, "smile"), moved(points, canonical, "smile"))
            inside = moved(points, canonical, "smile")
        assert torch.equal(inside, moved(points, canonical, "smile"))

    def test_unknown(self, points, canonical, picture):
        with pytest.raises(KeyError, match="wink"):
            moved(points, canonical, "wink")
        with pytest.raises(KeyError, match="wink"):
            animate(picture, points, canonical, "wink")


class TestAnimate:
    @pytest.mark.parametrize("name", EXPRESSIONS)
    def test_without_strength_it_is_the_picture(self, picture, points, canonical, name):
        image, after = animate(picture, points, canonical, name, 0.0)
        assert_close(image, picture, atol=1e-4, rtol=0)
        assert torch.equal(after, points)

    @pytest.mark.parametrize("name", EXPRESSIONS)
    def test_only_the_face_changes(self, picture, points, canonical, name):
        image, after = animate(picture, points, canonical, name)
        assert torch.equal(after, moved(points, canonical, name))
        assert image.shape == picture.shape and image.abs().max() <= 1
        change = (image - picture).abs().amax(1)[0]
        assert change.max() > 0.1
        around = ellipse(points[list(OVAL), :2], SIDE, 1.55)
        assert change[~around].max() < 1e-4

    def test_a_blink_leaves_all_but_the_eyes(self, picture, points, canonical):
        image, _ = animate(picture, points, canonical, "blink")
        eyes = ellipse(points[list(EYES[0]), :2], SIDE, 3.0) | ellipse(points[list(EYES[1]), :2], SIDE, 3.0)
        assert torch.equal(image[..., ~eyes], picture[..., ~eyes])
        assert not torch.equal(image[..., eyes], picture[..., eyes])

    def test_a_reader_of_faces_sees_it(self, faces, picture, points, canonical):
        def measured(name):  # found anew: a mouth that is open makes the face longer
            image, _ = animate(picture, points, canonical, name)
            return expression_scores(name, points, faces.find(image))

        blink, opened, smile = (measured(name) for name in ("blink", "mouth_open", "smile"))
        assert blink[0] < 0.75 and opened[0] > 0.1 and smile[0] > 0.05
        assert max(rest for _, rest in (blink, opened, smile)) < 0.05  # what the reader itself is off by

    @pytest.mark.parametrize("name", ["smile", "mouth_open", "blink"])
    def test_large_pictures(self, picture, points, canonical, name):
        """Triangles of a face reach over 64 pixels there, which was refused."""
        large = F.interpolate(picture, (640, 640), mode="bicubic", align_corners=False).clamp(-1, 1)
        image, _ = animate(large, points, canonical, name)
        wanted, _ = animate(picture, points, canonical, name)
        smaller = F.interpolate(image, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
        before = F.interpolate(large, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
        change = (wanted - picture).abs().mean()
        assert ((smaller - before) - (wanted - picture)).abs().mean() < 0.4 * change

    @pytest.mark.parametrize("shift", [(-0.5, 0.0), (0.6, 0.0), (0.0, -0.9), (0.0, 0.9)], ids=str)
    def test_a_face_that_leaves_the_picture(self, picture, points, canonical, shift):
        beyond = points + torch.tensor([*shift, 0.0])
        for name in EXPRESSIONS:
            image, _ = animate(picture, beyond, canonical, name)
            assert image.isfinite().all() and image.shape == picture.shape


class TestViews:
    """Of the face that all people share, where it is known in the world."""

    @pytest.fixture
    def world(self, canonical):
        return canonical.vertices / 12

    @pytest.fixture
    def camera(self):
        return RIG.camera(0.2, 0.1)

    @pytest.fixture
    def points(self, world, camera):
        """As the mesh would tell them: z in units of the side, from any zero, and understated."""
        uv, z = camera.project(world[None])
        focal = camera.intrinsics[0, 0, 0]
        return torch.cat([uv[0], ((z[0] - z.mean()) * focal / z.mean() / DEPTH)[:, None]], 1)

    @pytest.fixture
    def ramps(self):
        """A picture whose red and green say where a pixel is."""
        at = (torch.arange(64) + 0.5) / 64
        x, y = at.expand(64, 64), at[:, None].expand(64, 64)
        return torch.stack([x, y, torch.zeros_like(x)])[None]

    def test_the_mesh_comes_back_by_the_heads_depth(self, world, canonical, camera, points):
        _, _, depth = rasterise(Mesh.of(world, canonical.triangles, world), camera, 96)
        found = lift(points, camera, depth[None, None])
        assert found is not None
        size = float((world[10] - world[152]).norm())
        assert float((found - world).norm(dim=1).max()) < 0.03 * size
        uv, _ = RIG.camera(-0.5, -0.1).project(found[None])
        wanted, _ = RIG.camera(-0.5, -0.1).project(world[None])
        assert float((uv - wanted).norm(dim=-1).mean()) * SIDE < 0.5

    def test_nothing_is_known_where_there_is_no_head(self, camera, points):
        assert lift(points, camera, torch.zeros(1, 1, 32, 32)) is None

    def test_its_own_camera_gives_the_picture_back(self, ramps, points, world, canonical, camera):
        seen = face_views(ramps, points, world, canonical, camera, 64)
        known = seen.weight > 0
        assert seen.image.shape == (1, 3, 64, 64) and seen.weight.shape == (1, 1, 64, 64)
        assert 0.03 < known.float().mean() < 0.5 and seen.weight.min() >= 0 and 0.9 < seen.weight.max() <= 1
        assert (seen.image - ramps).abs()[known.expand_as(ramps)].max() < 5e-3

    def test_another_camera_sees_each_point_where_it_projects(self, ramps, points, world, canonical, camera):
        others = RIG.camera(torch.tensor([-0.3, 0.5]), 0.0)
        seen = face_views(ramps, points, world, canonical, others, 96)
        assert seen.image.shape == (2, 3, 96, 96)
        for i in range(2):
            uv, _ = others[i].project(world[None])
            grid = (2 * uv - 1)[None]
            weight = F.grid_sample(seen.weight[i : i + 1], grid, align_corners=False).flatten()
            colour = F.grid_sample(seen.image[i : i + 1], grid, align_corners=False)[0, :2, 0].T
            known = weight > 0.3
            assert known.sum() > 100
            assert (colour - points[:, :2])[known].norm(dim=1).mean() < 0.5 / 64

    def test_less_is_known_the_farther_the_camera_is(self, ramps, points, world, canonical):
        yaws = torch.tensor([0.2, 0.8, 2.2, 3.3])
        seen = face_views(ramps, points, world, canonical, RIG.camera(yaws, 0.1), 64)
        near, far, side, behind = seen.weight.flatten(1).sum(1).tolist()
        assert near > far > side >= 0 and behind == 0

    def test_no_size_is_refused(self, ramps, points, world, canonical, camera):
        seen = face_views(ramps, points, 2 * world, canonical, camera, 512)
        assert seen.weight.max() > 0.9
