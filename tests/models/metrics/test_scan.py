"""Scan distances: known motions, known offsets, and other solvers."""

import math

import numpy as np
import pytest
import torch
import trimesh
from scipy.optimize import least_squares
from scipy.spatial import procrustes
from scipy.spatial.transform import Rotation

from models.camera import Rig
from models.errors import UserError
from models.metrics.scan import (
    Scan,
    Similarity,
    Surface,
    Unmeasurable,
    align,
    closest_on_triangles,
    depth_surface,
    face_region,
    lifted,
    pooled,
    refine,
    scan_distances,
    scan_scores,
)
from tests.models.metrics.ball import RADIUS, RIG, look


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=draws(seed))


def some_motion(scale: float = 1.3, angle: float = 0.4) -> Similarity:
    rotation = Rotation.from_rotvec(angle * np.array([0.6, -0.48, 0.64])).as_matrix()
    return Similarity(scale, torch.from_numpy(rotation), torch.tensor([0.3, -2.0, 5.0], dtype=torch.float64))


def ball(level: int = 4, radius: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    mesh = trimesh.creation.icosphere(level, radius)
    return torch.tensor(mesh.vertices), torch.tensor(mesh.faces)


def egg(points: torch.Tensor) -> torch.Tensor:
    """A surface without symmetry, from points of the unit sphere."""
    x, y, z = points.unbind(1)
    bump = 1 + 0.2 * torch.exp(-4 * ((x - 0.3) ** 2 + (y + 0.5) ** 2 + (z - 0.8) ** 2)) + 0.1 * x * y + 0.1 * y * z
    return points * bump[:, None] * torch.tensor([1.0, 1.25, 0.85], dtype=torch.float64)


KEYPOINTS = torch.tensor(
    [
        *([-0.47, 0.06, 0.6], [-0.11, 0.06, 0.8], [0.11, 0.06, 0.8], [0.47, 0.06, 0.6]),
        *([0.0, -0.3, 0.9], [-0.22, -0.5, 0.8], [0.22, -0.5, 0.8]),
    ],
    dtype=torch.float64,
)


class TestAlign:
    def test_finds_known_motions(self):
        points, wanted = normal(7, 3), some_motion()
        found = align(points, wanted(points))
        assert found.scale == pytest.approx(1.3, abs=1e-12)
        torch.testing.assert_close(found.rotation, wanted.rotation, atol=1e-12, rtol=0)
        torch.testing.assert_close(found.translation, wanted.translation, atol=1e-12, rtol=0)
        rigid = some_motion(1.0)
        assert align(points, rigid(points), scale=False).scale == 1.0
        torch.testing.assert_close(align(points, rigid(points), scale=False)(points), rigid(points))

    def test_against_scipy(self):
        points, target = normal(7, 3), some_motion()(normal(7, 3)) + 0.3 * normal(7, 3, seed=1)
        centred = (target - target.mean(0)).numpy()
        _, _, disparity = procrustes(target.numpy(), points.numpy())
        residual = float((align(points, target)(points) - target).square().sum())
        # Where no mirror image fits better, scipy's procrustes has the same least residual.
        assert residual / (centred**2).sum() == pytest.approx(disparity, rel=1e-10)
        rotation, rest = Rotation.align_vectors(centred, (points - points.mean(0)).numpy())
        rigid = align(points, target, scale=False)
        np.testing.assert_allclose(rigid.rotation.numpy(), rotation.as_matrix(), atol=1e-10)
        assert float((rigid(points) - target).square().sum()) == pytest.approx(rest**2, rel=1e-10)

    def test_never_mirrors(self):
        points = normal(7, 3)
        found = align(points, points * torch.tensor([-1.0, 1.0, 1.0]))
        assert float(torch.linalg.det(found.rotation)) == pytest.approx(1)

    def test_what_fixes_no_rotation(self):
        line = torch.arange(7.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, 2.0, 0.0])
        with pytest.raises(UserError, match="on one line"):
            align(line, line)
        with pytest.raises(UserError, match="not finite"):
            align(normal(7, 3) / 0, normal(7, 3))
        with pytest.raises(ValueError, match="must both be"):
            align(normal(7, 3), normal(6, 3))


class TestNearest:
    def test_triangles_against_a_search(self):
        points, corners = 2 * normal(40, 3), normal(40, 3, 3, seed=1)
        corners[-3:, 2] = corners[-3:, :2].mean(1)  # flat ones
        corners[-1] = corners[-1, :1]  # a single point
        found = closest_on_triangles(points, corners)
        grid = torch.linspace(0, 1, 401, dtype=torch.float64)
        s, t = (g[torch.ones_like(g).cumsum(0) > 0] for g in torch.meshgrid(grid, grid, indexing="ij"))
        s, t = s[s + t <= 1], t[s + t <= 1]
        for point, (a, b, c), place in zip(points, corners, found, strict=True):
            tried = a + s[:, None] * (b - a) + t[:, None] * (c - a)
            least = float((tried - point).norm(dim=1).min())
            distance = float((place - point).norm())
            assert distance <= least + 1e-12
            assert distance == pytest.approx(least, abs=0.02)
            # and the place is on the triangle
            weights = torch.linalg.lstsq(torch.stack([b - a, c - a], 1), place - a).solution
            on = a + torch.stack([b - a, c - a], 1) @ weights
            torch.testing.assert_close(on, place, atol=1e-9, rtol=0)

    def test_against_all_triangles_and_trimesh(self):
        vertices, faces = normal(60, 3), torch.stack([torch.randperm(60, generator=draws(s))[:3] for s in range(150)])
        vertices[:4] *= 20  # some very large triangles among small ones
        points = 3 * normal(80, 3, seed=3)
        surface = Surface(vertices, faces)
        assert len(surface.corners) > 150
        place, distance, unit = surface.nearest(points)
        every = closest_on_triangles(points[:, None], vertices[faces][None])
        wanted = (every - points[:, None]).norm(dim=-1).min(1).values
        torch.testing.assert_close(distance, wanted, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close((place - points).norm(dim=1), distance, atol=1e-12, rtol=0)
        torch.testing.assert_close(unit.norm(dim=1), torch.ones(80, dtype=torch.float64))
        pairs = np.repeat(points.numpy(), 150, 0), np.tile(vertices[faces].numpy(), (80, 1, 1))
        other = trimesh.triangles.closest_point(pairs[1], pairs[0]).reshape(80, 150, 3)
        np.testing.assert_allclose(np.linalg.norm(other - points.numpy()[:, None], axis=2).min(1), wanted, atol=1e-9)

    def test_one_triangle(self):
        corners = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        _, distance, _ = Surface(corners, torch.tensor([[0, 1, 2]])).nearest(torch.tensor([[0.2, 0.2, 3.0], [2, 0, 0]]))
        assert distance.tolist() == [3.0, 1.0]

    def test_bad_surfaces(self):
        with pytest.raises(UserError, match="without triangles"):
            Surface(normal(3, 3), torch.zeros(0, 3))
        with pytest.raises(UserError, match="has triangles with vertex 9"):
            Surface(normal(3, 3), torch.tensor([[0, 1, 9]]))
        with pytest.raises(UserError, match="not finite"):
            Surface(normal(3, 3) / 0, torch.tensor([[0, 1, 2]]))


class TestRefine:
    @pytest.mark.parametrize("scale", [True, False])
    def test_finds_a_small_motion(self, scale):
        vertices, faces = ball()
        vertices = egg(vertices)
        wanted = some_motion(1.08 if scale else 1.0, 0.15)
        wanted = Similarity(wanted.scale, wanted.rotation, torch.tensor([0.05, -0.08, 0.1], dtype=torch.float64))
        points = wanted(vertices[::3])
        found = refine(points, Surface(vertices, faces), scale)
        assert found.scale == pytest.approx(wanted.scale, abs=1e-6)
        torch.testing.assert_close(found.rotation, wanted.rotation, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.translation, wanted.translation, atol=1e-6, rtol=0)

    def test_against_scipys_solver(self):
        vertices, faces = ball(2)
        vertices = egg(vertices)
        points = some_motion(1.0, 0.1)(egg(ball(2)[0][::2]))
        points = points - points.mean(0) + 0.03 * normal(len(points), 3)
        triangles = vertices[faces]

        def cost(x: np.ndarray) -> np.ndarray:
            rotation = torch.from_numpy(Rotation.from_rotvec(x[:3]).as_matrix())
            moved = math.exp(x[6]) * triangles @ rotation.T + torch.from_numpy(x[3:6])
            every = closest_on_triangles(points[:, None], moved[None])
            return (every - points[:, None]).norm(dim=-1).min(1).values.numpy()

        wanted = least_squares(cost, np.zeros(7), x_scale=0.1).cost * 2
        motion = refine(points, Surface(vertices, faces))
        moved = Surface(motion(vertices), faces)
        assert float(moved.nearest(points)[1].square().sum()) == pytest.approx(wanted, rel=1e-4)

    def test_a_perfect_surface_stays(self):
        vertices, faces = ball(3)
        found = refine(egg(vertices), Surface(egg(vertices), faces))
        torch.testing.assert_close(found(vertices), vertices, atol=1e-9, rtol=0)


def scan_of(points: torch.Tensor, keypoints: torch.Tensor = KEYPOINTS) -> Scan:
    return Scan(points, keypoints)


class TestScanDistances:
    def test_the_same_surface_elsewhere(self):
        vertices, faces = ball()
        vertices, motion = egg(vertices), some_motion()
        found = scan_distances(scan_of(vertices), motion(vertices), faces, motion(KEYPOINTS))
        assert 0 < len(found) < len(vertices)
        assert float(found.max()) < 1e-9

    def test_a_larger_ball(self):
        """A ball of radius 1.05 that nothing may move: 0.05 everywhere, but for the facets' sagging."""
        points, _ = ball(4)
        vertices, faces = ball(5, 1.05)
        found = scan_distances(scan_of(points), vertices, faces, KEYPOINTS, scale=False, refined=False)
        assert found.tolist() == pytest.approx([0.05] * len(found), abs=1e-3)
        assert scan_scores(found)["scan_median"] == pytest.approx(0.05, abs=1e-3)

    def test_scale_forgives_size_alone(self):
        points, _ = ball(4)
        vertices, faces = ball(5, 1.3)
        free = scan_distances(scan_of(points), vertices, faces, 1.3 * KEYPOINTS)
        kept = scan_distances(scan_of(points), vertices, faces, 1.3 * KEYPOINTS, scale=False)
        assert float(free.max()) < 1e-3
        assert float(kept.mean()) > 0.01

    def test_a_displaced_ball(self):
        """Moved by t along z without alignment: the distance of a point to the moved ball is | |p - t| - 1 |."""
        points, _ = ball(4)
        vertices, faces = ball(6)
        away = torch.tensor([0.0, 0.0, 0.1], dtype=torch.float64)
        scan = scan_of(points)
        # The reconstruction's keypoints are where the scan's are: a wrong depth is what is measured.
        found = scan_distances(scan, vertices + away, faces, KEYPOINTS, refined=False)
        wanted = ((scan.face() - away).norm(dim=1) - 1).abs()
        torch.testing.assert_close(found, wanted, atol=5e-4, rtol=0)
        assert float(scan_distances(scan, vertices + away, faces, KEYPOINTS).max()) < 1e-3  # refinement undoes it

    def test_nothing_near_the_keypoints(self):
        vertices, faces = ball(1)
        with pytest.raises(UserError, match="no point of the scan lies near its keypoints"):
            scan_distances(scan_of(vertices + 50), vertices, faces, KEYPOINTS)


def test_the_region_of_the_face():
    centre, radius = face_region(KEYPOINTS)
    assert centre.tolist() == pytest.approx([0, -0.3 + 0.3 * 0.36, 0.9 - 0.3 * 0.1])
    assert radius == pytest.approx(0.7 * (0.94 + math.hypot(0.36, 0.1)))
    with pytest.raises(ValueError, match="7 keypoints"):
        Scan(KEYPOINTS, KEYPOINTS[:5])


def test_scores_against_numpy():
    distances = [normal(100, seed=s).abs() for s in (1, 2)] + [normal(31, seed=3).abs()]
    every = np.concatenate([d.numpy() for d in distances])
    wanted = {"scan_median": np.median(every), "scan_mean": every.mean(), "scan_sd": every.std()}
    assert scan_scores(torch.cat(distances)) == pytest.approx(wanted)
    together = {f"{name}_pooled": value for name, value in wanted.items()}
    assert pooled([None, *distances, None]) == pytest.approx({**together, "scan_missing": 2})
    nothing = pooled([None])
    assert nothing.pop("scan_missing") == 1 and nothing.keys() == together.keys()
    assert all(math.isnan(value) for value in nothing.values())
    with pytest.raises(UserError, match="no picture"):
        pooled([])


class TestDepthSurface:
    def test_a_balls_depth_map(self):
        camera = RIG.camera(0.3, 0.1)
        view = look(camera, 96)
        vertices, faces = depth_surface(view.depth, view.mask, camera)
        used = vertices[faces.unique()]
        assert used.norm(dim=1).tolist() == pytest.approx([RADIUS] * len(used), abs=1e-4)
        a, b, c = vertices[faces].unbind(1)
        facing = (torch.linalg.cross(b - a, c - a) * (camera.position - a)).sum(1)
        assert (facing > 0).all()
        points = used.double()[::7] * 1.02
        assert Surface(vertices, faces).nearest(points)[1].median() == pytest.approx(0.02, abs=2e-3)

    def test_steps_are_not_bridged(self):
        camera = Rig(pivot=(0.0, 0.0, 0.0)).camera(0.0)
        depth = torch.full((1, 1, 8, 8), 7.0)
        depth[..., 4:] = 15.0
        _, faces = depth_surface(depth, torch.ones_like(depth), camera)
        assert len(faces) == 2 * 7 * 7 - 2 * 7
        alpha = torch.ones_like(depth)
        alpha[..., 0, 0] = 0
        assert len(depth_surface(depth, alpha, camera)[1]) == 2 * 7 * 7 - 2 * 7 - 1

    def test_keypoints_are_lifted_to_the_surface(self):
        camera = RIG.camera(0.0)
        view = look(camera, 128)
        points = torch.nn.functional.normalize(KEYPOINTS, dim=1)
        found = lifted(points, view.depth, view.mask, camera)
        torch.testing.assert_close(found, points, atol=2e-3, rtol=0)
        farther = lifted(points, view.depth + 0.5, view.mask, camera)
        uv, z = camera.project(farther.float()[None])
        torch.testing.assert_close(uv, camera.project(points.float()[None])[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(z, camera.project(points.float()[None])[1] + 0.5, atol=2e-3, rtol=0)

    def test_a_keypoint_beside_the_surface_takes_the_nearest_pixel(self):
        camera = RIG.camera(0.0)
        view = look(camera, 64)
        beside = lifted(torch.tensor([[1.3, 0.0, 0.0]]), view.depth, view.mask, camera)
        edge = view.depth[0, 0, 32][view.mask[0, 0, 32] > 0.5][-1]
        assert float(camera.project(beside.float()[None])[1]) == pytest.approx(float(edge), abs=0.2)
        with pytest.raises(Unmeasurable, match="shows nothing"):
            lifted(KEYPOINTS, view.depth, 0 * view.mask, camera)

    def test_depths_that_are_no_numbers_show_nothing(self):
        camera = RIG.camera(0.0)
        view = look(camera, 32)
        holes = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
        holes[..., 14:17, 14:16], holes[..., 20, 20] = True, True
        left_out = depth_surface(view.depth, torch.where(holes, 0, view.mask), camera)[1]
        for value in (math.nan, math.inf, -math.inf):
            depth = torch.where(holes, value, view.depth)
            vertices, faces = depth_surface(depth, view.mask, camera)
            assert torch.equal(faces, left_out) and bool(vertices[faces].isfinite().all())
            points = torch.nn.functional.normalize(KEYPOINTS, dim=1)
            wanted = lifted(points, view.depth, torch.where(holes, 0, view.mask), camera)
            assert torch.equal(lifted(points, depth, view.mask, camera), wanted)

    def test_a_fault_of_the_scan_is_told_from_one_of_the_reconstruction(self):
        ball = look(RIG.camera(0.0), 32)
        vertices, faces = depth_surface(ball.depth, ball.mask, RIG.camera(0.0))
        flat = KEYPOINTS * torch.tensor([1.0, 0, 0])
        with pytest.raises(Unmeasurable, match="of a reconstruction: keypoints that lie on one line"):
            scan_distances(Scan(KEYPOINTS, KEYPOINTS), vertices, faces, flat)
        with pytest.raises(Unmeasurable, match="without triangles"):
            scan_distances(Scan(KEYPOINTS, KEYPOINTS), vertices, faces[:0], KEYPOINTS)
        with pytest.raises(UserError, match=r"^keypoints that lie on one line") as caught:
            scan_distances(Scan(flat, flat), vertices, faces, KEYPOINTS)
        assert not isinstance(caught.value, Unmeasurable)
