"""Pictures of shapes: a sheet by which they are judged, and frames that turn them or move their light."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.relief.shapes import Shape
from models.rendering.mesh import Mesh
from models.rendering.relief import BORDER, Relief, grid_triangles, shading
from models.rendering.sheets import depth_colours

GREY = 0.5  # albedo of what shows a shape without its colours
YAWS = (-30.0, -15.0, 15.0, 30.0)  # degrees
SLOPES = ((-1.0, 0.3), (0.0, 0.9), (1.0, 0.3))  # of the sheet's lights: from the right, from above, from the left
AMBIENT, DIFFUSE = 0.35, 0.65  # of lights that are set


def turned(shape: Shape, relief: Relief, yaw_deg: float, pitch_deg: float = 0.0) -> Tensor:
    """(B, 3, S, S) as seen after turns of the canonical heads, white where nothing is."""
    view = torch.zeros_like(shape.view)
    view[:, 0], view[:, 1] = math.radians(pitch_deg), math.radians(yaw_deg)
    found = shape.seen(relief, view)
    assert found.alpha is not None
    return found.image * found.alpha + (1 - found.alpha)


def relit(shape: Shape, relief: Relief, dx: float, dy: float) -> Tensor:
    """(B, 3, S, S) as seen in the picture, lit from elsewhere, see :class:`models.rendering.relief.Light`."""
    light = shape.light.new_tensor([AMBIENT, DIFFUSE, dx, dy]).expand_as(shape.light)
    return shape.seen(relief, light=light).image


def maps(shape: Shape, relief: Relief) -> dict[str, Tensor]:
    """What was found, as pictures (B, 3, S, S) by name: depth, normals, albedo, shading."""
    normals = relief.normals(shape.depth)
    light = shape.light.new_tensor([0.0, 1.0, 0.0, 0.0]).expand_as(shape.light)
    grey = Shape(shape.depth, torch.zeros_like(shape.albedo), shape.view, light)
    return {
        "depth": depth_colours(shape.depth, torch.ones_like(shape.depth)),
        "normals": normals * normals.new_tensor([1.0, -1.0, -1.0])[:, None, None],  # up is green, towards us blue
        "albedo": shape.albedo,
        "shading": (2 * GREY * shading(normals, grey.lit) - 1).expand(-1, 3, -1, -1).clamp(-1, 1),
    }


def rows_of(image: Tensor, shape: Shape, relief: Relief, names: list[str]) -> list[list[tuple[str, Tensor | None]]]:
    """For each head a row of captioned pictures: the picture, what was found of it, turned and lit from elsewhere.

    Args:
        image: (B, 3, S, S) that they were found in.
        names: captions of these.
    """
    columns = {"found": shape.seen(relief).image, **maps(shape, relief)}
    columns |= {f"turned {yaw:+.0f}°": turned(shape, relief, yaw) for yaw in YAWS}
    columns |= {f"light {dx:+.0f}, {dy:+.1f}": relit(shape, relief, dx, dy) for dx, dy in SLOPES}
    return [
        [(name, image[row].cpu()), *((title, found[row].float().cpu()) for title, found in columns.items())]
        for row, name in enumerate(names)
    ]


def surface_mesh(shape: Shape, relief: Relief) -> Mesh:
    """The surface of one head as a mesh, a vertex for each pixel within the border, in the light of its picture.

    Axes are the world's (:mod:`models.camera`): x right, y up, the face looks along +z; the picture is 2 wide.
    """
    inner = slice(BORDER, -BORDER)
    points = (relief.points(shape.depth)[0] - shape.depth.new_tensor([0, 0, relief.centre])[:, None, None]).cpu()
    points = points * points.new_tensor([1, -1, -1])[:, None, None] / (relief.reach * relief.centre)
    colours = relief.shaded(shape.depth, shape.albedo, shape.lit)[0].clamp(-1, 1).cpu()
    size = points.shape[-1] - 2 * BORDER
    vertices, own = (maps[:, inner, inner].flatten(1).T.contiguous() for maps in (points, colours))
    return Mesh.of(vertices, grid_triangles(size, vertices.device), own)
