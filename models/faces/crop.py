"""Turned squares cut out of pictures: the one resampling that finder, mesh and crops share.

Pixel coordinates are continuous: x to the right, y down, (0, 0) the picture's corner, a pixel's centre at .5.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Padding = Literal["black", "blurred"]


def cut(image: Tensor, centre: Tensor, side: float, angle: float, size: int, padding: Padding = "black") -> Tensor:
    """One turned square of a picture, antialiased; differentiable with respect to the picture.

    Only what the square covers is read, and shrunk before it is turned: a small face of a very large picture costs
    little.

    Args:
        image: (B, C, H, W) in [-1, 1].
        centre: (2,) x and y of the square's centre, pixels.
        side: the square's side, pixels.
        angle: of the square's x axis, radians, clockwise as the picture is seen.
        size: the result's side, pixels.
        padding: what lies beyond the picture: "black" is -1; "blurred" continues it as FFHQ's preparation does,
            reflected, and the more blurred and even the farther away.

    Returns:
        (B, C, size, size).
    """
    if padding == "blurred":
        return _blurred(image, centre, side, angle, size)
    height, width = image.shape[-2:]
    x, y = (float(value) for value in centre)
    cos, sin = math.cos(angle), math.sin(angle)
    reach = side / 2 * (abs(cos) + abs(sin)) + 2 * max(1.0, side / size)  # and what antialiasing looks at
    left, right = (min(max(round(edge), 0), width) for edge in (x - reach, x + reach))
    top, bottom = (min(max(round(edge), 0), height) for edge in (y - reach, y + reach))
    if left >= right or top >= bottom:
        return image.new_full((*image.shape[:2], size, size), -1.0)
    part = image[..., top:bottom, left:right]
    shape = [max(1, round(n * min(1.0, size / side))) for n in part.shape[-2:]]
    if shape != list(part.shape[-2:]):
        part = F.interpolate(part, shape, mode="bilinear", align_corners=False, antialias=True)
    steps = (torch.arange(size, device=image.device, dtype=torch.float64) + 0.5) / size - 0.5
    v, u = torch.meshgrid(steps * side, steps * side, indexing="ij")
    columns = (x - left + cos * u - sin * v) / (right - left)
    rows = (y - top + sin * u + cos * v) / (bottom - top)
    grid = (2 * torch.stack([columns, rows], -1) - 1).to(part.dtype)[None].expand(len(part), -1, -1, -1)
    # Outside is 0 to grid_sample: black is made 0.
    return F.grid_sample(part + 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) - 1


_MARGIN, _BLUR = 0.3, 0.02  # of the side: the least that is padded, and the blur's deviation (FFHQ's)


def _blurred(image: Tensor, centre: Tensor, side: float, angle: float, size: int) -> Tensor:
    """:func:`cut` with a border as in https://github.com/NVlabs/ffhq-dataset, ``recreate_aligned_images``.

    Unlike there, the picture's own pixels stay as they are: a tight picture would be blurred all over.
    """
    cos, sin = math.cos(angle), math.sin(angle)
    reach = side / 2 * (abs(cos) + abs(sin)) + 2 * max(1.0, side / size)
    point = [float(value) for value in centre]
    edges = []  # of what is needed, along x and y: before and after the picture's own part
    for place, length in zip(point, (image.shape[-1], image.shape[-2]), strict=True):
        low, high = math.floor(place - reach), math.ceil(place + reach)
        edges.append((min(max(low, 0), length - 1), max(min(high, length), 1), low, high))
    (left, right, west, east), (top, bottom, north, south) = edges
    part = image[..., top:bottom, left:right]
    scale = min(1.0, size / side)
    if scale < 1:
        shape = [max(1, round(length * scale)) for length in part.shape[-2:]]
        part = F.interpolate(part, shape, mode="bicubic", align_corners=False, antialias=True)
    across, along = part.shape[-1] / (right - left), part.shape[-2] / (bottom - top)
    pads = [math.ceil(max(0, gap) * k) for gap, k in
            ((left - west, across), (east - right, across), (top - north, along), (south - bottom, along))]  # fmt: skip
    if any(pads):
        # Farther out all is even, and as the edge is.
        pads = [min(max(pad, round(_MARGIN * side * scale)), 2 * size) for pad in pads]
        part = _fade(part, pads, _BLUR * side * scale)
    else:
        pads = [0, 0, 0, 0]
    height, width = part.shape[-2:]
    steps = ((torch.arange(size, device=image.device, dtype=torch.float64) + 0.5) / size - 0.5) * side
    v, u = torch.meshgrid(steps, steps, indexing="ij")
    columns = ((point[0] - left + cos * u - sin * v) * across + pads[0]) / width
    rows = ((point[1] - top + sin * u + cos * v) * along + pads[2]) / height
    grid = (2 * torch.stack([columns, rows], -1) - 1).to(part.dtype)[None].expand(len(part), -1, -1, -1)
    return F.grid_sample(part, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp(-1, 1)


def _fade(part: Tensor, pads: list[int], blur: float) -> Tensor:
    """Reflect a picture beyond its left, right, top and bottom edge, and blur what is beyond them."""
    before = part.shape
    rows = _reflected(before[-2], pads[2], pads[3], part.device)
    columns = _reflected(before[-1], pads[0], pads[1], part.device)
    part = part[..., rows, :][..., columns]
    height, width = part.shape[-2:]

    # 1 at the far edges, 0 at the picture's own, less within it: an eighth of the way there all is blurred.
    def outside(length: int, first: int, last: int) -> Tensor:
        place = torch.arange(length, device=part.device, dtype=part.dtype)
        return 1 - torch.minimum(place / max(first, 1), (length - 1 - place) / max(last, 1))

    beyond = torch.maximum(outside(width, pads[0], pads[1]), outside(height, pads[2], pads[3])[:, None])
    # A wide blur is made of a smaller picture.
    shrink = max(1, int(blur / 4))
    small = F.interpolate(part, [max(1, n // shrink) for n in (height, width)], mode="area") if shrink > 1 else part
    soft = _gaussian(small, blur / shrink)
    if shrink > 1:
        soft = F.interpolate(soft, (height, width), mode="bilinear", align_corners=False)
    part = part + (soft - part) * (8 * beyond).clamp(0, 1)
    even = small.flatten(2).median(-1).values[..., None, None]
    return part + (even - part) * beyond.clamp(0, 1)


def _reflected(length: int, first: int, last: int, device: torch.device) -> Tensor:
    """Indices that go back and forth over ``length``, from ``first`` before it to ``last`` behind."""
    place = torch.arange(-first, length + last, device=device)
    period = max(2 * (length - 1), 1)
    place = place.remainder(period)
    return torch.minimum(place, period - place) if length > 1 else torch.zeros_like(place)


def _gaussian(image: Tensor, deviation: float) -> Tensor:
    """Blur (B, C, H, W), one axis after the other; the edges are repeated."""
    radius = max(1, round(4 * deviation))
    place = torch.arange(-radius, radius + 1, device=image.device, dtype=image.dtype)
    kernel = (-0.5 * (place / max(deviation, 1e-3)) ** 2).exp()
    kernel = kernel / kernel.sum()
    flat = image.flatten(0, 1)[:, None]
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), mode="replicate"), kernel[None, None, None])
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), mode="replicate"), kernel[None, None, :, None])
    return flat.reshape(image.shape)
