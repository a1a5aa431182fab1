"""Marks painted on photos: edits that a one-pass inversion carries into every view (GRAMInverter, Sec. 4.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

KINDS = ("line", "spot", "glasses")
FINE = 4  # samples per pixel and axis

Place = tuple[float, float]
"""Column and row in the picture, both in [0, 1]."""


def paint_mark(
    photo: Tensor,
    kind: str,
    places: Sequence[Place],
    colour: Sequence[float] = (0.7, -0.8, -0.7),
    width: float = 0.025,
    radius: float = 0.08,
) -> Tensor:
    """A copy of a photo (..., 3, H, W) in [-1, 1] with a mark on it, its borders smooth.

    Args:
        kind: "line" through the places, a "spot" at each, or "glasses": rings around two of them, and a bridge.
        colour: RGB in [-1, 1].
        width: of a line or a spot, in picture widths. radius: of a ring, likewise.

    Raises:
        ValueError: for an unknown kind, or a number of places that it does not take.
    """
    if kind not in KINDS:
        raise ValueError(f"a mark is one of {KINDS}, got {kind!r}")
    least, more = (1 if kind == "spot" else 2), kind != "glasses"
    if len(places) < least or (len(places) > least and not more):
        raise ValueError(f"{kind} takes {least}{' or more' * more} places, got {len(places)}")
    rows, columns = photo.shape[-2:]
    cover = Image.new("L", (columns * FINE, rows * FINE))
    pen, stroke, reach = ImageDraw.Draw(cover), max(round(width * cover.width), 1), radius * cover.width
    points = [(x * cover.width, y * cover.height) for x, y in places]
    if kind == "spot":
        for x, y in points:
            pen.ellipse((x - stroke / 2, y - stroke / 2, x + stroke / 2, y + stroke / 2), fill=255)
    elif kind == "line":
        pen.line(points, 255, stroke, joint="curve")
    else:
        for x, y in points:
            pen.ellipse((x - reach, y - reach, x + reach, y + reach), outline=255, width=stroke)
        (left, y), (right, z) = sorted(points)
        pen.line([(left + reach, y), (right - reach, z)], 255, stroke)
    small = cover.resize((columns, rows), Image.Resampling.BOX)
    opacity = torch.from_numpy(np.array(small)).to(photo) / 255
    return torch.lerp(photo, photo.new_tensor(list(colour))[:, None, None].expand_as(photo), opacity)


def random_marks(count: int, share: float, generator: torch.Generator) -> list[Callable[[Tensor], Tensor]]:
    """For each of ``count`` photos what paints on it (3, H, W): what no prior knows, yet a photo may show.

    Args:
        share: probability of a mark on each photo; the others are left as they are.
        generator: CPU generator of all draws.
    """

    def uniform(count: int, low: float, high: float) -> list[float]:
        return (low + (high - low) * torch.rand(count, generator=generator)).tolist()

    def mark() -> Callable[[Tensor], Tensor]:
        kind = KINDS[int(torch.randint(len(KINDS), (), generator=generator))]
        x, y = uniform(2, 0.3, 0.7)
        near = uniform(4, -0.25, 0.25)
        places = {
            "spot": [(x, y)],
            "line": [(x, y), (x + near[0], y + near[1]), (x + near[2], y + near[3])],
            "glasses": [(x - 0.1, y), (x + 0.1, y)],
        }
        (width,), (radius,) = uniform(1, 0.025, 0.09), uniform(1, 0.06, 0.09)
        colour = uniform(3, -1, 1)
        return partial(paint_mark, kind=kind, places=places[kind], colour=colour, width=width, radius=radius)

    chosen = torch.rand(count, generator=generator) < share
    return [mark() if marked else _unmarked for marked in chosen]


def _unmarked(photo: Tensor) -> Tensor:
    return photo
