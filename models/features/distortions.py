"""Image changes with which the embedded feature networks are trained and measured.

All take and give RGB (B, 3, H, W) in [-1, 1] and draw from an explicit ``torch.Generator`` (on the CPU).
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

DISTORTIONS = ("blur", "noise", "shift", "colour", "warp", "occlusion")
_LUMA = (0.299, 0.587, 0.114)


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: Generator, like: Tensor) -> Tensor:
    return (torch.rand(shape, generator=generator) * (high - low) + low).to(like)


def _chance(shape: tuple[int, ...], probability: float, generator: Generator, like: Tensor) -> Tensor:
    return (torch.rand(shape, generator=generator) < probability).to(like)


def gaussian_blur(image: Tensor, sigma: Tensor, radius: int = 5) -> Tensor:
    """Blur each image with its own ``sigma`` (B,) in pixels; kernel cut at ``radius``, borders replicated."""
    offset = torch.arange(-radius, radius + 1, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (offset / sigma.clamp(min=1e-3)[:, None]).square())
    kernel = kernel / kernel.sum(1, keepdim=True)
    b, c, h, w = image.shape
    flat = F.pad(image.reshape(1, b * c, h, w), (radius,) * 4, mode="replicate")
    rows = kernel.repeat_interleave(c, 0)
    flat = F.conv2d(flat, rows[:, None, None, :], groups=b * c)
    return F.conv2d(flat, rows[:, None, :, None], groups=b * c).reshape(b, c, h, w)


def photometric(image: Tensor, generator: Generator, group: int = 1, strength: float = 1.0) -> Tensor:
    """Change colours and finish at random: mixed channels, contrast, gamma, grey, posterised, outlined, blurred, noisy.

    Args:
        image: (B, 3, H, W).
        generator: source of the draws.
        group: consecutive images that share one draw; B must be a multiple of it.
        strength: 0 leaves the images alone.
    """
    b = len(image)
    if b % group:
        raise ValueError(f"{b} images do not form groups of {group}")
    n, one = b // group, (b // group, 1, 1, 1)

    def spread(value: Tensor) -> Tensor:
        return value.repeat_interleave(group, 0)

    def pick(probability: float) -> Tensor:
        return spread(_chance(one, probability, generator, image))

    x = (image + 1) / 2
    mix = torch.eye(3).to(image) + 0.18 * strength * torch.randn(n, 3, 3, generator=generator).to(image)
    offset = 0.10 * strength * torch.randn(n, 3, 1, 1, generator=generator).to(image)
    coloured = torch.einsum("bij,bjhw->bihw", spread(mix), x) + spread(offset)
    x = x + pick(0.8) * (coloured - x)
    contrast = spread(_uniform(one, 1 - 0.35 * strength, 1 + 0.35 * strength, generator, image))
    x = ((x - 0.5) * contrast + 0.5).clamp(1e-3, 1)
    x = x ** spread(torch.exp(_uniform(one, -0.35 * strength, 0.35 * strength, generator, image)))
    grey = (x * torch.tensor(_LUMA).to(x).view(1, 3, 1, 1)).sum(1, keepdim=True)
    tint = spread(_uniform((n, 3, 1, 1), 0.8, 1.1, generator, image))
    x = x + pick(0.12 * strength) * (grey * tint - x)
    levels = spread(_uniform(one, 2.5, 5.0, generator, image))
    x = x + pick(0.12 * strength) * ((x * levels).round() / levels - x)
    edge = (F.max_pool2d(grey, 3, 1, 1) + F.max_pool2d(-grey, 3, 1, 1) - 0.12).clamp(0, 0.4) / 0.4
    x = x * (1 - pick(0.12 * strength) * 0.9 * edge)
    sigma = spread(_uniform((n,), 0.3, 0.3 + 0.9 * strength, generator, image))
    x = x + pick(0.2 * strength) * (gaussian_blur(x, sigma, 3) - x)
    noise = torch.randn(image.shape, generator=generator).to(image)
    x = x + pick(0.3 * strength) * spread(_uniform(one, 0.0, 0.08, generator, image)) * noise
    return x.clamp(0, 1) * 2 - 1


def affine_grid(count: int, size: int, generator: Generator, strength: float = 1.0) -> Tensor:
    """Random crop, zoom and small rotation as a sampling grid (count, size, size, 2)."""
    zoom = torch.exp((torch.rand(count, generator=generator) * 2 - 1) * 0.16 * strength)
    angle = (torch.rand(count, generator=generator) * 2 - 1) * 0.12 * strength
    move = (torch.rand(count, 2, generator=generator) * 2 - 1) * 0.12 * strength
    row_x = torch.stack([zoom * angle.cos(), -zoom * angle.sin(), move[:, 0]], 1)
    row_y = torch.stack([zoom * angle.sin(), zoom * angle.cos(), move[:, 1]], 1)
    return F.affine_grid(torch.stack([row_x, row_y], 1), [count, 1, size, size], align_corners=False)


def _smooth_field(image: Tensor, cells: int, generator: Generator) -> Tensor:
    coarse = torch.randn(len(image), 2, cells, cells, generator=generator).to(image)
    return F.interpolate(coarse, image.shape[-2:], mode="bicubic", align_corners=False)


def distort(image: Tensor, kind: str, strength: Tensor, generator: Generator) -> Tensor:
    """One kind of damage at a strength per image.

    The strengths of different kinds are set so that 0.5 is a clearly visible damage in all of them but ``shift``,
    which at 1 moves the image by a twentieth of its side and is meant to cost little.

    Args:
        image: (B, 3, H, W).
        kind: one of ``DISTORTIONS``.
        strength: (B,) in [0, 1].
        generator: draws noise, directions and places; equal draws at two strengths give the same damage, stronger.

    Raises:
        ValueError: for an unknown kind.
    """
    b, _, h, w = image.shape
    s = strength.to(image).view(b, 1, 1, 1)
    if kind == "blur":
        return gaussian_blur(image, strength.to(image) * 0.045 * h, max(2, math.ceil(0.1 * h)))
    if kind == "noise":
        return (image + 0.5 * s * torch.randn(image.shape, generator=generator).to(image)).clamp(-1, 1)
    if kind == "colour":
        direction = torch.randn(b, 3, 1, 1, generator=generator).to(image)
        return (image + 0.8 * s * direction / direction.norm(dim=1, keepdim=True)).clamp(-1, 1)
    if kind == "occlusion":
        side, colour = 0.12 + 0.4 * s, _uniform((b, 3, 1, 1), -1, 1, generator, image)
        centre = _uniform((b, 2, 1, 1), -0.5, 0.5, generator, image)
        y = torch.linspace(-1, 1, h, device=image.device).view(1, 1, h, 1)
        x = torch.linspace(-1, 1, w, device=image.device).view(1, 1, 1, w)
        inside = ((x - centre[:, :1]).abs() < side) & ((y - centre[:, 1:]).abs() < side) & (s > 0)
        return torch.where(inside, colour.expand_as(image), image)
    if kind == "shift":
        angle = _uniform((b, 1, 1), 0, 2 * math.pi, generator, image)
        flow = torch.stack([angle.cos(), angle.sin()], -1).expand(b, h, w, 2) * 0.1 * s.view(b, 1, 1, 1)
    elif kind == "warp":
        flow = _smooth_field(image, 5, generator).permute(0, 2, 3, 1) * 0.12 * s.view(b, 1, 1, 1)
    else:
        raise ValueError(f"unknown distortion {kind!r}; choose from {', '.join(DISTORTIONS)}")
    identity = torch.eye(2, 3).to(image).expand(b, 2, 3)
    grid = F.affine_grid(identity, [b, 1, h, w], align_corners=False) + flow
    return F.grid_sample(image, grid, padding_mode="reflection", align_corners=False)


def appearance(image: Tensor, segmentation: Tensor, groups: tuple[tuple[int, ...], ...]) -> tuple[Tensor, Tensor]:
    """Continuous appearance attributes of an image, measured from its pixels.

    Args:
        image: (B, 3, H, W) in [-1, 1].
        segmentation: (B, H, W) class indices.
        groups: classes whose pixels are averaged together, for example skin, hair, cloth and background.

    Returns:
        (B, 3 * len(groups) + 3) mean colour of each group, then the deviation of luma, the mean saturation and the
        mean absolute luma difference of neighbours times 4; and a mask of the same shape, 0 where a group has too few
        pixels (2 % of the image's area over 4).
    """
    means, masks = [], []
    for group in groups:
        inside = torch.stack([segmentation == i for i in group]).any(0).to(image)[:, None]
        area = inside.sum((1, 2, 3))
        means.append((image * inside).sum((2, 3)) / area.clamp(min=1)[:, None])
        masks.append((area > 0.005 * inside[0].numel()).to(image)[:, None].expand(-1, 3))
    luma = (image * torch.tensor(_LUMA).to(image).view(1, 3, 1, 1)).sum(1)
    saturation = (image.amax(1) - image.amin(1)).mean((1, 2))
    detail = luma.diff(dim=1).abs().mean((1, 2)) + luma.diff(dim=2).abs().mean((1, 2))
    finish = torch.stack([luma.flatten(1).std(1), saturation, 4 * detail], 1)
    return torch.cat([*means, finish], 1), torch.cat([*masks, torch.ones_like(finish)], 1)
