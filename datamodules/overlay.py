"""A sheet to judge aligned pictures by at a glance: crop, points, axes of the head, name, remarks."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from datamodules.framing import Framed
from models.errors import printable
from models.files import atomic_write
from models.image import resized, to_uint8

SIDE, CAPTION, COLUMNS = 256, 62, 6  # of a tile, of what is written below it, of the sheet
_MESH, _FIVE, _REMARK, _BACK = (80, 255, 120), (255, 230, 0), (255, 140, 90), (24, 24, 24)
_AXES = ((255, 60, 60), (60, 220, 60), (90, 140, 255))  # x, y and z of the head


def tile(framed: Framed, name: str) -> Image.Image:
    """One picture's tile."""
    picture = Image.new("RGB", (SIDE, SIDE + CAPTION), _BACK)
    picture.paste(Image.fromarray(to_uint8(resized(framed.image[None], SIDE)[0])))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    if framed.points is not None:
        draw.point([(x, y) for x, y in (framed.points * SIDE).tolist() if y < SIDE], fill=_MESH)
    if framed.five is not None:
        five = framed.square.to_frame(framed.five) * SIDE
        for x, y in five.tolist():
            if y < SIDE:
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), outline=_FIVE)
        if framed.camera is not None:
            right, down = framed.camera.cam2world[0, :3, :2].T
            start = five[2]
            for axis, colour in zip(torch.eye(3), _AXES, strict=True):
                end = start + 50 * torch.stack([axis @ right, axis @ down])
                draw.line([*start.tolist(), *end.tolist()], fill=colour, width=2)
    told = "no pose"
    if framed.angles is not None:
        yaw, pitch = map(math.degrees, framed.angles)
        told = f"yaw {yaw:.0f}  pitch {pitch:.0f}  roll {math.degrees(framed.square.angle):.0f}"
    draw.rectangle((0, SIDE, SIDE, SIDE + CAPTION), fill=_BACK)
    draw.text((4, SIDE + 2), printable(name)[:44], font=font)
    draw.text((4, SIDE + 16), told, font=font, fill=(180, 180, 180))
    remarks = textwrap.wrap("; ".join(framed.warnings), 46)[:2]
    for row, line in enumerate(remarks):
        draw.text((4, SIDE + 32 + 14 * row), printable(line), font=font, fill=_REMARK)
    return picture


def write_sheet(path: Path, tiles: Sequence[Image.Image]) -> None:
    """Tiles in rows, as a PNG."""
    columns = min(COLUMNS, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (columns * SIDE, rows * (SIDE + CAPTION)), _BACK)
    for number, picture in enumerate(tiles):
        row, column = divmod(number, columns)
        sheet.paste(picture, (column * SIDE, row * (SIDE + CAPTION)))
    with atomic_write(path) as half:
        sheet.save(half)
