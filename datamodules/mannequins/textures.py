"""What is painted on a head: albedo and segmentation as functions of the surface point.

Everything is a soft-edged mask in head coordinates, painted in order, so that a texture is the same from
every view.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules.mannequins.scene import Palette
from datamodules.mannequins.shapes import EYE_HEIGHT, Knobs, head_space, mouth, smooth_step
from models.segments import SEGMENTS

SEGMENT = {name: index for index, name in enumerate(SEGMENTS)}
_MATERIAL_SEGMENTS = tuple(SEGMENT[name] for name in ("skin", "hair", "cloth", "glasses"))


@dataclass
class Canvas:
    """Colours and segments of N surface points while they are painted.

    Attributes:
        colour: (N, 3) RGB in [0, 1].
        segment: (N,) int64, indices into ``SEGMENTS``.
        softness: width of the painted edges, world units.
    """

    colour: Tensor
    segment: Tensor
    softness: float

    def inside(self, signed: Tensor) -> Tensor:
        """(N,) soft mask of ``signed > 0`` (a distance in world units)."""
        return torch.sigmoid(signed * (1 / (0.35 * self.softness)))

    def paint(self, mask: Tensor, colour: Tensor, segment: str | None = None) -> None:
        """Blend ``colour`` (3,) or (N, 3) in by ``mask`` (N,), and name the points where it prevails."""
        self.colour = self.colour + (colour - self.colour) * mask[:, None]
        if segment is not None:
            self.segment = torch.where(mask > 0.5, SEGMENT[segment], self.segment)


def paint_head(
    knob: Knobs, palette: Palette, points: Tensor, material: Tensor, softness: float
) -> tuple[Tensor, Tensor]:
    """Texture one head.

    Args:
        knob: its named parameters.
        palette: its colours, (1, 3) each.
        points: (3, N) surface points, world units.
        material: (N,) int64 indices into ``shapes.MATERIALS``.
        softness: width of painted edges, world units; about a pixel.

    Returns:
        albedo (N, 3) in [0, 1] and segments (N,) int64, indices into ``SEGMENTS``.
    """
    x, y, z = points.unbind(0)
    x, y = head_space(knob, x, y)
    canvas = Canvas(palette.skin.expand(len(x), 3), torch.full_like(material, SEGMENT["skin"]), softness)
    front = torch.sigmoid((z - 0.25) / 0.05)
    _paint_skin(canvas, knob, palette, x, y, z, front)
    _paint_mouth(canvas, knob, palette, x, y, front)
    _paint_eyes(canvas, knob, palette, x, y, front)
    _paint_brows(canvas, knob, palette, x, y, front)
    strands = _hair_colour(knob, palette, x, y, z)
    hair, cloth, glasses = ((material == index)[:, None] for index in (1, 2, 3))
    collar = (((x / 0.44) ** 2 + ((y + 1.06) / 0.32) ** 2 + ((z - 0.18) / 0.47) ** 2).sqrt() - 1) / 0.09
    collar = 1 - 0.30 * torch.exp(-collar * collar)[:, None]
    colour = torch.where(hair, strands, canvas.colour)
    colour = torch.where(cloth, palette.cloth * collar, colour)
    colour = torch.where(glasses, colour.new_tensor([0.11, 0.10, 0.12]), colour)
    by_material = torch.tensor(_MATERIAL_SEGMENTS, device=x.device)[material]
    return colour.clamp(0, 1), torch.where(material == 0, canvas.segment, by_material)


def _paint_skin(canvas: Canvas, knob: Knobs, palette: Palette, x: Tensor, y: Tensor, z: Tensor, front: Tensor) -> None:
    """Rosy cheeks and nose, nostrils, beard."""
    side = x.abs()
    cheeks = torch.exp(-(((side - 0.40) / 0.18) ** 2 + ((y + 0.20) / 0.14) ** 2)) * 0.55
    nose = torch.exp(-((x / 0.10) ** 2 + ((y + 0.19 - knob["nose_lift"]) / 0.09) ** 2)) * 0.35
    rosy = canvas.colour * canvas.colour.new_tensor([1.05, 0.72, 0.70])
    canvas.paint((cheeks + nose) * knob["blush"] * front, rosy)
    nostril_y = y + 0.245 - knob["nose_lift"]
    nostrils = torch.exp(-(((side - 0.05 * knob["nose_width"]) / 0.030) ** 2 + (nostril_y / 0.020) ** 2))
    canvas.paint((1.2 * nostrils).clamp(max=1) * 0.6 * torch.sigmoid((z - 0.6) / 0.03), palette.skin[0] * 0.3)
    # The beard ends below the cheekbones, above the neck, and leaves the philtrum's groove lighter.
    upper_edge = -0.27 - y - 0.25 * (0.5 - side).clamp(min=0) + 0.30 * smooth_step(0.28, 0.58, side)
    beard = canvas.inside(upper_edge) * torch.sigmoid((z - 0.02) / 0.05) * torch.sigmoid((y + 0.98) / 0.03)
    canvas.paint(0.88 * knob["beard"] * beard, palette.hair[0] * 0.8 + 0.2 * canvas.colour, "beard")


def _paint_mouth(canvas: Canvas, knob: Knobs, palette: Palette, x: Tensor, y: Tensor, front: Tensor) -> None:
    """Lips, the line between them, and teeth and tongue of an open mouth."""
    lip = mouth(knob, x, y)
    arch = (1 - lip.across * lip.across).clamp(min=0)
    cupid = 1 - 0.25 * torch.exp(-((lip.across / 0.18) ** 2))
    within = canvas.inside((1 - lip.across.abs()) * lip.half_width) * front
    top = lip.gap + 0.056 * lip.fullness * arch * cupid
    bottom = lip.gap + 0.070 * lip.fullness * arch.sqrt()
    canvas.paint(canvas.inside(top - lip.height) * canvas.inside(bottom + lip.height) * within, palette.lips[0], "lips")
    line = canvas.inside(0.010 - lip.height.abs()) * within
    canvas.paint(0.75 * line, palette.lips[0] * 0.32)
    parted = min(1.0, lip.open / 0.12)
    cavity = canvas.inside(lip.gap - 0.010 - lip.height.abs()) * within * parted
    canvas.paint(cavity, palette.lips.new_tensor([0.25, 0.06, 0.07]), "mouth")
    # Teeth fill a smile and leave the lower half of a wide open mouth to the tongue.
    teeth_edge = (0.25 - 1.25 * (1 - knob["mouth_open"]) ** 2) * lip.gap
    canvas.paint(cavity * canvas.inside(lip.height - teeth_edge), palette.lips.new_tensor([0.96, 0.94, 0.91]))
    tongue = ((lip.across / 0.55) ** 2 + ((lip.height + 0.95 * lip.gap) / 0.055) ** 2).sqrt() - 1
    canvas.paint(cavity * canvas.inside(-0.05 * tongue) * 0.9, palette.lips.new_tensor([0.74, 0.30, 0.32]))


def _paint_eyes(canvas: Canvas, knob: Knobs, palette: Palette, x: Tensor, y: Tensor, front: Tensor) -> None:
    """Whites, irises with pupil and catch light, lashes and lid fold."""
    side = x.abs()
    unit = knob["eye_size"] * 1.15  # half width of an eye
    across = (side - knob["eye_spacing"]) / unit
    up = (y - EYE_HEIGHT) / unit - 0.6 * knob["eye_tilt"] * across
    opening = knob["lid_opening"] * (1 + 0.15 * knob["brow_raise"]) * (1 - 0.12 * knob["smile"] - 0.12 * knob["frown"])
    arch = (1 - across * across).clamp(min=0)
    closed = knob["blink"]
    top = arch * (0.68 * opening * (1 - closed) - 0.30 * closed)
    bottom = -arch * (0.48 - 0.12 * knob["smile"])
    within = canvas.inside((1 - across.abs()) * unit) * front
    # A shut eye shows its lash line only: the white fades before the lids meet.
    white = canvas.inside((top - up) * unit) * canvas.inside((up - bottom) * unit) * within
    white = white * min(1.0, max(0.0, (0.97 - closed) / 0.17))
    canvas.paint(white, palette.skin.new_tensor([0.96, 0.95, 0.93]), "eye_white")
    radius = (across * across + (up - 0.06) ** 2).sqrt()
    shade = 0.85 + 0.40 * ((0.06 - up) / 0.5).clamp(-1, 1)
    iris = white * canvas.inside((0.50 - radius) * unit)
    canvas.paint(iris, palette.iris * shade[:, None], "iris")
    canvas.paint(0.65 * iris * canvas.inside((radius - 0.43) * unit), palette.iris[0] * 0.3)
    canvas.paint(white * canvas.inside((0.24 - radius) * unit), palette.iris.new_tensor([0.03, 0.02, 0.03]))
    toward_left = x.sign() * across
    glint = ((toward_left + 0.17) ** 2 + (up - 0.28) ** 2).sqrt()
    canvas.paint(white * canvas.inside((0.14 - glint) * unit), palette.iris.new_tensor([1.0, 1.0, 1.0]))
    lashes = canvas.inside((0.10 - (up - top - 0.03).abs()) * unit) * canvas.inside((1.06 - across.abs()) * unit)
    canvas.paint(0.9 * lashes * front, palette.iris.new_tensor([0.10, 0.06, 0.05]))
    fold = canvas.inside((0.05 - (up - top - 0.42 * opening).abs()) * unit)
    fold = fold * canvas.inside((0.9 - across.abs()) * unit) * (1 - closed)
    canvas.paint(0.22 * fold * front, palette.skin[0] * 0.5)


def _paint_brows(canvas: Canvas, knob: Knobs, palette: Palette, x: Tensor, y: Tensor, front: Tensor) -> None:
    """Brows: raised as a whole, or knit, with their inner ends low and close."""
    raised, knit = knob["brow_raise"], knob["frown"]
    across = (x.abs() - knob["eye_spacing"] + 0.035 * knit) / 0.20  # -1 at the inner end
    inner = (0.5 - 0.5 * across).clamp(0, 1.2)
    middle = EYE_HEIGHT + 0.20 + 0.45 * (knob["eye_size"] - 0.155) + knob["brow_height"]
    middle = middle + knob["brow_arch"] * (1 - across * across) * (1 - 0.5 * knit) - 0.02 * across
    middle = middle + 0.12 * knob["eye_tilt"] * across + 0.11 * raised - knit * (0.16 * inner - 0.02)
    thickness = knob["brow_thickness"] * (1.1 - 0.45 * across.clamp(-1, 1))
    brows = canvas.inside(thickness - (y - middle).abs()) * canvas.inside((1 - across.abs()) * 0.20) * front
    # As dark as the hair, but always darker than the skin they sit on.
    canvas.paint(0.92 * brows, torch.minimum(palette.hair[0] * 0.6, palette.skin[0] * 0.5), "brow")


def _hair_colour(knob: Knobs, palette: Palette, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """(N, 3) hair with locks of varying brightness and a soft sheen around the crown."""
    angle = (x - knob["parting"]) / (z + 1.6).clamp(min=0.3)
    locks = 0.5 + 0.5 * torch.sin(44 * angle + 5 * torch.sin(2.5 * y + z)) * torch.sin(17 * angle + 2 * y)
    curls = 0.5 + 0.5 * torch.sin(17 * x) * torch.sin(17 * y) * torch.sin(17 * z)
    locks = locks + (curls - locks) * knob["afro"]
    sheen = torch.exp(-(((y - 0.72 - 0.12 * torch.cos(2 * x)) / 0.11) ** 2)) * 0.13
    warm_white = palette.hair.new_tensor([1.0, 0.95, 0.9])
    return palette.hair * (0.80 + 0.38 * locks[:, None]) + sheen[:, None] * (0.5 + 0.5 * palette.hair) * warm_white
