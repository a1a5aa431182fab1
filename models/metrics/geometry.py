"""Errors of depth and normals against the truth, one value per image.

Depth is (B, 1, H, W) along the camera's axis in world units, normals (B, 3, H, W), masks (B, 1, H, W) in [0, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.metrics.image import masked_mean


def eroded(mask: Tensor, pixels: int = 1) -> Tensor:
    """A binary mask (> 0.5) without its border, as Unsup3D evaluates; outside the image counts as outside."""
    inverse = F.pad((mask <= 0.5).float(), (pixels,) * 4, value=1.0)
    return 1 - F.max_pool2d(inverse, 2 * pixels + 1, 1)


def depth_mae(depth: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error in world units: (B,)."""
    return masked_mean((depth - truth).abs(), mask)


def depth_rmse(depth: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Root of the mean squared error in world units: (B,)."""
    return masked_mean((depth - truth).square(), mask).sqrt()


def depth_scale_invariant(depth: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Scale-invariant depth error SIDE (Eigen et al. 2014; as in Unsup3D): (B,).

    The deviation of log depth - log truth within the mask.
    """
    inside = mask > 0
    one = torch.ones_like(depth)
    residual = torch.where(inside, depth.clamp(min=1e-6), one).log() - torch.where(inside, truth, one).log()
    mean = masked_mean(residual, mask).view(-1, 1, 1, 1)
    return masked_mean((residual - mean).square(), mask).sqrt()


def normal_error(normals: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Mean angle between normals in degrees, MAD: (B,). Neither side needs unit length."""
    a, b = F.normalize(normals.double(), dim=1), F.normalize(truth.double(), dim=1)
    angle = torch.atan2(torch.linalg.cross(a, b, dim=1).norm(dim=1), (a * b).sum(1)).rad2deg()
    return masked_mean(angle[:, None], mask).to(normals.dtype)
