"""Which pixels of one view another view shows as well."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.camera import Camera


def seen_from(
    camera: Camera,
    depth: Tensor,
    mask: Tensor,
    other: Camera,
    other_depth: Tensor,
    other_mask: Tensor,
    tolerance: float = 0.06,
) -> Tensor:
    """Pixels of ``camera`` whose surface point ``other`` sees, by comparing depths.

    Args:
        camera: (B,) of the asked pixels.
        depth, mask: (B, 1, H, W), camera-z in world units where the mask is above 0.5.
        other: (B,) cameras, or one for all.
        other_depth, other_mask: (B, 1, H, W) seen by ``other``, or one for all.
        tolerance: a point counts as hidden when it lies this much behind what ``other`` sees, world units. The
            default is about two pixels of a 64 px portrait: less would hide every grazing surface.

    Returns:
        (B, 1, H, W) bool; background is False.
    """
    batch, size = len(camera), depth.shape[-2:]
    if len(other) == 1:
        other = other.repeat_interleave(batch)
    other_depth, other_mask = other_depth.expand(batch, -1, -1, -1), other_mask.expand(batch, -1, -1, -1)
    origins, directions = camera.rays(*size)
    points = origins + depth.flatten(2).mT * directions
    uv, distance = other.project(points)
    grid = (2 * uv - 1)[:, :, None]
    # The farthest of the four neighbours: at the border of a nearer part the point still counts as seen.
    pool = F.max_pool2d(torch.where(other_mask > 0.5, other_depth, torch.zeros_like(other_depth)), 3, 1, 1)
    met = F.grid_sample(pool, grid, mode="nearest", padding_mode="zeros", align_corners=False)[:, 0, :, 0]
    seen = (distance < met + tolerance) & (uv > 0).all(-1) & (uv < 1).all(-1)
    return seen.reshape(batch, 1, *size) & (mask > 0.5)
