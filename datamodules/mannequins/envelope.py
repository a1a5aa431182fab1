"""Where the surfaces of all heads lie: the field whose level sets are the manifolds of the embedded prior."""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.mannequins.scene import SPLITS, Scene, subject_z
from datamodules.mannequins.shapes import distance, named


def envelope_field(
    points: int = 120_000,
    heads: int = 96,
    *,
    share: tuple[float, float] = (1 / 3, 1 / 12),
    margin: tuple[float, float] = (0.06, 0.07),
    extent: float = 1.7,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """A scalar that grows from 0 on an envelope inside the surfaces of nearly all heads to 1 on one outside them.

    Level sets at equal steps lie close together where heads agree, on the face, and far apart where hair may be or
    not be. Level sets of the mean distance would thin out there: a ray beside the jaw would meet none of them.

    Args:
        points: samples of the cube; nine in ten of those far from both envelopes are dropped.
        heads: training heads.
        share: of the heads, those with least there (inner envelope) and those with most there (outer envelope),
            whose distances are averaged.
        margin: world units added inside and outside.
        extent: half side of the cube, world units.

    Returns:
        points (P, 3) and values (P,) in [-0.5, 1.5].
    """
    generator = torch.Generator().manual_seed(seed)
    where = (torch.rand(points, 3, generator=generator) * 2 - 1) * extent
    parameters = Scene.from_z(subject_z(SPLITS["train"][:heads])).parameters()
    found = torch.stack([distance(named(head.tolist()), where.T).clamp(-0.5, 1.2) for head in parameters])
    found = found.sort(0, descending=True).values
    inner = found[: max(1, round(heads * share[0]))].mean(0) + margin[0]
    outer = found[-max(1, round(heads * share[1])) :].mean(0) - margin[1]
    values = (inner / (inner - outer).clamp_min(0.02)).clamp(-0.5, 1.5)
    keep = ((values > -0.45) & (values < 1.45)) | (torch.rand(points, generator=generator) < 0.1)
    return where[keep], values[keep]
