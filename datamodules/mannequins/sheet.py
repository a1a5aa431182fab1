"""A contact sheet of the embedded world."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from datamodules.mannequins.render import RIG, Truth, render
from datamodules.mannequins.scene import EXAGGERATIONS, EXPRESSIONS, SPLITS, Scene, subject_z
from datamodules.mannequins.styles import STYLES
from models.segments import SEGMENTS

# One colour for each segment, easy to tell apart.
_SEGMENT_COLOURS = (
    (20, 20, 24), (240, 190, 160), (255, 255, 255), (60, 130, 210), (210, 60, 80), (90, 20, 40),
    (100, 70, 50), (150, 110, 70), (80, 160, 90), (130, 90, 190), (250, 210, 60),
)  # fmt: skip


def segment_colours(segmentation: Tensor) -> Tensor:
    """Segmentations (B, H, W) as pictures (B, 3, H, W) in [-1, 1]."""
    table = torch.tensor(_SEGMENT_COLOURS[: len(SEGMENTS)], device=segmentation.device) / 127.5 - 1
    return table[segmentation.long()].permute(0, 3, 1, 2)


def depth_picture(truth: Truth) -> Tensor:
    """Depth as grey pictures (B, 3, H, W) in [-1, 1], near is bright."""
    nearness = ((RIG.radius + 1.4 - truth.depth) / 2.4).clamp(0, 1) * (truth.mask > 0)
    return (nearness * 2 - 1).expand(-1, 3, -1, -1)


def contact_sheet(size: int = 128, columns: int = 8, compiled: bool = False) -> Tensor:
    """(3, H, W) in [-1, 1]: identities, an orbit, expressions, styles, exaggerations and ground truth."""
    subjects = Scene.from_z(subject_z(SPLITS["test"][: 2 * columns]))
    angles = torch.linspace(-0.7, 0.7, columns)
    rows = [
        render(subjects[:columns], RIG.camera(angles.roll(3).reshape(2, -1).T.flatten()), size, compiled=compiled),
        render(subjects[columns:], RIG.camera(angles.flip(0) * 0.7, 0.15 * angles), size, compiled=compiled),
        render(
            subjects[3].repeat_interleave(columns),
            RIG.camera(torch.linspace(-1, 1, columns) * math.radians(60), torch.linspace(1, -1, columns) * 0.2),
            size,
            compiled=compiled,
        ),
    ]
    pictures = [row.image for row in rows]
    faces = torch.cat([torch.zeros(1, len(EXPRESSIONS)), torch.eye(len(EXPRESSIONS))])
    both = torch.zeros(1, len(EXPRESSIONS))
    both[0, [EXPRESSIONS.index("smile"), EXPRESSIONS.index("mouth_open")]] = 1
    faces = torch.cat([faces, both])[:columns]
    for who, yaw in ((1, 0.0), (6, 0.45)):
        heads = subjects[who].repeat_interleave(len(faces)).with_expression(faces)
        pictures.append(render(heads, RIG.camera(yaw), size, compiled=compiled).image)
    for who, yaw in ((0, -0.4), (4, 0.3), (10, 0.0)):
        heads = subjects[who].repeat_interleave(len(STYLES))
        drawn = render(heads, RIG.camera(yaw), size, STYLES, compiled=compiled).image
        exaggerated = subjects[who].exaggerate(EXAGGERATIONS[who % 2])
        pictures += [drawn, render(exaggerated, RIG.camera(yaw), size, compiled=compiled).image]
    for who, yaw in ((2, 0.5), (7, -0.3)):
        truth = render(subjects[who], RIG.camera(yaw), size, compiled=compiled)
        maps = [depth_picture(truth), truth.normals, truth.mask.expand(-1, 3, -1, -1) * 2 - 1]
        pictures += [truth.image, *maps, segment_colours(truth.segmentation)]
    tiles = torch.cat(pictures)
    tiles = torch.cat([tiles, tiles.new_ones(-len(tiles) % columns, 3, size, size)])
    tiles = torch.nn.functional.pad(tiles, (1, 1, 1, 1), value=1.0).reshape(-1, columns, 3, size + 2, size + 2)
    return tiles.permute(2, 0, 3, 1, 4).reshape(3, -1, columns * (size + 2))


def save_picture(picture: Tensor, path: Path) -> None:
    """Write one RGB picture (3, H, W) in [-1, 1] as 8-bit PNG (or what the suffix says)."""
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(path)
