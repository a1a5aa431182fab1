"""Errors of depth and normals against the truth, one value per image.

Depth is (B, 1, H, W) along the camera's axis in world units, normals (B, 3, H, W), masks (B, 1, H, W) in [0, 1].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from models.metrics.image import masked_mean
from models.rendering.output import Rendering
from models.rendering.relief import Relief

if TYPE_CHECKING:
    from models.metrics.portrait import ViewTruth


def eroded(mask: Tensor, pixels: int = 1) -> Tensor:
    """A binary mask (> 0.5) without its border, as Unsup3D evaluates; outside the image counts as outside."""
    inverse = F.pad((mask <= 0.5).float(), (pixels,) * 4, value=1.0)
    return 1 - F.max_pool2d(inverse, 2 * pixels + 1, 1)


def at_size(
    size: tuple[int, int], depth: Tensor, mask: Tensor, normals: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Depth, mask and normals of H x W pixels, averaged to no more pixels: depth and normals over the covered share.

    Args:
        size: (height, width); equal to the maps' they come back as they are.
        depth: (B, 1, H, W). mask: (B, 1, H, W) in [0, 1]. normals: (B, 3, H, W).

    Returns:
        the same maps at ``size``; depth and normals are 0 where the mask is.
    """
    if depth.shape[-2:] != size:
        covered = F.interpolate(mask, size, mode="area")
        share = covered.clamp_min(1e-6)
        depth = F.interpolate(depth * mask, size, mode="area") / share
        if normals is not None:
            weight = F.interpolate(mask, normals.shape[-2:], mode="area")
            normals = F.normalize(F.interpolate(normals * weight, size, mode="area"), dim=1)
        mask = covered
    elif normals is not None and normals.shape[-2:] != size:
        normals = F.normalize(F.interpolate(normals, size, mode="area"), dim=1)
    return depth, mask, normals


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


def shape_errors(found: Rendering, truth: ViewTruth) -> dict[str, Tensor]:
    """Depth (world units) and normal errors (degrees) (B,) on the pixels that both show, without the silhouette.

    A generator's depth may be coarser than its pictures: the finer of the two is averaged to the coarser.
    """
    if found.depth is None or found.alpha is None:
        return {}
    size = min(found.depth.shape[-2], truth.depth.shape[-2]), min(found.depth.shape[-1], truth.depth.shape[-1])
    depth, mask, normals = at_size(size, truth.depth, truth.mask, truth.normals)
    own_normals = None if found.normals is None else found.normals.float()
    own, alpha, own_normals = at_size(size, found.depth.float(), found.alpha.float(), own_normals)
    both = eroded((mask > 0.5).float()) * (alpha > 0.5)
    values = {"depth_mae": depth_mae(own, depth, both)}
    if own_normals is not None and normals is not None:
        values["normal_error"] = normal_error(own_normals, normals, both)
    return values


def relief_errors(relief: Relief, depth: Tensor, mask: Tensor, truth: Tensor, truth_mask: Tensor) -> dict[str, Tensor]:
    """SIDE and MAD (B,) of depth maps in the view of the input picture, as Unsup3D's code measures them.

    Both are told on the pixels where both masks hold, each without its border. The normals are those of the depth maps,
    the truth's too. The papers print 100 times SIDE, and means over pictures.

    Args:
        relief: how the depth maps are seen.
        depth, mask: (B, 1, S, S) in the input's view, as :meth:`models.rendering.relief.Relief.turned` gives them.
        truth, truth_mask: (B, 1, S, S) the same of the truth, in the units of ``relief``.

    Returns:
        ``side``, in logarithms of depth, and ``mad``, in degrees; NaN where the masks share no pixel.

    Raises:
        ValueError: for maps of different shapes.
    """
    shapes = {tuple(each.shape) for each in (depth, mask, truth, truth_mask)}
    if len(shapes) > 1:
        raise ValueError(f"depth maps and masks differ in shape: {', '.join(map(str, sorted(shapes)))}")
    both = eroded(mask) * eroded(truth_mask)
    return {
        "side": depth_scale_invariant(depth, truth, both),
        "mad": normal_error(relief.normals(depth), relief.normals(truth), both),
    }
