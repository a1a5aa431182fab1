"""Attributes of heads, measured in pictures of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.errors import UserError, shown
from models.faces.reader import LEFT_EYE, RIGHT_EYE
from models.features.landmarks import FaceLandmarks

_MOUTH_CORNERS, _INNER_LIPS = (61, 291), (13, 14)
_BROWS = ((105, 159), (334, 386))  # the middle of each brow, and the lid below it
_SMALLEST = 192  # side at which faces are looked for, pixels


class SegmentShares(nn.Module):
    """Shares of the picture that parts of a head take, from 0 to 1.

    Args:
        parser: a face parser (:class:`models.features.base.FaceParser`).
        parts: names of its segments; all but the background when None.

    Raises:
        UserError: for a part that the parser does not know.
    """

    def __init__(self, parser: nn.Module, parts: list[str] | None = None) -> None:
        super().__init__()
        self.parser = parser
        segments: tuple[str, ...] = parser.segments  # type: ignore[assignment]
        self.names = tuple(parts or (name for name in segments if name != "background"))
        if unknown := [name for name in self.names if name not in segments]:
            raise UserError(f"the parser knows no {shown(unknown[0])}, it knows: {', '.join(segments)}")
        self.rows = [segments.index(name) for name in self.names]

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, parts)."""
        return self.parser(image).float().softmax(1)[:, self.rows].mean((2, 3))


class HeadPose(nn.Module):
    """Where a head looks: the camera's ``yaw`` and ``pitch``, radians, with the signs of :mod:`models.camera`.

    Args:
        pose: a pose estimator (:class:`models.features.base.PoseEstimator`).
    """

    names = ("yaw", "pitch")

    def __init__(self, pose: nn.Module) -> None:
        super().__init__()
        self.pose = pose

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 2)."""
        return self.pose(image).float()


class Tones(nn.Module):
    """What a picture is like as a whole: ``bright``, its mean luminance, and ``warm``, its mean red less its mean blue.

    In the picture's own units, from -1 to 1, and from -2 to 2.
    """

    names = ("bright", "warm")

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 2)."""
        red, green, blue = image.float().mean((2, 3)).unbind(1)
        return torch.stack([0.299 * red + 0.587 * green + 0.114 * blue, red - blue], 1)


class FaceMeasures(nn.Module):
    """Expressions of people, measured between the points of their faces.

    ``smile``: width of the mouth, and how far its corners are above the lip's middle; ``mouth_open``: gap of the lips;
    ``blink``: how closed the eyes are; ``brow_raise``: brows above the lids. All in units of the distance between the
    eyes' outer corners, in the face's own axes; NaN where no face is found.

    Args:
        landmarks: finds the points; MediaPipe's by default.
    """

    names = ("smile", "mouth_open", "blink", "brow_raise")

    def __init__(self, landmarks: FaceLandmarks | None = None) -> None:
        super().__init__()
        self.landmarks = landmarks or FaceLandmarks()

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 4)."""
        rows = []
        for picture in image:
            points = self.landmarks.find(_large(picture[None].float()))
            rows.append(torch.full((4,), math.nan, device=image.device) if points is None else measures(points))
        return torch.stack(rows)


def _large(image: Tensor) -> Tensor:
    side = image.shape[-1]
    if side >= _SMALLEST:
        return image
    size = (_SMALLEST, _SMALLEST)
    return nn.functional.interpolate(image, size, mode="bicubic", align_corners=False).clamp(-1, 1)


def measures(points: Tensor) -> Tensor:
    """Points (468, 3) of a face, x right, y down -> (4,), see :class:`FaceMeasures`."""
    across = points[LEFT_EYE[3]] - points[RIGHT_EYE[0]]  # between the outer corners
    unit = across.norm()
    across = across / unit
    down = points[152] - points[10]  # from the forehead to the chin
    down = down - (down @ across) * across
    down = down / down.norm()

    def drop(one: Tensor, other: Tensor) -> Tensor:
        """How far the second lies below the first."""
        return (other - one) @ down / unit

    corner_right, corner_left = (points[i] for i in _MOUTH_CORNERS)
    upper, lower = (points[i] for i in _INNER_LIPS)
    width = (corner_left - corner_right).norm() / unit
    lift = drop((corner_right + corner_left) / 2, upper)
    opening = []
    for eye in (RIGHT_EYE, LEFT_EYE):
        corner, first, second, other, below_second, below_first = (points[i] for i in eye)
        height = ((first - below_first).norm() + (second - below_second).norm()) / 2
        opening.append(height / (corner - other).norm())
    raised = [drop(points[brow], points[lid]) for brow, lid in _BROWS]
    return torch.stack([width + lift, drop(upper, lower), -torch.stack(opening).mean(), torch.stack(raised).mean()])
