"""Random changes of perspective, one for each picture."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

# The corners of a picture in [-1, 1], from the upper left one clockwise, and the way inwards from each.
_CORNERS = ((-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0))


def random_corners(count: int, generator: Generator, scale: float = 0.15, probability: float = 0.8) -> Tensor:
    """Where the corners of each picture move to: inwards, by up to ``scale`` of half its side.

    Every picture draws for itself, as many numbers whether it is moved or not. Drawn on the CPU.

    Args:
        count: B, pictures. generator: of all draws, on the CPU.
        scale: largest move, in [0, 1]. probability: of a move; other pictures keep their corners.

    Returns:
        (B, 4, 2) columns and rows in [-1, 1], from the upper left corner clockwise.

    Raises:
        ValueError: for a scale or probability out of range.
    """
    if not 0 <= scale <= 1 or not 0 <= probability <= 1:
        raise ValueError(f"scale and probability must be in [0, 1], got {scale} and {probability}")
    draws = torch.rand(count, 9, generator=generator)
    moved = draws[:, 8:, None] < probability
    corners = torch.tensor(_CORNERS)
    return corners - corners * scale * draws[:, :8].unflatten(1, (4, 2)) * moved


def warp(image: Tensor, corners: Tensor) -> Tensor:
    """Pictures (B, C, H, W) drawn with their corners at ``corners`` (B, 4, 2), 0 around; differentiable.

    Pictures whose corners stay are returned to the bit.
    """
    target = torch.tensor(_CORNERS, dtype=torch.float64, device=corners.device)
    given = corners.to(target)
    # From a place (x, y) of the result to (u, v) of the picture: u = (a x + b y + c) / (g x + h y + 1), and v likewise.
    place = torch.cat([given, torch.ones_like(given[..., :1])], -1)
    none, goal = torch.zeros_like(place), target.expand_as(given)
    columns = torch.cat([place, none, -goal[..., :1] * given], -1)
    rows = torch.cat([none, place, -goal[..., 1:] * given], -1)
    solved = torch.linalg.solve(torch.cat([columns, rows], 1), goal.mT.flatten(1))
    homography = F.pad(solved, (0, 1), value=1.0).unflatten(1, (3, 3))
    stays = (given == target).all(-1).all(-1)[:, None, None, None].to(image.device)
    with torch.autocast(image.device.type, enabled=False):
        wide = image.to(torch.promote_types(image.dtype, torch.float32))
        v, u = torch.meshgrid(_centres(image.shape[-2], wide), _centres(image.shape[-1], wide), indexing="ij")
        seen = torch.stack([u, v, torch.ones_like(u)], -1).flatten(0, 1) @ homography.to(wide).mT
        grid = (seen[..., :2] / seen[..., 2:]).unflatten(1, image.shape[-2:])
        warped = F.grid_sample(wide, grid, align_corners=False)
    return torch.where(stays, image, warped.to(image.dtype))


def random_perspective(image: Tensor, generator: Generator, scale: float = 0.15, probability: float = 0.8) -> Tensor:
    """Pictures (B, C, H, W), each in a random perspective of its own: what ADA learns to undo (HFGI).

    See :func:`random_corners` for the rest.
    """
    return warp(image, random_corners(len(image), generator, scale, probability))


def _centres(count: int, like: Tensor) -> Tensor:
    return (torch.arange(count, dtype=like.dtype, device=like.device) * 2 + 1) / count - 1
