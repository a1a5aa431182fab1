"""Pictures made of renderings: enlargements, colour maps, captioned sheets, and a camera drawn on an artwork.

Images are RGB (3, H, W) in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from models.camera import Camera, Rig
from models.image import to_uint8

PAPER = (250, 249, 246)
INK = (58, 56, 52)
FAINT = (150, 146, 138)
AXES = ((214, 69, 65), (46, 139, 87), (52, 103, 200))  # x, y, z
# Turbo (Mikhailov, 2019) at nine places: even enough by eye between them.
_TURBO = (
    *((48, 18, 59), (70, 107, 227), (40, 187, 236), (49, 242, 153), (162, 252, 60)),
    *((237, 208, 58), (251, 128, 34), (210, 49, 5), (122, 4, 3)),
)


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(to_uint8(image))


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def enlarge(images: Tensor, size: int) -> Tensor:
    """Images (..., 3, H, W) resized to (..., 3, size, size) by Lanczos' filter."""
    flat = images.reshape(-1, *images.shape[-3:])
    if images.shape[-2:] == (size, size):
        return images
    frames = [_tensor(_picture(image).resize((size, size), Image.Resampling.LANCZOS)) for image in flat]
    return torch.stack(frames).reshape(*images.shape[:-2], size, size)


def depth_colours(depth: Tensor, alpha: Tensor) -> Tensor:
    """Depth maps (B, 1, H, W) in colour on white, from near (warm) to far (cool); one scale for the batch."""
    solid = depth[alpha > 0.5]
    if solid.numel() == 0:
        return torch.ones_like(depth).expand(-1, 3, -1, -1)
    near, far = (float(torch.quantile(solid[:: max(1, solid.numel() // 50_000)], q)) for q in (0.01, 0.99))
    place = ((far - depth) / max(far - near, 1e-6)).clamp(0, 1) * (len(_TURBO) - 1)
    table = torch.tensor(_TURBO, device=depth.device) / 127.5 - 1
    low = place.floor().clamp(0, len(_TURBO) - 2)
    colour = torch.lerp(table[low.long()], table[low.long() + 1], (place - low)[..., None])
    return over_white(colour[:, 0].movedim(-1, 1), alpha)


def normal_colours(normals: Tensor, alpha: Tensor, camera: Camera) -> Tensor:
    """World normals (B, 3, H, W) in the usual colours (right red, up green, towards the viewer blue), on white."""
    local = torch.einsum("bji,bjhw->bihw", camera.cam2world[:, :3, :3], normals)
    return over_white(local * local.new_tensor([1.0, -1.0, -1.0])[:, None, None], alpha)


def over_white(image: Tensor, alpha: Tensor) -> Tensor:
    """``image`` where ``alpha`` is 1, white where it is 0."""
    return image * alpha + (1 - alpha)


def sheet(rows: Sequence[Sequence[tuple[str, Tensor | None]]], tile: int = 192, labels: Sequence[str] = ()) -> Tensor:
    """Rows of captioned pictures on paper.

    Args:
        rows: of (caption, image (3, H, W) square, or ``None`` for an empty place).
        tile: side of each picture in the sheet, pixels.
        labels: written above each row, where not empty.
    """
    gap, caption = max(tile // 24, 4), max(tile // 9, 13)
    heading = caption + gap
    heights = [tile + caption + gap + (heading if i < len(labels) and labels[i] else 0) for i in range(len(rows))]
    width = gap + max(map(len, rows)) * (tile + gap)
    page = Image.new("RGB", (width, sum(heights) + gap), PAPER)
    pen = ImageDraw.Draw(page)
    small, large = ImageFont.load_default(caption * 0.62), ImageFont.load_default(caption * 0.75)
    y = gap
    for i, row in enumerate(rows):
        if i < len(labels) and labels[i]:
            pen.text((gap, y + heading / 2), labels[i], INK, large, anchor="lm")
            y += heading
        for j, (text, image) in enumerate(row):
            x = gap + j * (tile + gap)
            if image is not None:
                page.paste(_picture(image).resize((tile, tile), Image.Resampling.LANCZOS), (x, y))
                pen.text((x + tile / 2, y + tile + caption / 2), text, FAINT, small, anchor="mm")
        y += tile + caption + gap
    return _tensor(page)


def stacked_lines(frames: Tensor, alpha: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """One image row over a sweep of the camera: a consistent head draws smooth tilted strips (GRAM, Fig. 6).

    The row is the one with the most contrast on the head, of the middle half of the picture.

    Args:
        frames: (T, 3, H, W), the middle one from the front. alpha: (T, 1, h, w).
        side: of the results, pixels.

    Returns:
        the middle frame with the row marked, and the stack, the first frame's row on top: both (3, side, side).
    """
    front, quarter = len(frames) // 2, frames.shape[-2] // 4
    middle, solid = frames[front], F.interpolate(alpha[front][None], frames.shape[-2:])[0, 0]
    contrast = middle.diff(dim=-1).abs().sum(0) * (solid[:, 1:] > 0.9)
    row = quarter + int(contrast.sum(1)[quarter:-quarter].argmax())
    marked = _picture(enlarge(middle, side))
    y = (row + 0.5) * side / frames.shape[-2]
    ImageDraw.Draw(marked).line([(0, y), (side, y)], (232, 155, 38), max(side // 100, 2))
    return _tensor(marked), enlarge(frames[:, :, row].transpose(0, 1), side)


def pose_overlay(artwork: Tensor, rig: Rig, camera: Camera, outline: Tensor | None = None, size: int = 384) -> Tensor:
    """A camera drawn on the artwork it was estimated for, so that a wrong one is seen.

    Args:
        artwork: (3, H, W), square.
        rig: its pivot is where the head's axes start: x red, y green, and z, where the face looks, blue.
        camera: of the artwork, one.
        outline: (1, h, w) opacity of the head rendered with that camera, drawn as a contour.
        size: side of the result, pixels.
    """
    page = _picture(artwork).resize((size, size), Image.Resampling.LANCZOS)
    # A little paler, so that the lines stand out.
    page = Image.blend(page, Image.new("RGB", page.size, PAPER), 0.18)
    pen = ImageDraw.Draw(page)
    stroke = max(size // 120, 2)
    half = 0.23 * rig.radius / rig.focal
    pivot = torch.tensor(rig.pivot)
    corners = torch.tensor([[x, y, z] for z in (-1.0, 1.0) for y in (-1.0, 1.0) for x in (-1.0, 1.0)])
    box = _pixels(camera, pivot + half * corners * torch.tensor([0.85, 1.15, 0.9]), size)
    for a in range(8):
        for b in (a | 1, a | 2, a | 4):
            if a != b:
                pen.line([box[a], box[b]], (255, 255, 255), stroke + 2)
                pen.line([box[a], box[b]], INK if b >= 4 and a >= 4 else FAINT, max(stroke // 2, 1))
    if outline is not None:
        from skimage.measure import find_contours  # here: slow to import

        scale = size / outline.shape[-1]
        for contour in find_contours(np.pad(outline[0].cpu().numpy(), 1), 0.5):
            points = [((x - 0.5) * scale, (y - 0.5) * scale) for y, x in contour]
            pen.line(points, (255, 255, 255), stroke + 2, joint="curve")
            pen.line(points, (232, 155, 38), stroke, joint="curve")
    ends = _pixels(camera, pivot + torch.cat([torch.zeros(1, 3), 1.35 * half * torch.eye(3)]), size)
    # The axis that points most towards the viewer is drawn last.
    towards = -(camera.forward[0].cpu() @ torch.eye(3))
    font, halo = ImageFont.load_default(size / 20), {"anchor": "mm", "stroke_width": 3, "stroke_fill": (255, 255, 255)}
    for axis in towards.argsort().tolist():
        _arrow(pen, ends[0], ends[axis + 1], AXES[axis], stroke + 1)
        pen.text(_beyond(ends[0], ends[axis + 1], 4 * stroke), "xyz"[axis], AXES[axis], font, **halo)
    yaw, pitch = (round(math.degrees(float(angle))) for angle in (camera.yaw, camera.pitch))
    pen.text((size / 2, size - size / 24), f"yaw {yaw:+d}°   pitch {pitch:+d}°", INK, font, **halo)
    return _tensor(page)


Point = tuple[float, float]


def _pixels(camera: Camera, points: Tensor, size: int) -> list[Point]:
    uv = camera.to("cpu").project(points[None])[0][0] * size
    return [(float(u), float(v)) for u, v in uv]


def _beyond(start: Point, end: Point, distance: float) -> Point:
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = math.hypot(dx, dy) or 1.0
    return end[0] + dx / length * distance, end[1] + dy / length * distance


def _arrow(pen: ImageDraw.ImageDraw, start: Point, end: Point, colour: tuple[int, int, int], stroke: int) -> None:
    pen.line([start, end], (255, 255, 255), stroke + 3)
    pen.line([start, end], colour, stroke)
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    wings = [
        (end[0] - 4 * stroke * math.cos(angle + turn), end[1] - 4 * stroke * math.sin(angle + turn))
        for turn in (0.5, -0.5)
    ]
    pen.polygon([end, *wings], colour)
