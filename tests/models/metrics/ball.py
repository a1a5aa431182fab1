"""A textured ball as a head whose every view is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.camera import Camera, Rig
from models.rendering.output import Rendering

RIG = Rig(pivot=(0.0, 0.0, 0.0))
RADIUS = 1.0


@dataclass(frozen=True)
class View:
    """As ``models.metrics.portrait.ViewTruth``."""

    image: Tensor
    depth: Tensor
    mask: Tensor
    normals: Tensor
    segmentation: Tensor
    camera: Camera


def look(camera: Camera, size: int = 32, stretch: float = 1.0) -> View:
    """The ball from each camera, all of it skin; ``stretch`` makes it an ellipsoid, longer along z."""
    origins, directions = camera.rays(size)
    scale = torch.tensor([1.0, 1.0, 1 / stretch])
    o, d = origins * scale, directions * scale
    a, b, c = d.square().sum(-1), (o * d).sum(-1), o.square().sum(-1) - RADIUS**2
    inside = b.square() - a * c
    hit = inside > 0
    depth = (-b - inside.clamp_min(0).sqrt()) / a
    points = origins + depth[..., None] * directions
    normals = torch.nn.functional.normalize(points * scale**2, dim=-1)
    colour = 0.5 * torch.sin(4 * points + torch.tensor([0.0, 1.0, 2.0])) + 0.1 * normals

    def maps(values: Tensor) -> Tensor:
        return (values * hit[..., None]).mT.unflatten(2, (size, size))

    mask = hit.float().reshape(-1, 1, size, size)
    image = maps(colour + 1) - 1
    return View(image, maps(depth[..., None]), mask, maps(normals), mask[:, 0].to(torch.uint8), camera)


def rendering(view: View) -> Rendering:
    """What a method that knows the truth would return."""
    return Rendering(view.image, depth=view.depth, alpha=view.mask, normals=view.normals)
