"""Art styles, consistent in 3D: strokes, hatching, dots and tones are defined on the head, not on the image.

A style is a recolouring of the palette, a way to paint surface points, an outline and a background.
Outlines come from the geometry (depth steps, creases and borders between materials). Backgrounds are
attached to the image and smooth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from datamodules.mannequins.scene import Palette
from datamodules.mannequins.textures import SEGMENT

PLAIN = "plain"
ART_STYLES = ("toon", "sketch", "ukiyoe", "watercolour", "impasto", "popart")
STYLES = (PLAIN, *ART_STYLES)
ALBEDO = "albedo"  # the colours of surfaces, which no light changes: the truth of what separates the two
HELD_OUT_STYLE = "ukiyoe"  # never shown to the feature networks


@dataclass(frozen=True)
class Surface:
    """The N visible surface points of one head.

    Attributes:
        points: (N, 3) world units.
        normals: (N, 3) unit.
        view: (N, 3) unit, towards the camera.
        material: (N,) int64 indices into ``shapes.MATERIALS``.
        segment: (N,) int64 indices into ``models.segments.SEGMENTS``.
        albedo: (N, 3) RGB in [0, 1].
        irradiance: (N, 3) RGB light received, about 1 where well lit.
        occlusion: (N,) 1 = open, 0 = buried.
    """

    points: Tensor
    normals: Tensor
    view: Tensor
    material: Tensor
    segment: Tensor
    albedo: Tensor
    irradiance: Tensor
    occlusion: Tensor

    @property
    def tone(self) -> Tensor:
        """(N,) brightness of the light, the same from every view."""
        return self.irradiance.mean(-1) * self.occlusion

    @property
    def facing(self) -> Tensor:
        """(N,) cosine between normal and view, 0 at the silhouette."""
        return (self.normals * self.view).sum(-1).clamp(0, 1)


@dataclass(frozen=True)
class Style:
    """How to draw.

    Attributes:
        recolour: palette -> palette, before the head is textured.
        paint: surface, palette -> (N, 3) RGB.
        background: palette, u (M,), v (M,) in [-1, 1] from left to right and top to bottom -> (M, 3) RGB.
        outline: opacity of the ink line, 0 for none.
        ink: RGB of the line.
    """

    recolour: Callable[[Palette], Palette]
    paint: Callable[[Surface, Palette], Tensor]
    background: Callable[[Palette, Tensor, Tensor], Tensor]
    outline: float = 0.0
    ink: tuple[float, float, float] = (0.0, 0.0, 0.0)


def get_style(name: str) -> Style:
    """The style called ``name``.

    Raises:
        ValueError: when there is none.
    """
    if name not in _TABLE:
        raise ValueError(f"unknown style {name!r}, choose from {STYLES}")
    return _TABLE[name]


def _step(value: Tensor, threshold: float, softness: float = 0.02) -> Tensor:
    return torch.sigmoid((value - threshold) / softness)


def _saturate(colour: Tensor, amount: float) -> Tensor:
    grey = colour.mean(-1, True)
    return (grey + (colour - grey) * amount).clamp(0, 1)


def _noise(points: Tensor, frequency: float, phase: float = 0.0) -> Tensor:
    """(N,) smooth noise in about [-1, 1] of points (N, 3)."""
    x, y, z = (points * frequency).unbind(-1)
    total = torch.zeros_like(x)
    for octave, (a, b, c) in enumerate(((1, 0.7, 0.3), (-0.6, 1, 0.5), (0.4, -0.8, 1), (0.9, 0.5, -0.9))):
        warp = 1.5 * torch.sin(0.5 * (b * x - a * y + c * z) + octave)
        total = total + torch.sin((1 + 0.37 * octave) * (a * x + b * y + c * z) + phase + 1.7 * octave + warp)
    return total / 4


def _hash(value: Tensor, salt: float) -> Tensor:
    """(N,) in [0, 1), a repeatable random number for each small integer."""
    return torch.frac(torch.frac(value * 0.61803 + salt) * (37.17 + torch.frac(value * 0.31831) * 11.3)).abs()


def _same(palette: Palette) -> Palette:
    return palette


def _plain_paint(surface: Surface, palette: Palette) -> Tensor:
    shade = surface.occlusion[:, None] ** surface.albedo.new_tensor([0.80, 1.0, 1.10])  # red bleeds into shadows
    colour = surface.albedo * surface.irradiance * shade
    eyes = (surface.segment == SEGMENT["eye_white"]) | (surface.segment == SEGMENT["iris"])
    gloss = torch.where(surface.material == 1, 0.12, torch.where(eyes, 0.25, 0.07))
    half = surface.view + surface.view.new_tensor([0.1, 0.35, 0.6])
    half = half / half.norm(dim=-1, keepdim=True)
    shine = (surface.normals * half).sum(-1).clamp(min=0) ** 24
    rim = (1 - surface.facing) ** 4 * 0.10
    return (colour + (gloss * shine + rim)[:, None]).clamp(0, 1) ** 0.95


def _plain_background(palette: Palette, u: Tensor, v: Tensor) -> Tensor:
    return palette.background * (1.04 - 0.10 * v - 0.10 * (u * u + v * v))[:, None]


def _toon_paint(surface: Surface, palette: Palette) -> Tensor:
    tone = surface.tone
    level = 0.64 + 0.24 * _step(tone, 0.55) + 0.16 * _step(tone, 0.86)
    cool = surface.albedo.new_tensor([0.95, 0.92, 1.08])
    tint = torch.where((tone < 0.55)[:, None], cool, torch.ones_like(cool))
    return _saturate(surface.albedo, 1.35) * level[:, None] * tint * 1.1


def _toon_background(palette: Palette, u: Tensor, v: Tensor) -> Tensor:
    return _saturate(palette.background, 2.2).expand(len(u), 3) * (1.0 - 0.06 * v)[:, None]


def _sketch_paint(surface: Surface, palette: Palette) -> Tensor:
    x, y, z = surface.points.unbind(-1)
    darkness = 1 - (surface.tone**0.8 * surface.albedo.mean(-1) ** 0.40 * 1.22).clamp(0, 1)
    ink = 0.45 * darkness**1.3
    wobble = 1.6 * _noise(surface.points, 2.3)
    # Three families of pencil strokes, each starts at a darker tone and grows wider with it.
    families = ((0.16, 50.0, (0.75, 1.0, 0.55)), (0.42, 52.0, (0.85, -0.9, -0.5)), (0.62, 54.0, (1.1, 0.12, 0.3)))
    for start, frequency, (a, b, c) in families:
        width = ((darkness - start) / 0.45).clamp(0, 1)
        wave = torch.sin(frequency * (a * x + b * y + c * z) + wobble)
        stroke = torch.sigmoid((wave - 0.9 + 1.3 * width) / 0.35) * 0.42 * width**0.5
        ink = ink + (1 - ink) * stroke
    drawn = torch.zeros_like(ink)
    for name, strength in (("lips", 0.30), ("brow", 0.55), ("iris", 0.45), ("mouth", 0.60), ("glasses", 0.7)):
        drawn = torch.where(surface.segment == SEGMENT[name], strength, drawn)
    light = (surface.segment == SEGMENT["eye_white"]) & (surface.albedo.mean(-1) > 0.8)
    ink = torch.where(light, 0.4 * ink, torch.maximum(ink, drawn)).clamp(0, 0.95)[:, None]
    return ink.new_tensor([0.965, 0.945, 0.895]) * (1 - ink) + ink.new_tensor([0.17, 0.16, 0.20]) * ink


def _sketch_background(palette: Palette, u: Tensor, v: Tensor) -> Tensor:
    paper = u.new_tensor([0.965, 0.945, 0.895])
    return paper * (1.0 - 0.05 * (u * u + v * v))[:, None]


def _ukiyoe_recolour(palette: Palette) -> Palette:
    tone = palette.skin.mean(-1, True)
    cloth = palette.cloth
    warm = torch.sigmoid((cloth[:, :1] - cloth[:, 2:]) / 0.08)
    kimono = cloth.new_tensor([0.15, 0.26, 0.46]).lerp(cloth.new_tensor([0.64, 0.20, 0.15]), warm)
    return replace(
        palette,
        skin=cloth.new_tensor([0.97, 0.88, 0.75]) * (0.74 + 0.30 * tone),
        hair=palette.hair * 0.35 + cloth.new_tensor([0.05, 0.05, 0.08]),
        lips=cloth.new_tensor([[0.78, 0.19, 0.16]]),
        cloth=kimono,
        background=cloth.new_tensor([0.90, 0.82, 0.65]) * (0.88 + 0.14 * palette.background),
    )


def _ukiyoe_paint(surface: Surface, palette: Palette) -> Tensor:
    # Flat woodblock colours: a breath of shade only, and a wave pattern printed on the cloth.
    x, y, z = surface.points.unbind(-1)
    level = 0.91 + 0.09 * _step(surface.tone, 0.50, 0.04)
    row = torch.floor(y / 0.17)
    column = torch.atan2(x, z + 1.2) / 0.20 + 0.5 * row
    arc = (((torch.frac(column + 64) - 0.5) * 1.5) ** 2 + (torch.frac(y / 0.17 + 64) * 1.0) ** 2).sqrt()
    waves = _step(torch.sin(19 * arc), 0.45, 0.25)[:, None] * (surface.material == 2)[:, None]
    colour = surface.albedo + (palette.background * 1.02 - surface.albedo) * waves * 0.75
    return colour * level[:, None]


def _ukiyoe_background(palette: Palette, u: Tensor, v: Tensor) -> Tensor:
    # Bokashi: indigo at the top, wiped out towards the paper.
    wash = torch.sigmoid((-v - 0.55) / 0.13)[:, None]
    paper = palette.background * (1 - 0.04 * v)[:, None]
    return paper + (u.new_tensor([0.24, 0.40, 0.58]) - paper) * 0.85 * wash


def _watercolour_paint(surface: Surface, palette: Palette) -> Tensor:
    # Transparent pigment on white paper: Beer-Lambert, with pools, granulation and darker wet rims.
    pools, grain = _noise(surface.points, 4.0, 2.0), _noise(surface.points, 13.0)
    washes = 0.50 * _step(0.62 - surface.tone, 0.0, 0.05) + 0.45 * _step(0.95 - surface.tone + 0.08 * pools, 0.0, 0.06)
    rim = (1 - surface.facing) ** 3
    density = 0.48 + 0.62 * washes + 0.20 * pools + 0.07 * grain + 0.45 * rim
    drawn = (surface.segment >= SEGMENT["eye_white"]) & (surface.segment <= SEGMENT["brow"])
    density = torch.where(drawn, 0.95, density.clamp(0.22, 1.9))
    pigment = _saturate(surface.albedo, 1.35).clamp(0.03, 1)
    shadow = 1 + (pigment.new_tensor([0.86, 0.93, 1.10]) - 1) * washes[:, None].clamp(0, 1) * 0.7
    return pigment ** density[:, None] * shadow


def _watercolour_background(palette: Palette, u: Tensor, v: Tensor) -> Tensor:
    spread = torch.stack([u, v, 0.3 * u * v], -1)
    density = 0.85 * torch.exp(-(((u * u + v * v) / 0.95) ** 2)) * (0.72 + 0.35 * _noise(spread, 2.6, 5.0))
    paper = u.new_tensor([0.985, 0.98, 0.965])
    return paper * _saturate(palette.background, 1.7) ** density.clamp(0.02, 1.5)[:, None]


def _impasto_paint(surface: Surface, palette: Palette) -> Tensor:
    # Short thick strokes laid around the head (along the strands on hair), each with its own mixed colour.
    x, y, z = surface.points.unbind(-1)
    wobble = _noise(surface.points, 5.0)
    around = torch.atan2(x, z + 0.55) + 0.25 * torch.sin(3.1 * y + 0.7)
    height = y + 0.10 * torch.sin(4.0 * around + 1.0) + 0.045 * wobble
    on_hair = surface.material == 1
    along = torch.where(on_hair, 2.0 * y + 0.6 * z, 2.7 * around)
    across = torch.where(on_hair, 7.0 * around + 0.35 * wobble, 8.0 * height)
    row = torch.floor(across)
    along = along + _hash(row, 0.17) * 3 + 0.15 * wobble
    stroke = row * 7.0 + torch.floor(along) * 3.0
    value, warmth = _hash(stroke, 0.31) - 0.5, _hash(stroke, 0.73) - 0.5
    # Each stroke is a ridge of paint, lit from above; its ends are thin.
    ridge = torch.sin(2 * torch.pi * torch.frac(across + 64)) * torch.sin(torch.pi * torch.frac(along + 64)) ** 0.5
    light = surface.irradiance * surface.occlusion[:, None] ** 0.9
    values = light.mean(-1, True)
    mixed = (values * 5).round() / 5  # the painter mixes few values
    light = light * (0.45 + 0.55 * mixed / values.clamp(min=0.1)) * light.new_tensor([1.06, 1.02, 0.96])
    fine = (surface.segment >= SEGMENT["eye_white"]) & (surface.segment <= SEGMENT["brow"])
    amount = torch.where(fine, 0.2, 1.0)[:, None]
    swing = 0.20 * value[:, None] + 0.20 * warmth[:, None] * value.new_tensor([0.8, 0.0, -1.0])
    return _saturate(surface.albedo, 1.35) * light * (1 + amount * (swing + 0.06 * ridge[:, None]))


def _impasto_background(palette: Palette, u: Tensor, v: Tensor) -> Tensor:
    swirl = torch.stack([u + 0.25 * torch.sin(2.2 * v), v + 0.25 * torch.sin(2.0 * u + 1), u * v], -1)
    tone = _noise(swirl, 4.2, 2.0)[:, None]
    base = _saturate(palette.background, 1.8) * 0.80
    return base * (1 + 0.14 * tone) + 0.05 * tone.clamp(min=0) * u.new_tensor([1.0, 0.9, 0.3])


def _popart_recolour(palette: Palette) -> Palette:
    def vivid(colour: Tensor, floor: float) -> Tensor:
        # Pull the dominant channel up and the others down, as few printing inks would.
        top, low = colour.amax(-1, True), colour.amin(-1, True)
        return floor + (0.95 - floor) * (colour - low) / (top - low).clamp(min=0.12)

    hair = palette.hair.mean(-1, True)
    dark, fair = hair.new_tensor([0.10, 0.11, 0.26]), hair.new_tensor([0.99, 0.83, 0.16])
    strength = ((hair - 0.20) / 0.25).clamp(0, 1)
    return replace(
        palette,
        hair=dark.lerp(fair, strength),
        lips=hair.new_tensor([[0.89, 0.10, 0.18]]),
        cloth=vivid(palette.cloth, 0.12),
        background=vivid(palette.background, 0.38),
    )


def _popart_paint(surface: Surface, palette: Palette) -> Tensor:
    # Ben-Day dots grow with darkness, on the plane that the surface faces most.
    x, y, z = surface.points.unbind(-1)
    facing_x = surface.normals[:, 0].abs() > surface.normals[:, 2].abs()
    across = torch.where(facing_x, z, x)
    spacing = 0.098
    u, v = (across + y) / (2 * spacing) + 64, (across - y) / (2 * spacing) + 64
    from_centre = ((torch.frac(u) - 0.5) ** 2 + (torch.frac(v) - 0.5) ** 2).sqrt()
    tone, on_skin = surface.tone, surface.segment == SEGMENT["skin"]
    skin_tone = palette.skin.mean()
    shadow = _step(0.58 - tone, 0.0, 0.03)
    radius = (0.10 + 0.55 * (0.80 - tone).clamp(0, 1) + 0.22 * (0.85 - skin_tone)) * on_skin
    dots = _step(radius - from_centre, 0.0, 0.06) * on_skin
    darkness = ((0.80 - skin_tone) / 0.45).clamp(0, 1)
    pale = surface.albedo.new_tensor([1.0, 0.89, 0.78]).lerp(_saturate(palette.skin[0] * 1.15, 1.5), darkness)
    dot_ink = surface.albedo.new_tensor([0.94, 0.46, 0.38]).lerp(palette.skin[0] * 0.55, darkness)
    skin = pale + (dot_ink - pale) * (0.85 * dots)[:, None]
    flat = _saturate(surface.albedo, 1.4)
    hair = palette.hair * (1.0 + 0.35 * _step(tone, 0.90) - 0.45 * shadow)[:, None]
    hair = hair + surface.albedo.new_tensor([0.05, 0.10, 0.30]) * _step(tone, 0.85)[:, None] * (
        palette.hair.mean() < 0.4
    )
    colour = torch.where((surface.material == 1)[:, None], hair, flat * (1 - 0.30 * shadow)[:, None])
    return torch.where(on_skin[:, None], skin, colour)


def _popart_background(palette: Palette, u: Tensor, v: Tensor) -> Tensor:
    return palette.background.expand(len(u), 3) * (0.97 - 0.07 * v)[:, None]


_TABLE = {
    PLAIN: Style(_same, _plain_paint, _plain_background),
    ALBEDO: Style(_same, lambda surface, palette: surface.albedo, _plain_background),
    "toon": Style(_same, _toon_paint, _toon_background, 0.90, (0.06, 0.05, 0.08)),
    "sketch": Style(_same, _sketch_paint, _sketch_background, 0.85, (0.17, 0.16, 0.20)),
    "ukiyoe": Style(_ukiyoe_recolour, _ukiyoe_paint, _ukiyoe_background, 1.0, (0.10, 0.09, 0.12)),
    "watercolour": Style(_same, _watercolour_paint, _watercolour_background, 0.28, (0.28, 0.24, 0.32)),
    "impasto": Style(_same, _impasto_paint, _impasto_background),
    "popart": Style(_popart_recolour, _popart_paint, _popart_background, 1.0, (0.05, 0.04, 0.08)),
}
