"""The average head, as samples of its signed distance."""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.mannequins.scene import SPLITS, Scene, subject_z
from datamodules.mannequins.shapes import distance, named


def mean_shape(points: int = 60_000, heads: int = 64, extent: float = 1.7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random points of a cube, and the mean over training heads of their clamped signed distance.

    The mean spreads where heads differ: its level sets are close together on the face and far apart in the hair.

    Returns:
        points (P, 3) and distances (P,), world units, negative inside.
    """
    generator = torch.Generator().manual_seed(seed)
    where = (torch.rand(points, 3, generator=generator) * 2 - 1) * extent
    parameters = Scene.from_z(subject_z(SPLITS["train"][:heads])).parameters()
    total = torch.zeros(points)
    for head in parameters:
        total += distance(named(head.tolist()), where.T).clamp(-0.4, 1.0)
    return where, total / heads
