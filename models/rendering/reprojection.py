"""What an artwork says about other views than its own: by symmetry, along the anchor's depth, and by analogy.

All of it is told at the size of the anchor's depth, which may be smaller than that of its pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.camera import Camera
from models.rendering.output import Rendering
from models.rendering.visibility import seen_from

FIRM = 0.5  # pixels known better than this serve as examples
NEIGHBOURS = 4
HIDDEN = 0.06  # how much deeper than what is seen a point counts as hidden, units
PAIRS = 2**24  # pixels and examples compared at once
# How much a difference in the anchor's colour, in the normal and in the place on the head counts.
_COLOUR, _NORMAL, _PLACE = 1.5, 0.5, 2.0


@dataclass(frozen=True)
class PseudoView:
    """A picture that a view should show, as far as that is known.

    Attributes:
        image: (B, 3, H, W).
        weight: (B, 1, H, W) how far each pixel is known, from 0 to 1; above 1 it is known and counts more in the error.
    """

    image: Tensor
    weight: Tensor

    def __getitem__(self, index: Tensor | slice) -> PseudoView:
        return PseudoView(self.image[index], self.weight[index])

    def error(self, image: Tensor) -> Tensor:
        """Weighted mean squared error over all pixels: (B,)."""
        return (self.weight * (image - self.image).square()).flatten(1).mean(1)

    def sized(self, image: Tensor) -> Tensor:
        """Another picture (B, 3, H', W') at this one's size."""
        return shrunk(image, self.image)

    def under(self, other: PseudoView, share: float) -> PseudoView:
        """This picture where the other of the same size is not known; ``share`` is how far the other counts."""
        weight = share * other.weight
        return PseudoView(torch.lerp(self.image, other.image, weight), torch.maximum(self.weight, weight))

    def completed(self, image: Tensor) -> Tensor:
        """The known pixels over ``image``'s others, without gradient: a target for distances of whole pictures."""
        return torch.lerp(image, self.image, self.weight.clamp(max=1)).detach()


def shrunk(image: Tensor, like: Tensor) -> Tensor:
    """A picture at the size of ``like``: pixels are averaged."""
    size = like.shape[-2:]
    return image if image.shape[-2:] == size else F.interpolate(image, size, mode="area")


def visibility_weight(camera: Camera, view: Rendering) -> Tensor:
    """How well a picture shows the surface at each pixel (B, 1, H, W), in [0, 1]; 0 on the background.

    Low at the silhouette, where outlines are drawn and a pixel of depth error would mix in the background, and on
    surfaces seen at a grazing angle: what is painted there covers a large area from elsewhere.
    """
    assert view.alpha is not None and view.depth is not None
    firm = (1 - F.max_pool2d(1 - view.alpha, 3, 1, 1)).clamp(0, 1)
    if view.normals is None:
        return firm
    towards = F.normalize(camera.position[:, None] - surface(camera, view.depth), dim=-1)
    towards = towards.mT.unflatten(2, view.depth.shape[-2:])
    return firm * (1.6 * (view.normals * towards).sum(1, keepdim=True) - 0.4).clamp(0, 1)


def surface(camera: Camera, depth: Tensor) -> Tensor:
    """World points (B, H * W, 3) at camera-z ``depth`` (B, 1, H, W)."""
    origins, directions = camera.rays(*depth.shape[-2:])
    return origins + depth.flatten(2).mT * directions


def weighted_reference(
    reference: Tensor,
    camera: Camera,
    seen: Rendering,
    rim: float,
    person: Tensor | None = None,
    background: float = 1.0,
) -> PseudoView:
    """The artwork at its own view, where some pixels count less.

    Args:
        reference: (1, 3, H, W). camera, seen: its view, and the anchor from there.
        rim: what a pixel of the head counts that shows the surface badly, in [0, 1]; 1 is the paper's.
        person: (1, 1, H', W') mask of the artwork.
        background: what a pixel counts where the artwork shows background and the anchor its head, or the artwork
            a person beyond it, in [0, 1].
    """
    if rim == 1 and (person is None or background == 1):
        return PseudoView(reference, torch.ones_like(reference[:, :1]))
    assert seen.alpha is not None
    firm = visibility_weight(camera, seen)
    near = F.max_pool2d(seen.alpha, 5, 1, 2)  # outlines lie outside of the silhouette as well
    weight = 1 - (1 - rim) * near * (1 - firm)
    if person is not None:
        weight = weight * (1 - (1 - background) * (shrunk(person, seen.alpha) - seen.alpha).abs())
    if weight.shape[-2:] != reference.shape[-2:]:
        weight = F.interpolate(weight, reference.shape[-2:], mode="bilinear", align_corners=False)
    return PseudoView(reference, weight)


def mirrored(
    reference: Tensor,
    camera: Camera,
    seen: Rendering,
    other: Rendering,
    hidden_only: bool,
    unit: float = 1.0,
    person: Tensor | None = None,
) -> PseudoView:
    """The flipped artwork as a picture of the head from the mirrored camera: faces are nearly symmetric.

    Args:
        reference: (1, 3, H, W) the artwork.
        camera: its view. seen, other: the anchor from there, and from ``camera.mirror()``.
        hidden_only: count only what the artwork itself does not show; otherwise the whole picture.
        unit: of length, see :attr:`models.camera.Rig.scale`.
        person: (1, 1, H', W') mask of the artwork: its background is nothing of the head's.
    """
    flipped = reference.flip(-1)
    if not hidden_only:
        return PseudoView(flipped, torch.ones_like(flipped[:, :1]))
    assert seen.depth is not None and seen.alpha is not None and other.depth is not None and other.alpha is not None
    shown = seen_from(camera.mirror(), other.depth, other.alpha, camera, seen.depth, seen.alpha, HIDDEN * unit)
    weight = (~shown).float() * visibility_weight(camera.mirror(), other)
    if person is not None:
        weight = weight * shrunk(person, other.depth).flip(-1)
    return PseudoView(shrunk(flipped, other.depth), weight)


def reprojected(
    reference: Tensor,
    camera: Camera,
    seen: Rendering,
    cameras: Camera,
    views: Rendering,
    fill: float,
    unit: float = 1.0,
    person: Tensor | None = None,
) -> PseudoView:
    """The artwork carried to other views.

    A surface point that the artwork shows takes its colour from there, along the anchor's depth, as SPI (Yin et al.,
    2023) does for photographs. One that it does not show takes the colour of those shown whose anchor looks alike and
    that lie alike on the head, left and right taken for the same (image analogies, Hertzmann et al., 2001).

    Args:
        reference: (1, 3, H, W). camera, seen: its view, and the anchor from there.
        cameras: (V,) other views. views: the anchor from them.
        fill: weight of colours found by analogy; 0 leaves such pixels open.
        unit, person: as for :func:`mirrored`.
    """
    assert seen.depth is not None and seen.alpha is not None and views.depth is not None and views.alpha is not None
    count, size = len(cameras), views.depth.shape[-2:]
    reference = shrunk(reference, seen.depth)
    shown = seen_from(cameras, views.depth, views.alpha, camera, seen.depth, seen.alpha, HIDDEN * unit)
    points = surface(cameras, views.depth)
    uv, _ = camera.repeat_interleave(count).project(points)
    grid = (2 * uv - 1).unflatten(1, size)
    firm = visibility_weight(camera, seen)
    if person is not None:
        firm = firm * shrunk(person, firm)
    found = F.grid_sample(
        torch.cat([reference, firm], 1).expand(count, -1, -1, -1), grid, padding_mode="border", align_corners=False
    )
    colour, weight = found[:, :3], found[:, 3:] * shown
    if fill == 0:
        return PseudoView(colour, weight)
    examples = firm.flatten() > FIRM
    if int(examples.sum()) < NEIGHBOURS:
        return PseudoView(colour, weight)
    described, palette = _describe(camera, seen, unit)[0, examples], reference[0].flatten(1).T[examples]
    # The views' own grazing pixels are left open: the same points are met better from elsewhere.
    open_ = (views.alpha > 0.5) & (weight < FIRM)
    descriptions = _describe(cameras, views, unit)
    for view in range(count):
        asked = open_[view, 0].flatten()
        portions = descriptions[view, asked].split(max(PAIRS // len(described), 1))
        nearest = [torch.cdist(portion, described).topk(NEIGHBOURS, largest=False) for portion in portions]
        distance, index = (torch.cat(parts) for parts in zip(*nearest, strict=True))
        share = F.normalize(1 / (distance + 0.05), p=1, dim=1)
        guess = (share[..., None] * palette[index]).sum(1)
        # Between the two sources the colours blend, as a step would be painted as an edge.
        known = (weight[view, 0].flatten()[asked] / FIRM).clamp(0, 1)[:, None]
        flat = colour[view].flatten(1)
        flat[:, asked] = (known * flat[:, asked].T + (1 - known) * guess).T
        colour[view] = flat.unflatten(1, size)
    return PseudoView(
        colour, torch.where(open_, torch.maximum(weight, fill * visibility_weight(cameras, views)), weight)
    )


def _describe(camera: Camera, view: Rendering, unit: float) -> Tensor:
    """(B, H * W, D) by which pixels are compared: the anchor's colour, normal and place, left and right alike."""
    assert view.depth is not None
    places = surface(camera, view.depth) / unit
    parts = [
        _COLOUR * shrunk(view.image, view.depth).flatten(2).mT,
        _PLACE * torch.cat([places[..., :1].abs(), places[..., 1:]], -1),
    ]
    if view.normals is not None:
        normals = view.normals.flatten(2).mT
        parts.append(_NORMAL * torch.cat([normals[..., :1].abs(), normals[..., 1:]], -1))
    return torch.cat(parts, -1)
