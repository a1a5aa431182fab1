"""What teaches E_ADA to move details, one value per picture (HFGI, Wang et al., 2022; E3DGE, Lan et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from models.augment.perspective import warp
from models.heads.pixel_aligned import Query
from models.image import resized


def residual_loss(query: Query, image: Tensor) -> Tensor:
    """L1 between the details that E_ADA predicts for other pictures and those they have (supplement B.3).

    The paper weighs it with 0.1. Gradient flows through the prediction alone.

    Args:
        query: the prediction, see :meth:`models.heads.pixel_aligned.LocalNetworks.query`.
        image: (C, 3, H, W) in [-1, 1], what its cameras really see.

    Returns:
        (C,) mean over channels and pixels.
    """
    truth = resized(image, query.coarse.shape[-1]) - query.coarse
    return (query.residual - truth.detach()).abs().flatten(1).mean(1)


def distortion_loss(
    aligner: Callable[[Tensor, Tensor], Tensor], residual: Tensor, target: Tensor, corners: Tensor
) -> Tensor:
    """L1 between details and what E_ADA makes of them once their perspective was changed: how HFGI teaches it.

    Without a weight of its own; it needs neither other views nor edits.

    Args:
        residual: Delta (B, 3, S, S). target: (B, 3, S, S) the reconstructions that these belong to, in [-1, 1].
        corners: (B, 4, 2), see :func:`models.augment.perspective.random_corners`.

    Returns:
        (B,) mean over channels and pixels.
    """
    residual = residual.detach()
    return (aligner(warp(residual, corners), target.detach()) - residual).abs().flatten(1).mean(1)
