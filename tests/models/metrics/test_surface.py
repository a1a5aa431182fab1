"""Errors of shapes: what is exact is without error, whatever the lens, the distance and the units."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from models.camera import Rig
from models.metrics.surface import SurfaceTruth, albedo_error, as_relief, surface_errors
from models.relief.shapes import Shape
from models.rendering.relief import Relief, rotation_matrix

SIZE = 48


def ball(rig, size=SIZE, radius=1.0):
    """Depth (1, 1, S, S) of a ball around the pivot and a wall behind it, mask, and normals in the camera's axes."""
    reach = 0.5 / rig.focal * (size - 1) / size
    at = torch.linspace(-reach, reach, size, dtype=torch.float64)
    y, x = torch.meshgrid(at, at, indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)])
    a, b, c = rays.square().sum(0), -2 * rig.radius * rays[2], rig.radius**2 - radius**2
    root = b.square() - 4 * a * c
    hit = root > 0
    depth = torch.where(hit, (-b - root.clamp_min(0).sqrt()) / (2 * a), rig.radius)
    points = depth * rays - rays.new_tensor([0, 0, rig.radius])[:, None, None]
    return depth[None, None].float(), hit[None, None].float(), F.normalize(points, dim=0)[None].float()


def truth(rig, scale=1.0):
    rig = replace(rig, radius=rig.radius * scale)
    depth, mask, _ = ball(rig, radius=scale)
    albedo = torch.full((1, 3, SIZE, SIZE), 0.2)
    towards = F.normalize(torch.tensor([[0.4, -0.3, -1.0]]), dim=1)
    camera = rig.camera(0.0)
    return SurfaceTruth(depth, mask, mask, albedo, towards, camera, rig.radius)


def shape(relief, given):
    depth = as_relief(relief, given.depth, given.camera, given.distance)
    light = torch.tensor([[0.4, 0.5, -0.4, 0.3]])
    return Shape(depth, torch.full((1, 3, SIZE, SIZE), -0.1), torch.zeros(1, 6), light)


@pytest.mark.parametrize("fov_deg", [10.0, 23.5])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_true_shape_is_without_error(fov_deg, scale):
    """By the papers' lens and by the world's own; in any unit of the world."""
    relief = Relief(near=0.7, far=1.3, fov_deg=fov_deg)
    given = truth(Rig(), scale)
    errors = surface_errors(relief, shape(relief, given), given)
    assert float(errors["side"]) < 1e-4 and float(errors["mad"]) < 0.1
    assert float(errors["albedo"]) < 1e-5 and float(errors["light"]) < 0.1
    assert float(errors["side_face"]) == pytest.approx(float(errors["side"]))


def test_equal_lenses_are_exact():
    """Then depth is scaled and nothing else: d = z centre / distance."""
    rig = Rig()
    given = truth(rig)
    tangent = 0.5 / rig.focal * (SIZE - 1) / SIZE
    relief = Relief(near=0.7, far=1.3, fov_deg=2 * math.degrees(math.atan(tangent)))
    torch.testing.assert_close(
        as_relief(relief, given.depth, given.camera, given.distance), given.depth * relief.centre / rig.radius
    )


def test_normals_of_another_lens_are_near_the_true_ones():
    """Where the world's lens is wider than the papers', the map's normals are those of the surface to a degree."""
    relief, rig = Relief(), Rig()
    depth, mask, normals = ball(rig)
    found = relief.normals(as_relief(relief, depth, rig.camera(0.0), rig.radius))
    inside = (F.avg_pool2d(mask, 7, 1, 3) > 0.99)[:, 0]
    angle = torch.rad2deg(torch.acos((found * normals).sum(1).clamp(-1, 1)))[inside]
    assert float(angle.mean()) < 1.5


def test_a_scaled_map_is_as_good():
    """SIDE is of the depth up to a factor, as the papers'."""
    relief = Relief(near=0.7, far=1.3)
    given = truth(Rig())
    exact = shape(relief, given)
    flat = replace(exact, depth=torch.ones_like(exact.depth))
    assert float(surface_errors(relief, flat, given)["side"]) > 0.008
    nearer = replace(exact, depth=0.95 * exact.depth)
    found = surface_errors(relief, nearer, given)
    assert float(found["side"]) < 2e-3


def test_the_light_is_told_where_the_picture_is_seen():
    """A canonical light turns with the head."""
    relief, given = Relief(near=0.7, far=1.3), truth(Rig())
    view = torch.tensor([[0.1, 0.3, 0.0, 0.0, 0.0, 0.0]])
    canonical = (rotation_matrix(view[:, :3]).mT @ given.towards[..., None])[..., 0]
    slope = canonical[:, :2] / canonical[:, 2:]
    turned = replace(shape(relief, given), view=view, light=torch.cat([torch.tensor([[0.4, 0.5]]), slope], 1))
    assert float(surface_errors(relief, turned, given)["light"]) < 0.1


def test_albedo_up_to_a_factor():
    g = torch.Generator().manual_seed(0)
    share = torch.rand(2, 3, 6, 6, generator=g) * 0.5
    mask = (torch.rand(2, 1, 6, 6, generator=g) > 0.3).float()
    assert float(albedo_error(2 * share - 1, 2 * (1.7 * share) - 1, mask).max()) < 1e-6
    other = torch.rand(2, 3, 6, 6, generator=g)
    found = albedo_error(2 * share - 1, 2 * other - 1, mask)
    for row in range(2):
        inside = mask[row, 0] > 0
        a, b = share[row][:, inside].flatten(), other[row][:, inside].flatten()
        best = min(float((k * a - b).square().mean().sqrt()) for k in torch.linspace(0, 6, 2001))
        assert float(found[row]) == pytest.approx(best, rel=1e-3)


def test_maps_are_square():
    with pytest.raises(ValueError, match="square"):
        as_relief(Relief(), torch.ones(1, 1, 4, 6), Rig().camera(0.0), 7.0)
