"""Losses between images, one value per image."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def pixel_mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error over all channels and pixels: (B, C, H, W) twice -> (B,)."""
    return (a - b).square().flatten(1).mean(1)


def total_variation(image: Tensor) -> Tensor:
    """Mean absolute difference of vertical plus of horizontal neighbours: (B, C, H, W) -> (B,)."""
    return image.diff(dim=2).abs().flatten(1).mean(1) + image.diff(dim=3).abs().flatten(1).mean(1)


def smoothness_loss(maps: Tensor) -> Tensor:
    """Mean absolute second differences along x, along y and twice across, summed: (B, C, H, W) -> (B,).

    L_smooth of a depth map in Wang et al., Eq. 18 (Zhou et al. 2017); GAN2Shape takes it of the diffuse shading too.
    """
    dx, dy = maps.diff(dim=3), maps.diff(dim=2)
    second = (dx.diff(dim=3), dx.diff(dim=2), dy.diff(dim=3), dy.diff(dim=2))
    along, across, across_again, down = (each.abs().flatten(1).mean(1) for each in second)
    return along + across + across_again + down


def locality_codes(pivot: Tensor, sample: Tensor, distance: float = 30.0) -> Tensor:
    """Codes at a fixed distance from a pivot towards random samples (PTI, Roich et al. 2021, Eq. 4).

    Args:
        pivot: (n, w) or (B, n, w), the inverted code.
        sample: (B, n, w), random codes.
        distance: Euclidean, over all of a code's numbers.

    Returns:
        (B, n, w).
    """
    towards = sample - pivot
    length = towards.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, *[1] * (towards.ndim - 1))
    return pivot + distance * towards / length


def locality_loss(tuned: Tensor, original: Tensor, perceptual: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """L_R = LPIPS(x, x') + |x - x'|^2 of a tuned generator and the original one at :func:`locality_codes`: (B,).

    PTI (Roich et al. 2021), Eq. 5, whose weight lambda_R, .1 in its code, is the caller's.
    """
    original = original.detach()
    return perceptual(tuned, original) + pixel_mse(tuned, original)
