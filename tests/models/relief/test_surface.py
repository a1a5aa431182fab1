"""Surfaces that end where the head does, cameras and lights of shapes, and shapes as a generator."""

import math

import pytest
import torch
import trimesh
from PIL import Image
from torch.testing import assert_close

from models import artifact
from models.camera import Camera
from models.relief.pictures import light_from, moving_light
from models.relief.shape import Shape, head_mask, light_of
from models.relief.shapes import ReliefShapes
from models.relief.surface import cut, painted, surface
from models.rendering.mesh import write_mesh
from models.rendering.relief import Light, Relief, grid_triangles, relit, sphere_cap

SIZE, RELIEF = 24, Relief()


def disc(radius=0.6, middle=(0.0, 0.0)):
    """A mask whose contour at one half is a circle, in units of half the picture."""
    at = torch.linspace(-1, 1, SIZE)
    distance = ((at[None] - middle[0]).square() + (at[:, None] - middle[1]).square()).sqrt()
    return (0.5 + 2 * (radius - distance)).clamp(0, 1)[None, None]


def shape(value=0.2, view=(0.1, 0.2, 0.0, 0.002, 0.001, 0.0), mask=True):
    cap = sphere_cap(torch.ones(1, 1, SIZE, SIZE))
    light = torch.tensor([[0.3, 0.6, -0.4, 0.2]])
    albedo = torch.full((1, 3, SIZE, SIZE), value)
    albedo[:, 0, :, : SIZE // 2] -= 0.5
    return Shape(cap, albedo, torch.tensor([view]), light, disc() if mask else None)


def test_a_grid_is_cut_along_a_circle():
    """Its area and its length are those of the circle; every corner lies within, and triangles face one way."""
    size = 65
    at = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(at, at, indexing="ij")
    points = torch.stack([x, -y, torch.zeros_like(x)]).flatten(1).T
    level = 0.7 - points[:, :2].norm(dim=1)
    corners, faces = cut(points, grid_triangles(size, points.device), level)
    mesh = trimesh.Trimesh(corners.numpy(), faces.numpy(), process=False)
    assert mesh.area == pytest.approx(math.pi * 0.49, rel=1e-3)
    assert corners.norm(dim=1).max() <= 0.7 + 1e-3
    assert (mesh.face_normals[mesh.area_faces > 1e-9][:, 2] > 0.99).all()
    edges, count = torch.unique(torch.from_numpy(mesh.edges_sorted.copy()), dim=0, return_counts=True)
    rim = edges[count == 1]
    assert float((corners[rim[:, 0]] - corners[rim[:, 1]]).norm(dim=1).sum()) == pytest.approx(1.4 * math.pi, rel=2e-3)
    assert_close(corners[rim.flatten()].norm(dim=1), torch.full((2 * len(rim),), 0.7), atol=1e-3, rtol=0)


def test_the_largest_piece_is_kept():
    points = torch.stack(torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="xy"), -1).flatten(0, 1)
    level = torch.full((6, 6), -1.0)
    level[0, 0] = level[2:5, 2:5] = 1.0
    corners, faces = cut(points, grid_triangles(6, points.device), level.flatten())
    assert corners.min() >= 1.5 and len(faces) > 8
    nothing = cut(points, grid_triangles(6, points.device), torch.full((36,), -1.0))
    assert all(len(part) == 0 for part in nothing)


def test_a_surface_is_the_depth_map_in_the_world():
    """Its corners lie on the map: seen by the map's own camera, where the map is and as far away."""
    one = shape()
    mesh = surface(one, RELIEF)
    front = RELIEF.camera(torch.zeros(1, 6), SIZE)
    uv, depth = front.project(mesh.vertices[None])
    pixel = uv[0] * SIZE - 0.5
    grid = (2 * pixel / (SIZE - 1) - 1)[None, None]
    wanted = torch.nn.functional.grid_sample(one.depth, grid, align_corners=True)[0, 0, 0]
    assert_close(depth[0] / RELIEF.unit, wanted, atol=1.5e-3, rtol=0)  # the map is linear there, the mesh cubic
    assert mesh.vertices[:, :2].norm(dim=1).max() < 0.75  # the disc, nearer to the camera
    assert bool((mesh.normals[:, 2] > 0).all())
    assert mesh.uv is not None and float((mesh.uv - uv[0]).abs().max()) < 1e-4


@pytest.mark.parametrize("view", [(0.1, 0.3, 0.0, 0.0, 0.0, 0.0), (-0.2, -0.4, 0.1, 0.004, -0.003, 0.0)])
def test_the_cameras_of_views(view):
    """What the renderer of views sees, the rasteriser sees from the world's camera of the view."""
    one = shape(view=view, mask=False)
    wanted = one.seen(RELIEF)
    shapes = ReliefShapes.pack({"a": one}, RELIEF)
    found = shapes.synthesis(shapes.code("a"), shapes.camera("a"))
    inner = (found.alpha > 0.99) & (wanted.alpha > 0.5)
    assert inner.float().mean() > 0.6
    gap = (found.depth / RELIEF.unit - wanted.depth).abs()[inner]
    assert float(gap.median()) < 3e-4 and float(gap.quantile(0.95)) < 4e-3  # the cap has a crease, and hides a part
    assert float(((found.image - wanted.image).abs() * inner).mean()) < 0.02


def test_masks_are_of_the_side_that_is_seen():
    """A head that is turned to the left hides one side behind itself: the other one tells where both end."""
    one = shape(view=(0.0, 0.5, 0.0, 0.0, 0.0, 0.0), mask=False)
    true = disc(0.8)
    seen = RELIEF.carried(true, one.seen(RELIEF).depth, one.view)
    found = head_mask(seen, one, RELIEF)
    assert_close(found, found.flip(-1))
    wrong = ((found > 0.5) != (true > 0.5)).float().mean()
    alone = ((RELIEF.gathered(seen, one.depth, one.view) > 0.5) != (true > 0.5)).float().mean()
    assert wrong < 0.04 and wrong < alone


def test_gathered_is_the_way_back():
    one = shape(view=(0.05, 0.2, 0.0, 0.0, 0.0, 0.0))
    at = torch.linspace(-1, 1, SIZE)
    maps = torch.stack(torch.meshgrid(at, at, indexing="ij"))[None]
    there = RELIEF.carried(maps, RELIEF.turned(one.depth, one.view)[0], one.view)
    back = RELIEF.gathered(there, one.depth, one.view)
    inner = slice(6, -6)
    assert float((back - maps)[..., inner, inner].abs().mean()) < 0.02


class TestRelighting:
    def seen(self):
        shapes = ReliefShapes.pack({"a": shape()}, RELIEF)
        return shapes.synthesis(shapes.code("a"), shapes.rig.camera(torch.tensor([0.0, 0.3])))

    def test_by_its_own_light_it_is_itself(self):
        seen = self.seen()
        assert_close(relit(seen, light_of(shape().light)), seen.image)

    def test_lamberts_law(self):
        """Pixel by pixel, in float64, with the light along world axes."""
        seen, light = self.seen(), Light(torch.tensor([0.2]), torch.tensor([0.7]), torch.tensor([[0.8, 0.4]]))
        towards = torch.tensor([-0.8, 0.4, 1.0]).double()  # from the left, from above, from the front
        facing = (seen.normals.double() * (towards / towards.norm())[:, None, None]).sum(1, keepdim=True).clamp_min(0)
        wanted = ((seen.albedo.double() + 1) * (0.2 + 0.7 * facing) - 1).clamp(-1, 1)
        wanted = wanted * seen.alpha + (1 - seen.alpha)
        assert_close(relit(seen, light).double(), wanted, atol=1e-5, rtol=0)

    def test_a_moving_light_comes_around(self):
        light = moving_light(8)
        assert len(relit(self.seen()[0], light)) == 8
        assert_close(light.slope[[2, 6], 0], torch.tensor([1.2, -1.2]))
        assert_close(light.slope[0], torch.tensor([0.0, 0.6]))
        assert light_from(0.5, 0.1).slope.tolist() == [[0.5, pytest.approx(0.1)]]


class TestGenerator:
    def shapes(self):
        smile = shape(0.6)
        smile = smile.replace(depth=smile.depth - 0.01)
        heads = {"a": shape(), "a-smile-more": smile, "b": shape(-0.4)}
        return ReliefShapes.pack(heads, RELIEF, {"smile": {"a": "a-smile-more"}})

    def test_expressions_take_the_moved_heads_maps(self):
        shapes = self.shapes()
        assert shapes.expressions == ("smile",) and shapes.rows == {"smile": [1, 1, 2]}
        full, half = (shapes.shape(shapes.code("a"), torch.tensor([[s]])) for s in (1.0, 0.5))
        assert_close(full.albedo, shapes["a-smile-more"].albedo)
        assert_close(half.depth, (shapes["a"].depth + shapes["a-smile-more"].depth) / 2)
        assert_close(shapes.shape(shapes.code("b"), torch.ones(1, 1)).depth, shapes["b"].depth)

    def test_views_and_expressions(self):
        shapes = self.shapes()
        camera = shapes.rig.camera(torch.tensor([-0.4, 0.4]))
        seen = shapes.synthesis(shapes.code("a"), camera, resolution=32)
        assert seen.image.shape == (2, 3, 32, 32) and seen.albedo is not None and seen.normals is not None
        moved = shapes.synthesis(shapes.code("a"), camera, expression=torch.tensor([[0.0], [1.0]]), resolution=32)
        assert_close(moved.image[0], seen.image[0])
        assert float((moved.image[1] - seen.image[1]).abs().mean()) > 0.02
        near = shapes.rig.near < seen.depth[seen.alpha > 0.9]
        assert bool(near.all()) and bool((seen.depth[seen.alpha > 0.9] < shapes.rig.far).all())

    def test_it_travels(self, tmp_path):
        shapes = self.shapes()
        artifact.save(tmp_path, stage="shape", modules={"shapes": shapes})
        found = artifact.load(tmp_path).module("shapes")
        assert found.rows == shapes.rows and found.relightable
        for name, value in shapes.state_dict().items():
            assert_close(found.state_dict()[name], value)
        bare = ReliefShapes.pack({"a": shape(mask=False)}, RELIEF)
        assert "mask" not in bare.state_dict() and bare["a"].mask is None

    def test_what_cannot_be(self):
        shapes = self.shapes()
        with pytest.raises(ValueError, match="one of 1 rows"):
            ReliefShapes(["a"], SIZE, RELIEF, expressions={"smile": [3]})
        with pytest.raises(ValueError, match="shapes have no z"):
            shapes.mapping(torch.zeros(1, 4))
        with pytest.raises(ValueError, match="no edits"):
            shapes.synthesis(shapes.code("a"), shapes.rig.camera(0.0), edit=lambda p, f: f)
        with pytest.raises(ValueError, match="one surface at a time"):
            surface(Shape.cat([shape(), shape()]), RELIEF)


def test_meshes_to_take_along(tmp_path):
    """A glTF has the picture as its texture, at the places of its corners; a PLY the same as colours."""
    one = shape()
    mesh = painted(surface(one, RELIEF), one, RELIEF)
    for suffix in ("glb", "ply"):
        write_mesh(tmp_path / f"it.{suffix}", mesh)
    glb, ply = (trimesh.load(tmp_path / f"it.{suffix}", force="mesh", process=False) for suffix in ("glb", "ply"))
    assert len(glb.faces) == len(ply.faces) == len(mesh.faces)
    picture = glb.visual.material.baseColorTexture
    assert isinstance(picture, Image.Image) and picture.size == (4 * SIZE, 4 * SIZE)
    colours = glb.visual.to_color().vertex_colors[:, :3].astype(float)
    assert abs(colours - ply.visual.vertex_colors[:, :3]).mean() < 4
    shown = RELIEF.shaded(one.depth, one.albedo, one.lit)
    grid = (2 * mesh.uv - 1)[None, None]
    wanted = torch.nn.functional.grid_sample(shown, grid, padding_mode="border", align_corners=False)[0, :, 0].T
    assert_close(mesh.colours, wanted.clamp(-1, 1))


def test_a_camera_has_a_label():
    """Which is orthonormal; a nose that turns to the right is seen from the left."""
    camera = RELIEF.camera(torch.tensor([[0.2, -0.3, 0.1, 0.0, 0.0, 0.0]]), SIZE)
    again = Camera.from_label(camera.label())
    yaw, pitch = RELIEF.rig(SIZE).angles(again)
    assert yaw.item() == pytest.approx(-0.3, abs=0.05) and pitch.item() == pytest.approx(0.2, abs=0.08)
