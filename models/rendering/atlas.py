"""The atlas: every surface manifold, flattened to a regular grid.

What is computed on the grid lies on world-space surfaces, so that it looks the same from everywhere: detail features
are enlarged there (GRAMInverter; Deng et al., 2023, Sec. 3.3) and finished radiance is kept there (Sec. 4.1).

Coordinates are those of ``grid_sample(align_corners=False)``: texel i of n has its centre at (2 i + 1) / n - 1.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.configurable import Configurable
from models.rendering.manifolds import first_crossings

RAYS = 2**14  # searched together: bounds memory


class Chart(Configurable):
    """Two coordinates of points in space, and the lines on which they are constant.

    Attributes:
        closed: whether it goes around a head, so that its left and its right end meet and all of its top is one place.
    """

    closed: bool = False

    @abstractmethod
    def forward(self, points: Tensor) -> Tensor:
        """World points (..., 3) -> (u, v) (..., 2) in [-1, 1], clamped where the chart ends."""

    @abstractmethod
    def segments(self, uv: Tensor, extent: float) -> tuple[Tensor, Tensor]:
        """Outer and inner ends (..., 3) of the lines of chart coordinates (..., 2).

        Args:
            extent: half side of the cube that the lines must cross, world units.
        """


@dataclass(frozen=True)
class Atlas:
    """Points of a regular grid on each of N manifolds, from the outermost to the innermost.

    Attributes:
        points: (N, H, W, 3) world points; the chart's inner end where the manifold is not met.
        valid: (N, H, W) whether it is met.
    """

    points: Tensor
    valid: Tensor


def texel_centres(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Coordinates (height, width, 2) of a grid's texels: u along the rows, v down the columns."""
    u, v = ((2 * torch.arange(n, device=device) + 1) / n - 1 for n in (width, height))
    return torch.stack(torch.meshgrid(u, v, indexing="xy"), -1)


@torch.no_grad()
def flatten(
    scalar: Callable[[Tensor], Tensor], levels: Tensor, chart: Chart, size: int, *, extent: float, samples: int = 192
) -> Atlas:
    """Follow the chart's lines inwards to their first crossing of each level set.

    A level set that a line crosses several times, under a chin for instance, is only met where it is outermost.

    Args:
        scalar: world points (..., 3) -> (...), larger outside.
        levels: (N,), decreasing.
        size: H and W of the grid.
        extent: half side of the cube in which the levels live, world units.
        samples: along a line, in the search.
    """
    outer, inner = chart.segments(texel_centres(size, size, levels.device).flatten(0, 1), extent)
    found = [
        first_crossings(scalar, start[None], way[None], levels, near=0.0, far=1.0, samples=samples)
        for start, way in zip(outer.split(RAYS), (inner - outer).split(RAYS), strict=True)
    ]
    along, valid = (torch.cat(parts, 1)[0].T for parts in zip(*found, strict=True))  # (N, H * W)
    points = torch.lerp(outer, inner, along[..., None])
    return Atlas(points.unflatten(1, (size, size)), valid.unflatten(1, (size, size)))
