"""What an artwork says about other views than its own: by symmetry, and by the anchor's depth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.camera import Camera
from models.generators.base import Rendering
from models.rendering.visibility import seen_from


@dataclass(frozen=True)
class PseudoView:
    """A picture that a view should show, where that is known.

    Attributes:
        image: (B, 3, H, W).
        weight: (B, 1, H, W) in [0, 1], how far each pixel is known.
    """

    image: Tensor
    weight: Tensor

    def __getitem__(self, index: Tensor | slice) -> PseudoView:
        return PseudoView(self.image[index], self.weight[index])

    def error(self, image: Tensor) -> Tensor:
        """Weighted mean squared error over all pixels: (B,)."""
        return (self.weight * (image - self.image).square()).flatten(1).mean(1)

    def completed(self, image: Tensor) -> Tensor:
        """The known pixels over ``image``'s others, without gradient: a target for distances of whole pictures."""
        return (self.weight * self.image + (1 - self.weight) * image).detach()


def mirrored(reference: Tensor, camera: Camera, seen: Rendering, behind: Rendering, hidden_only: bool) -> PseudoView:
    """The flipped artwork as a picture of the head from the mirrored camera: faces are nearly symmetric.

    Args:
        reference: (1, 3, H, W) the artwork.
        camera: its view. seen, behind: the anchor from there, and from ``camera.mirror()``.
        hidden_only: count only what the artwork itself does not show; otherwise the whole picture.
    """
    flipped = reference.flip(-1)
    if not hidden_only:
        return PseudoView(flipped, torch.ones_like(flipped[:, :1]))
    assert seen.depth is not None and seen.alpha is not None and behind.depth is not None and behind.alpha is not None
    shown = seen_from(camera.mirror(), behind.depth, behind.alpha, camera, seen.depth, seen.alpha)
    return PseudoView(flipped, (~shown & (behind.alpha > 0.5)).float())


def carried(
    reference: Tensor, camera: Camera, seen: Rendering, cameras: Camera, views: Rendering, symmetric: float
) -> PseudoView:
    """The artwork carried to other views along the anchor's depth, as SPI (Yin et al., 2023) does for photographs.

    A pixel that the artwork shows takes its colour; one that it would show if the head were flipped takes the
    colour from there. Grazing surfaces count less, by the cosine with which the artwork sees them.

    Args:
        reference: (1, 3, H, W). camera, seen: its view and the anchor from there.
        cameras: (V,) other views. views: the anchor from them.
        symmetric: weight of colours taken from the other side.
    """
    direct, shown = _carry(reference, camera, seen, cameras, views)
    if symmetric == 0:
        return PseudoView(direct, shown)
    flipped = Rendering(
        image=seen.image.flip(-1),
        depth=None if seen.depth is None else seen.depth.flip(-1),
        alpha=None if seen.alpha is None else seen.alpha.flip(-1),
    )
    other, reflected = _carry(reference.flip(-1), camera.mirror(), flipped, cameras, views)
    weight = torch.maximum(shown, symmetric * reflected * (1 - shown))
    return PseudoView(torch.where(shown > 0.3, direct, other), weight)


def _carry(
    reference: Tensor, camera: Camera, seen: Rendering, cameras: Camera, views: Rendering
) -> tuple[Tensor, Tensor]:
    """Colours (V, 3, H, W) found in the artwork, and how well it shows those points (V, 1, H, W)."""
    assert seen.depth is not None and seen.alpha is not None and views.depth is not None and views.alpha is not None
    count, size = len(cameras), views.depth.shape[-2:]
    shown = seen_from(cameras, views.depth, views.alpha, camera, seen.depth, seen.alpha)
    origins, directions = cameras.rays(*size)
    points = origins + views.depth.flatten(2).mT * directions
    uv, _ = camera.repeat_interleave(count).project(points)
    grid = (2 * uv - 1).reshape(count, *size, 2)
    colour = F.grid_sample(reference.expand(count, -1, -1, -1), grid, padding_mode="border", align_corners=False)
    # Only well inside the silhouette: a pixel of depth error there would carry the background's colour.
    inside = 1 - F.max_pool2d(1 - seen.alpha, 3, 1, 1)
    firm = F.grid_sample(inside.expand(count, -1, -1, -1), grid, padding_mode="zeros", align_corners=False)
    weight = shown.float() * firm.clamp(0, 1)
    if views.normals is not None:
        towards = F.normalize(camera.position[:, None] - points, dim=-1).mT.reshape(count, 3, *size)
        weight = weight * (2 * (views.normals * towards).sum(1, keepdim=True)).clamp(0, 1)
    return colour, weight
