"""How far a rendering is from a picture whose depth, opacity and parts may be known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.batches import PortraitBatch
from models.checks import check_not_negative
from models.image import resized
from models.rendering.output import Rendering
from models.segments import is_feature


@dataclass(frozen=True)
class RenderingLoss:
    """L1 + squared error, weighted up on features; image gradients; opacity and depth against the truth.

    Attributes:
        weight: of the whole, for the caller; 0 means that nothing is reconstructed.
        mask_weight, depth_weight, edge_weight: of the opacity, the depth and image gradients.
        raw_weight: of the picture before super-resolution, where there is one.
        feature_weight: how much more a pixel of an eye, a brow or the mouth counts.
    """

    weight: float = 1.0
    mask_weight: float = 1.0
    depth_weight: float = 0.2
    edge_weight: float = 0.5
    raw_weight: float = 1.0
    feature_weight: float = 4.0

    def __post_init__(self) -> None:
        check_not_negative(
            self,
            *("weight", "mask_weight", "depth_weight", "edge_weight", "raw_weight", "feature_weight"),
            where="reconstruction.",
        )

    def __call__(self, fake: Rendering, batch: PortraitBatch) -> dict[str, Tensor]:
        """The terms, and their weighted sum as ``reconstruction``; scalars.

        Args:
            fake: of B * V pictures.
            batch: of which ``image`` and, where they are there, ``segmentation``, ``mask`` and ``depth`` are used.
        """
        real = batch["image"].flatten(0, 1)
        error = fake.image - real
        weight = torch.ones_like(real[:, :1])
        if "segmentation" in batch:
            segments = batch["segmentation"].flatten(0, 1).reshape(weight.shape)
            weight = weight + self.feature_weight * F.max_pool2d(is_feature(segments).to(weight.dtype), 3, 1, 1)
        losses = {
            "image": (error.abs() * weight).mean() + 2 * (error.square() * weight).mean(),
            # The gradient of the error is the error of the gradients.
            "edge": error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean(),
        }
        total = losses["image"] + self.edge_weight * losses["edge"]
        if fake.raw is not None:
            error = fake.raw - resized(real, fake.raw.shape[-1])
            losses["raw"] = error.abs().mean() + 2 * error.square().mean()
            total = total + self.raw_weight * losses["raw"]
        if "mask" in batch and fake.alpha is not None:
            # Maps have the side of the rendering before super-resolution: each pixel the mean of those that it covers.
            side = fake.alpha.shape[-1]
            mask = F.adaptive_avg_pool2d(batch["mask"].flatten(0, 1), side)
            losses["mask"] = F.mse_loss(fake.alpha, mask)
            total = total + self.mask_weight * losses["mask"]
            if "depth" in batch and fake.depth is not None:
                solid = (mask > 0.99).to(mask.dtype)
                error = (fake.depth - F.adaptive_avg_pool2d(batch["depth"].flatten(0, 1), side)).square()
                if fake.spread is not None:  # sum_i w_i (z_i - z)^2: fog around the right depth is wrong too
                    error = error + fake.spread
                losses["depth"] = ((error + 1e-6).sqrt() * solid).mean()
                total = total + self.depth_weight * losses["depth"]
        return losses | {"reconstruction": total}
