"""Turned squares cut out of pictures: the one resampling that finder, mesh and crops share.

Pixel coordinates are continuous: x to the right, y down, (0, 0) the picture's corner, a pixel's centre at .5.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Padding = Literal["black"]


def cut(image: Tensor, centre: Tensor, side: float, angle: float, size: int, padding: Padding = "black") -> Tensor:
    """One turned square of a picture, antialiased; differentiable with respect to the picture.

    Only what the square covers is read, and shrunk before it is turned: a small face of a very large picture costs
    little.

    Args:
        image: (B, C, H, W) in [-1, 1].
        centre: (2,) x and y of the square's centre, pixels.
        side: the square's side, pixels.
        angle: of the square's x axis, radians, clockwise as the picture is seen.
        size: the result's side, pixels.
        padding: what lies beyond the picture: "black" is -1.

    Returns:
        (B, C, size, size).
    """
    height, width = image.shape[-2:]
    x, y = (float(value) for value in centre)
    cos, sin = math.cos(angle), math.sin(angle)
    reach = side / 2 * (abs(cos) + abs(sin)) + 2 * max(1.0, side / size)  # and what antialiasing looks at
    left, right = (min(max(round(edge), 0), width) for edge in (x - reach, x + reach))
    top, bottom = (min(max(round(edge), 0), height) for edge in (y - reach, y + reach))
    if left >= right or top >= bottom:
        return image.new_full((*image.shape[:2], size, size), -1.0)
    part = image[..., top:bottom, left:right]
    shape = [max(1, round(n * min(1.0, size / side))) for n in part.shape[-2:]]
    if shape != list(part.shape[-2:]):
        part = F.interpolate(part, shape, mode="bilinear", align_corners=False, antialias=True)
    steps = (torch.arange(size, device=image.device, dtype=torch.float64) + 0.5) / size - 0.5
    v, u = torch.meshgrid(steps * side, steps * side, indexing="ij")
    columns = (x - left + cos * u - sin * v) / (right - left)
    rows = (y - top + sin * u + cos * v) / (bottom - top)
    grid = (2 * torch.stack([columns, rows], -1) - 1).to(part.dtype)[None].expand(len(part), -1, -1, -1)
    # Outside is 0 to grid_sample: black is made 0.
    return F.grid_sample(part + 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) - 1
