"""Meshes fused from depth: shape and colours against the truth, closedness, files."""

import json
import math
import struct

import numpy as np
import pytest
import torch
import trimesh
from torch.nn import functional as F

from models.camera import Camera, Rig
from models.errors import UserError
from models.rendering.mesh import Mesh, fuse, mesh_cameras, write_mesh
from models.rendering.output import Rendering
from models.rendering.raster import draw, nearest_faces, rasterise

RIG = Rig(pivot=(0.0, 0.0, 0.0))
SIZE = 64


def balls(camera, *spheres, size=SIZE):
    """Analytic views of spheres (x, y, z, radius), coloured by the normal."""
    origins, directions = camera.rays(size)
    nearest = torch.full(origins.shape[:2], math.inf)
    normals = torch.zeros_like(origins)
    for *centre, radius in spheres:
        offset = origins - torch.tensor(centre)
        a, b = directions.square().sum(-1), (offset * directions).sum(-1)
        disc = b.square() - a * (offset.square().sum(-1) - radius**2)
        depth = torch.where(disc > 0, (-b - disc.clamp_min(0).sqrt()) / a, math.inf)
        closer = depth < nearest
        point = offset + torch.where(closer, depth, 0.0)[..., None] * directions
        normals = torch.where(closer[..., None], point / radius, normals)
        nearest = torch.where(closer, depth, nearest)
    hit = nearest.isfinite()
    shape = (len(camera), -1, size, size)
    return Rendering(
        image=torch.where(hit[..., None], normals, torch.ones(3)).mT.reshape(shape),
        depth=torch.where(hit, nearest, 0.0).reshape(shape),
        alpha=hit.float().reshape(shape),
    )


def volume(mesh):
    a, b, c = mesh.vertices[mesh.faces].unbind(1)
    return float((a * torch.linalg.cross(b, c)).sum() / 6)


def closed(mesh):
    """Every edge is used once in each direction."""
    a, b, c = mesh.faces.unbind(1)
    edges = torch.cat([torch.stack(pair, 1) for pair in ((a, b), (b, c), (c, a))])
    forward, backward = (set(map(tuple, e.tolist())) for e in (edges, edges.flip(1)))
    return len(forward) == len(edges) and forward == backward


@pytest.fixture(scope="module")
def ball():
    camera = mesh_cameras(RIG, 9, 3)
    return fuse(balls(camera, (0, 0, 0, 1.0)), camera, RIG, 64)


class TestFuse:
    def test_a_sphere(self, ball):
        radius = ball.vertices.norm(dim=1)
        seen = ball.vertices[:, 2] > 0
        assert (radius[seen] - 1).abs().mean() < 0.01 and (radius[seen] - 1).abs().max() < 0.05
        assert (radius - 1).abs().max() < 0.25  # no view sees the back: the visual hull closes it
        assert volume(ball) == pytest.approx(4 / 3 * math.pi, rel=0.06)
        assert closed(ball)
        assert ((ball.normals - F.normalize(ball.vertices, dim=1))[seen].norm(dim=1)).mean() < 0.1

    def test_colours(self, ball):
        seen = ball.vertices[:, 2] > 0.2
        assert (ball.colours - ball.vertices.clamp(-1, 1))[seen].abs().mean() < 0.04
        behind = ball.colours[ball.vertices[:, 2] < -0.8]  # filled in from around, not grey and not white
        assert behind[:, 2].mean() < 0.2 and behind.isfinite().all()

    def test_floaters_are_dropped_and_hollows_filled(self):
        camera = mesh_cameras(RIG, 9, 3)
        mesh = fuse(balls(camera, (0, 0, 0, 0.8), (0, 1.2, 0, 0.15)), camera, RIG, 64)
        assert mesh.vertices[:, 1].max() < 0.95
        assert closed(mesh) and volume(mesh) > 0

    def test_what_leaves_the_frame_is_cut_flat(self):
        camera = mesh_cameras(RIG, 9, 3)
        mesh = fuse(balls(camera, (0, -1.3, 0, 0.9)), camera, RIG, 64)
        half = RIG.radius / (2 * RIG.focal)
        assert mesh.vertices[:, 1].min() > -half - 0.05
        assert closed(mesh)

    def test_a_hole_in_one_view_does_no_harm(self, ball):
        camera = mesh_cameras(RIG, 9, 3)
        views = balls(camera, (0, 0, 0, 1.0))
        alpha = views.alpha.clone()
        alpha[13, :, 28:36, 28:36] = 0
        mesh = fuse(views.replace(alpha=alpha, depth=views.depth * alpha), camera, RIG, 64)
        assert volume(mesh) == pytest.approx(volume(ball), rel=0.01)

    def test_the_embedded_world(self):
        from datamodules.mannequins import RIG as rig
        from datamodules.mannequins import Scene, render, subject_z

        camera = mesh_cameras(rig, 7, 2)
        scene = Scene.from_z(subject_z([5]))
        truth = render(scene.repeat_interleave(len(camera)), camera, SIZE, supersample=1)
        mesh = fuse(Rendering(image=truth.image, depth=truth.depth, alpha=truth.mask), camera, rig, 96)
        assert closed(mesh)
        unseen = rig.camera(torch.tensor([0.26, -0.6]), 0.1)
        wanted = render(scene.repeat_interleave(2), unseen, SIZE, supersample=1)
        got = draw(mesh, unseen, SIZE, supersample=1)
        both = (got.alpha > 0) & (wanted.mask > 0)
        either = (got.alpha > 0) | (wanted.mask > 0)
        # The cut shoulders are missing from the mesh.
        assert both[:, :, :56].sum() / either[:, :, :56].sum() > 0.93
        assert (got.depth - wanted.depth)[both].abs().median() < 0.015
        assert (got.image - wanted.image).abs().mean(1, keepdim=True)[both].median() < 0.06

    def test_refusals(self):
        camera = mesh_cameras(RIG, 3, 1)
        views = balls(camera, (0, 0, 0, 1.0))
        with pytest.raises(UserError, match="needs depth and opacity"):
            fuse(Rendering(image=views.image), camera, RIG)
        with pytest.raises(UserError, match="show nothing solid"):
            fuse(views.replace(alpha=torch.zeros_like(views.alpha)), camera, RIG, 32)
        with pytest.raises(ValueError, match="3 cameras for 2 views"):
            fuse(Rendering(*(t[:2] for t in (views.image, views.image, views.depth, views.alpha))), camera, RIG)


class TestRaster:
    def test_equals_the_analytic_sphere(self, ball):
        solid = trimesh.creation.icosphere(5)
        vertices = torch.from_numpy(solid.vertices.copy()).float()
        mesh = Mesh.of(vertices, torch.from_numpy(solid.faces.copy()).long(), vertices)
        camera = RIG.camera(torch.tensor([0.5]), 0.2)
        got, wanted = draw(mesh, camera, SIZE, supersample=1), balls(camera, (0, 0, 0, 1.0))
        assert (got.alpha != wanted.alpha).float().mean() < 0.002
        inner = (got.alpha * wanted.alpha) > 0
        assert (got.depth - wanted.depth)[inner].abs().max() < 0.1
        assert (got.depth - wanted.depth)[inner].abs().mean() < 0.002
        assert (got.image - wanted.image).abs().mean(1, keepdim=True)[inner].mean() < 0.01

    def test_the_nearest_face_wins_and_weights_are_perspective_correct(self):
        near = torch.tensor([[-0.2, -0.2, 1.0], [0.2, -0.2, 1.0], [0.0, 0.2, 1.0]])
        vertices = torch.cat([near, near * torch.tensor([1.0, 1.0, 0.0])])
        mesh = Mesh.of(vertices, torch.tensor([[3, 4, 5], [0, 1, 2]]), vertices)
        camera = RIG.camera(0.0)
        face, weights, depth = rasterise(mesh, camera, SIZE)
        assert face[32, 32] == 1 and depth[32, 32] == pytest.approx(6.0, abs=1e-3)
        point = (mesh.vertices[mesh.faces[1]] * weights[32, 32, :, None]).sum(0)
        uv, _ = camera.project(point[None, None])
        assert uv[0, 0] * SIZE == pytest.approx([32.5, 32.5], abs=1e-2)

    def test_several_images_at_once(self):
        """Each with triangles of its own, some of them beyond the picture, of no area, or as near as another."""
        g = torch.Generator().manual_seed(0)
        corners = torch.randint(-8, 24, (3, 9, 3, 2), generator=g).float()
        inverse = 1 / (1 + torch.rand(3, 9, 3, generator=g))
        corners[:, 8], inverse[:, 8] = corners[:, 4], inverse[:, 4]
        face, depth = nearest_faces(corners, inverse, 16)
        for i in range(3):
            for y in range(16):
                for x in range(16):
                    found = []
                    for number, (a, b, c) in enumerate(corners[i].double().tolist()):
                        matrix = np.array([[a[0], b[0], c[0]], [a[1], b[1], c[1]], [1, 1, 1]])
                        if abs(np.linalg.det(matrix)) < 1e-6:
                            continue
                        weights = np.linalg.solve(matrix, [x, y, 1])
                        if (weights >= -1e-12).all():
                            found.append(
                                (float(np.float32(1 / (weights @ inverse[i, number].double().numpy()))), number)
                            )
                    wanted, owner = min(found, default=(0.0, -1))
                    assert depth[i, y, x] == pytest.approx(wanted, abs=1e-5)
                    assert face[i, y, x] == owner
        assert (face == -1).any() and (face == 4).any() and not (face == 8).any()
        assert (nearest_faces(corners[:, :0], inverse[:, :0], 16)[0] == -1).all()

    def test_refusals(self, ball):
        with pytest.raises(ValueError, match="one camera at a time"):
            rasterise(ball, RIG.camera(torch.zeros(2)), 8)
        behind = Mesh.of(torch.eye(3) + 20 * RIG.camera(0.0).position, torch.tensor([[0, 1, 2]]), torch.eye(3))
        with pytest.raises(ValueError, match="must lie in front"):
            rasterise(behind, RIG.camera(0.0), 8)

    def test_a_face_of_any_size(self):
        """A right angle whose legs are the picture's left and upper edge: every pixel is known."""
        camera, size = Camera(torch.eye(4)[None], torch.tensor([[[1.0, 0, 0.5], [0, 1, 0.5], [0, 0, 1]]])), 203
        corners = torch.tensor([[-1.0, -1.0, 2.0], [1.0, -1.0, 2.0], [-1.0, 1.0, 2.0]])
        face, weights, depth = rasterise(Mesh.of(corners, torch.tensor([[0, 1, 2]]), corners), camera, size)
        at = (torch.arange(size) + 0.5) / size
        x, y = at.expand(size, size), at[:, None].expand(size, size)
        firm = (x + y - 1).abs() > 1e-5  # not on the edge itself
        assert torch.equal((face == 0)[firm], (x + y < 1)[firm])
        hit = face == 0
        torch.testing.assert_close(weights[hit], torch.stack([1 - x - y, x, y], -1)[hit], atol=1e-5, rtol=0)
        torch.testing.assert_close(depth[hit], torch.full_like(depth[hit], 2.0))


class TestFiles:
    @pytest.mark.parametrize("suffix", ["glb", "ply"])
    def test_round_trip(self, ball, tmp_path, suffix):
        path = tmp_path / f"ball.{suffix}"
        write_mesh(path, ball)
        read = trimesh.load(path, force="mesh", process=False)
        assert read.vertices == pytest.approx(ball.vertices.numpy(), abs=1e-5)
        assert (read.faces == ball.faces.numpy()).all()
        if suffix == "ply":
            wanted = (ball.colours + 1) * 127.5
            assert read.visual.vertex_colors[:, :3] == pytest.approx(wanted.numpy(), abs=1)
        assert read.is_watertight and read.volume > 0
        assert [p.name for p in tmp_path.iterdir()] == [path.name]

    def test_a_viewer_shows_the_colours_of_the_picture(self, tmp_path):
        """As the standard has it: COLOR_0 is linear, a viewer encodes it; without a material it would be metal."""
        wanted = torch.arange(256).repeat(3, 1).T.float()  # every tone, among them the dark ones of hair
        points = torch.randn(256, 3)
        faces = torch.arange(254)[:, None] + torch.arange(3)
        write_mesh(tmp_path / "m.glb", Mesh.of(points, faces, wanted / 127.5 - 1))
        content = (tmp_path / "m.glb").read_bytes()
        (length,) = struct.unpack("<I", content[12:16])
        tree = json.loads(content[20 : 20 + length])
        (primitive,) = tree["meshes"][0]["primitives"]
        accessor = tree["accessors"][primitive["attributes"]["COLOR_0"]]
        assert (accessor["componentType"], accessor["type"], accessor["normalized"]) == (5123, "VEC4", True)
        assert not any(name.startswith("_") for name in primitive["attributes"])
        start = 28 + length + tree["bufferViews"][accessor["bufferView"]].get("byteOffset", 0)
        linear = np.frombuffer(content, "<u2", 4 * 256, start + accessor.get("byteOffset", 0)).reshape(256, 4) / 65535
        shown = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
        assert shown[:, :3] == pytest.approx(wanted.numpy(), abs=0.1) and (linear[:, 3] == 1).all()
        material = tree["materials"][primitive["material"]]
        assert material["extensions"] == {"KHR_materials_unlit": {}}
        assert tree["extensionsUsed"] == ["KHR_materials_unlit"]
        assert material["pbrMetallicRoughness"] == {"metallicFactor": 0.0, "roughnessFactor": 1.0}

    def test_refusals(self, ball, tmp_path):
        with pytest.raises(UserError, match=r"the suffix must be \.glb or \.ply"):
            write_mesh(tmp_path / "ball.obj", ball)
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="Not a directory"):
            write_mesh(tmp_path / "file" / "ball.ply", ball)


def test_mesh_cameras_cover_the_trained_poses():
    camera = mesh_cameras(RIG, 5, 3)
    assert isinstance(camera, Camera) and len(camera) == 15
    assert camera.yaw.abs().max() == pytest.approx(RIG.yaw_max, abs=1e-4)
    assert camera.pitch.abs().max() == pytest.approx(RIG.pitch_max, abs=1e-4)
    assert len(mesh_cameras(RIG, 5, 1)) == 5
