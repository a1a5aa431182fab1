"""Pictures of shapes: a sheet by which they are judged, and frames that turn them or move their light."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.relief.shape import Shape
from models.rendering.relief import Light, Relief, shading
from models.rendering.sheets import depth_colours

GREY = 0.5  # albedo of what shows a shape without its colours
YAWS = (-30.0, -15.0, 15.0, 30.0)  # degrees
SLOPES = ((-1.0, 0.3), (0.0, 0.9), (1.0, 0.3))  # of the sheet's lights: from the right, from above, from the left
AMBIENT, DIFFUSE = 0.35, 0.65  # of lights that are set
REACH, HEIGHT = 1.2, 0.3  # slopes of a moving light: to either side, and around this above


def turned(shape: Shape, relief: Relief, yaw_deg: float, pitch_deg: float = 0.0) -> Tensor:
    """(B, 3, S, S) as seen after turns of the canonical heads, white where nothing is."""
    view = torch.zeros_like(shape.view)
    view[:, 0], view[:, 1] = math.radians(pitch_deg), math.radians(yaw_deg)
    found = shape.seen(relief, view)
    assert found.alpha is not None
    return found.image * found.alpha + (1 - found.alpha)


def lit_from(shape: Shape, relief: Relief, dx: float, dy: float) -> Tensor:
    """(B, 3, S, S) as seen in the picture, lit from elsewhere, see :class:`models.rendering.relief.Light`."""
    light = shape.light.new_tensor([AMBIENT, DIFFUSE, dx, dy]).expand_as(shape.light)
    return shape.seen(relief, light=light).image


def moving_light(frames: int) -> Light:
    """A light that goes once around, from one side over the top to the other and back below, a closed loop."""
    phase = torch.arange(frames) * (2 * math.pi / frames)
    return light_from(REACH * phase.sin(), HEIGHT * (1 + phase.cos()))


def light_from(dx: Tensor | float, dy: Tensor | float) -> Light:
    """Lights that are set, from slopes (B,) or one: from the left where dx > 0, from above where dy > 0."""
    slope = torch.stack([torch.as_tensor(s, dtype=torch.float32).reshape(-1) for s in (dx, dy)], 1)
    share = torch.ones(len(slope))
    return Light(AMBIENT * share, DIFFUSE * share, slope)


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
    columns |= {f"light {dx:+.0f}, {dy:+.1f}": lit_from(shape, relief, dx, dy) for dx, dy in SLOPES}
    return [
        [(name, image[row].cpu()), *((title, found[row].float().cpu()) for title, found in columns.items())]
        for row, name in enumerate(names)
    ]
