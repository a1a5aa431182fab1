"""Where a mark on the input picture goes when the head turns: the parallax of fine detail, against the truth.

GRAMInverter's depth term (Deng et al. 2023, Eq. 10) is there for the parallax of details, which the paper shows in
one figure and no number (Fig. 6). Here a spot is painted on a surface point known from the true depth, the picture
is inverted with and without it, and the spot is found in new views from the difference of the two renderings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from models.camera import Camera
from models.rendering.visibility import seen_from
from models.segments import SEGMENTS

COLOUR = (-0.8, -0.5, 0.9)  # blue: no skin, brow or lip has it
_REACH = 2.5  # standard deviations of the spot around its peak that its centroid is taken over
_SKIN = SEGMENTS.index("skin")


class Views(Protocol):
    """What is seen by the cameras: (B, 1, H, W) true camera-z and head, (B, 3, H, W) unit normals, (B, H, W)."""

    depth: Tensor
    mask: Tensor
    normals: Tensor
    segmentation: Tensor
    camera: Camera


@dataclass(frozen=True)
class Mark:
    """A round spot on the surface of one head.

    Attributes:
        point: (3,) its centre, world units.
        sigma: of its Gaussian opacity, world units.
        colour: RGB in [-1, 1].
    """

    point: Tensor
    sigma: float
    colour: tuple[float, float, float] = COLOUR

    def opacity(self, camera: Camera, depth: Tensor, mask: Tensor) -> Tensor:
        """(B, 1, H, W): how much of each pixel the spot covers, exp(-d^2 / 2 sigma^2) at true surface points."""
        origins, directions = camera.rays(*depth.shape[-2:])
        points = origins + depth.flatten(2).mT * directions
        square = (points - self.point.to(points)).square().sum(-1).reshape(depth.shape)
        return torch.exp(-square / (2 * self.sigma**2)) * (mask > 0.5)

    def paint(self, image: Tensor, opacity: Tensor) -> Tensor:
        """(B, 3, H, W) with the spot, given its :meth:`opacity`."""
        return image + opacity * (image.new_tensor(self.colour)[:, None, None] - image)


def choose_mark(source: Views, sweep: Views, generator: Generator, pixels: float = 1.4) -> Mark | None:
    """A random spot of skin that faces the input's camera, among those that most views of the sweep show.

    Args:
        source: the input's own view, a batch of one.
        sweep: V views of the same head.
        generator: of the choice.
        pixels: standard deviation of the spot in the input picture.

    Returns:
        None when no such skin is seen in three views, fewer of which say nothing about parallax.
    """
    height, width = source.depth.shape[-2:]
    views = len(sweep.camera)
    camera = source.camera.repeat_interleave(views)
    depth, mask = (part.expand(views, -1, -1, -1) for part in (source.depth, source.mask))
    shown = seen_from(camera, depth, mask, sweep.camera, sweep.depth, sweep.mask)[:, 0].sum(0)
    origins, directions = source.camera.rays(height, width)
    points = (origins + source.depth.flatten(2).mT * directions)[0]
    facing = -(F.normalize(directions[0], dim=-1) * source.normals[0].flatten(1).T).sum(-1)
    from kornia.filters import gaussian_blur2d  # here: slow to import

    skin = gaussian_blur2d((source.segmentation == _SKIN)[:, None].float(), (5, 5), (pixels, pixels))
    usable = (skin.flatten() > 0.95) & (facing > 0.7)
    score = torch.where(usable, shown.flatten(), -1)
    if int(score.max()) < 3:
        return None
    candidates = (score == score.max()).nonzero()[:, 0]
    chosen = candidates[torch.randint(len(candidates), (), generator=generator).to(candidates.device)]
    footprint = float(source.depth.flatten()[chosen] / (source.camera.intrinsics[0, 0, 0] * width))
    return Mark(points[chosen], pixels * footprint)


def shows(views: Views, point: Tensor, tolerance: float = 0.06) -> Tensor:
    """(V,) bool: whether each view shows a surface point (3,), by the true depth; tolerance in world units."""
    uv, distance = views.camera.project(point.expand(len(views.camera), 1, 3))
    depth = torch.where(views.mask > 0.5, views.depth, torch.zeros_like(views.depth))
    met = F.grid_sample(depth, 2 * uv[:, None] - 1, mode="nearest", align_corners=False)
    inside = ((uv > 0) & (uv < 1)).all(-1)[:, 0]
    return inside & ((distance[:, 0] - met[:, 0, 0, 0]).abs() < tolerance)


@dataclass(frozen=True)
class Spot:
    """Where a mark was found."""

    pixel: Tensor
    """(V, 2) x and y, pixels; a pixel's centre is at .5."""
    strength: Tensor
    """(V,) its contrast as a share of the painted one: 1 when it is there in full, 0 when it is lost."""


def locate(plain: Tensor, marked: Tensor, painted: Tensor, pixels: float = 1.4) -> Spot:
    """Find a mark in the difference of renderings without and with it.

    The difference is projected on the painted change of colour, smoothed as the mark is, and the centroid taken
    around the strongest response.

    Args:
        plain, marked: (V, 3, H, W) in [-1, 1], of the inversions of the picture without and with the mark.
        painted: (3, H, W), the change that was painted on the input picture.
        pixels: the mark's standard deviation there.
    """
    # Matched filter: 1 at the centre of a spot that is rendered as it was painted.
    change = painted.flatten(1).T[painted.square().sum(0).flatten().argmax()]
    side = 2 * round(2 * pixels) + 1

    def response(difference: Tensor) -> Tensor:
        along = (difference * change[:, None, None]).sum(1, keepdim=True) / change.square().sum()
        from kornia.filters import gaussian_blur2d  # here: slow to import

        return gaussian_blur2d(along, (side, side), (pixels, pixels))[:, 0]

    found, full = response(marked - plain), response(painted[None])
    height, width = found.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    place = torch.stack([x, y], -1).to(found)
    peak, index = found.flatten(1).max(1)
    centre = place.reshape(-1, 2)[index]
    for _ in range(3):  # the window follows its own centroid
        square = (place - centre[:, None, None]).square().sum(-1)
        weight = found.clamp_min(0) * torch.exp(-square / (2 * (_REACH * pixels) ** 2))
        centre = (weight[..., None] * place).sum((1, 2)) / weight.sum((1, 2)).clamp_min(1e-12)[:, None]
    return Spot(centre, peak / full.max())


@dataclass(frozen=True)
class Parallax:
    """How a mark moved over a sweep.

    Attributes:
        error: mean distance between found and true place, pixels; NaN when the mark was not found.
        slope: of found against true motion: 1 with the right depth, 0 for a mark that sticks to the picture; NaN
            when it was found in fewer than three views.
        found: share of the views that show the point in which the mark was found.
        strength: its mean contrast there, as a share of the painted one.
    """

    error: float
    slope: float
    found: float
    strength: float


def parallax(spot: Spot, truth: Tensor, shown: Tensor, threshold: float = 0.25) -> Parallax:
    """Compare the places of a mark with the true ones.

    Args:
        spot: of V views.
        truth: (V, 2) true places, pixels.
        shown: (V,) bool, the views that show the point.
        threshold: strength from which a mark counts as found.
    """
    use = shown & (spot.strength >= threshold)
    nan = float("nan")
    found = float(use.sum() / shown.sum()) if shown.any() else nan
    strength = float(spot.strength[shown].mean()) if shown.any() else nan
    if not use.any():
        return Parallax(nan, nan, found, strength)
    here, there = spot.pixel[use].double(), truth[use].double()
    error = float((here - there).norm(dim=1).mean())
    if int(use.sum()) < 3:
        return Parallax(error, nan, found, strength)
    here, there = here - here.mean(0), there - there.mean(0)
    return Parallax(error, float((here * there).sum() / there.square().sum()), found, strength)
