"""The shape of heads: depth, albedo, view and light."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.rendering.output import Rendering, Tensors
from models.rendering.relief import Light, Relief, rotation_matrix

NEAR = 9  # pixels: two sides are compared by what is around


@dataclass(frozen=True)
class Shape(Tensors):
    """B heads, canonical, as :class:`models.rendering.relief.Relief` sees them."""

    depth: Tensor
    """(B, 1, S, S)."""
    albedo: Tensor
    """(B, 3, S, S) in [-1, 1]."""
    view: Tensor
    """(B, 6) of the picture that they were found in."""
    light: Tensor
    """(B, 4) of that picture: ambient, diffuse, dx, dy, as of :class:`models.rendering.relief.Light`."""
    mask: Tensor | None = None
    """(B, 1, S, S) how surely the head is there, and not what is behind it, in [0, 1]; None: everywhere."""

    @property
    def lit(self) -> Light:
        """The light, by name."""
        return light_of(self.light)

    def seen(self, relief: Relief, view: Tensor | None = None, light: Tensor | None = None) -> Rendering:
        """As in the picture, or from other views (B, 6), under other lights (B, 4)."""
        lit = self.lit if light is None else light_of(light)
        return relief(self.depth, self.albedo, self.view if view is None else view, lit)


def light_of(numbers: Tensor) -> Light:
    """A light of its numbers (B, 4): ambient, diffuse, dx, dy."""
    return Light(numbers[:, 0], numbers[:, 1], numbers[:, 2:])


def head_mask(head: Tensor, shape: Shape, relief: Relief) -> Tensor:
    """Where canonical maps show the head: told by the picture, of whose two sides it is the one that is seen better.

    Args:
        head: (B, 1, S, S) how surely the picture shows the head.

    Returns:
        (B, 1, S, S).
    """
    found, facing = relief.gathered(head, shape.depth, shape.view), _facing(shape, relief)
    return torch.where(facing >= facing.flip(-1), found, found.flip(-1))


def _facing(shape: Shape, relief: Relief) -> Tensor:
    """How squarely (B, 1, S, S), from -1 to 1, canonical surfaces are seen from where their pictures are."""
    to_camera = rotation_matrix(shape.view[:, :3])[:, 2]  # its z axis, which leads away from it
    facing = -(relief.normals(shape.depth) * to_camera[..., None, None]).sum(1, keepdim=True)
    return F.avg_pool2d(facing, NEAR, 1, NEAR // 2, count_include_pad=False)
