"""How far the points of a face lie from where they should."""

from __future__ import annotations

from torch import Tensor

OUTER_CORNERS = (33, 263)
"""Points of the 468 at the outer corners of the eyes: what lies between is the unit of distances in a face."""


def eye_distance(points: Tensor) -> Tensor:
    """Distance between the outer corners of the eyes: (B, 468, 2 or 3) -> (B,)."""
    return (points[:, OUTER_CORNERS[0], :2] - points[:, OUTER_CORNERS[1], :2]).norm(dim=-1)


def landmark_distance(found: Tensor, wanted: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean distance of points in the picture, by the distance between the eyes (3DArtmator, Sec. 5, asks for it).

    Args:
        found, wanted: (B, 468, 2 or 3) in one unit; the third coordinate is left out.
        weights: (468,), equal ones without.

    Returns:
        (B,).
    """
    distance = (found[..., :2] - wanted[..., :2]).square().sum(-1).add(1e-12).sqrt()
    mean = distance.mean(1) if weights is None else (distance * weights).sum(1) / weights.sum()
    return mean / eye_distance(wanted)
