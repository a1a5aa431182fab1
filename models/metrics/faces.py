"""What a reader of faces sees of a head whose truth nobody knows: where it looks, and what its face does.

The protocol ``portrait-faces``. Points are MediaPipe's 468 in pictures of 128 pixels; lengths are in distances between
the outer corners of the eyes. The reader itself is not exact: on the artwork, animated with everything else at rest, it
sees the rest of the face move by .005 to .045.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.camera import Camera
from models.faces.pose import yaw_pitch_roll
from models.features.base import FacePoints
from models.generators.base import Generator
from models.image import resized
from models.latents import Latents
from models.losses.landmarks import eye_distance, landmark_distance
from models.metrics.portrait import Score

SIDE = 128
YAWS_DEG = (-36, -24, -12, 0, 12, 24, 36)
NEAR_DEG = 24  # up to which the slope is fitted

_LIDS = (
    (159, 145), (158, 153), (160, 144), (157, 154), (161, 163),
    (386, 374), (385, 380), (387, 373), (384, 381), (388, 390),
)  # fmt: skip
_MOUTH_GAP, _MOUTH_WIDTH = ((13, 14),), ((61, 291),)
_EYES = (
    33, 246, 161, 160, 159, 158, 157, 173, 133, 155, 154, 153, 145, 144, 163, 7,
    263, 466, 388, 387, 386, 385, 384, 398, 362, 382, 381, 380, 374, 373, 390, 249,
)  # fmt: skip
_BROWS = (70, 63, 105, 66, 107, 336, 296, 334, 293, 300)
_NOSE = (1, 2, 4, 5, 6, 19, 94, 97, 168, 195, 197, 326)
_LIPS = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 185, 40, 39, 37, 0, 267, 269, 270, 409)


@dataclass(frozen=True)
class Expected:
    """What an expression does.

    Attributes:
        pairs: of points, between which it is measured; the mean of their distances.
        ratio: it is told relative to the neutral face, otherwise as the difference from it.
        least: the measure that it must be beyond to be one at all.
        rest: points that stay.
        says: what it does, for people.
    """

    pairs: tuple[tuple[int, int], ...]
    ratio: bool
    least: float
    rest: tuple[int, ...]
    says: str

    def missing(self, measure: float, rest: float) -> str:
        """Why a face has no such expression, by :func:`expression_scores`; "" for one that has it."""
        if math.isnan(rest):
            return "no face is seen to judge it by"
        if not (measure < self.least if self.ratio else measure > self.least):
            return self.says.format(measure)
        return "" if rest < MOST_REST else f"the rest of the face moves by {rest:.2f} of the eyes' distance"


_TOP = (*_EYES, *_BROWS, *_NOSE)
MOST_REST = 0.12
EXPECTED = {
    "blink": Expected(_LIDS, True, 0.8, (*_LIPS, *_NOSE), "the eyes only close to {:.2f} of their opening"),
    "mouth_open": Expected(_MOUTH_GAP, False, 0.06, _TOP, "the mouth only opens by {:.2f} of the eyes' distance"),
    "smile": Expected(_MOUTH_WIDTH, False, 0.02, _TOP, "the mouth widens by {:.2f} of the eyes' distance"),
}
"""By the name of an expression, of those that points can tell. The mesh reads drawn closed eyes as half open."""


def expression_scores(name: str, neutral: Tensor | None, face: Tensor | None) -> tuple[float, float]:
    """How far an expression has gone, and the mean by which the rest of the face has moved.

    Args:
        name: of :data:`EXPECTED`.
        neutral: (468, 2 or 3) the points without it. face: with it. None: no face is found, which nothing has become.

    Returns:
        the measure, in eye distances or relative to the neutral face's; and eye distances, NaN without a face.
    """
    expected = EXPECTED[name]
    if neutral is None or face is None:
        return float(expected.ratio), math.nan
    eyes = float(eye_distance(neutral[None]))
    before, after = (_mean(points, expected.pairs) / eyes for points in (neutral, face))
    moved = (face[list(expected.rest), :2] - neutral[list(expected.rest), :2]).norm(dim=1).mean() / eyes
    return after / max(before, 1e-6) if expected.ratio else after - before, float(moved)


def _mean(points: Tensor, pairs: Sequence[tuple[int, int]]) -> float:
    a, b = zip(*pairs, strict=True)
    return float((points[list(a), :2] - points[list(b), :2]).norm(dim=1).mean())


def _seen(generator: Generator, ws: Latents, camera: Camera, expression: Tensor, faces: FacePoints) -> Tensor | None:
    """The points (468, 3) of a head's face from a camera, None where no face is found."""
    size = SIDE if generator.free_resolution else None
    code = expression if expression.shape[1] else None
    return faces.find(resized(generator.synthesis(ws, camera, expression=code, resolution=size).image, SIDE))


@torch.no_grad()
def measured_expressions(
    generator: Generator, ws: Latents, expression: Tensor, faces: FacePoints, neutral: Tensor | None = None
) -> dict[str, tuple[float, float]]:
    """:func:`expression_scores` of those expressions of a head that points can tell, seen from the front.

    Args:
        generator, ws, expression, faces: as of :func:`score_faces`.
        neutral: (468, 3) the points without any, where they are known.
    """
    front = generator.rig.camera(0.0, 0.0, expression.device)
    names = [name for name in EXPECTED if name in generator.expressions]
    if neutral is None and names:
        neutral = _seen(generator, ws, front, expression, faces)
    found: dict[str, tuple[float, float]] = {}
    for name in names:
        code = expression.clone()
        code[0, generator.expressions.index(name)] += 1
        found[name] = expression_scores(name, neutral, _seen(generator, ws, front, code, faces))
    return found


@torch.no_grad()
def score_faces(
    generator: Generator, ws: Latents, expression: Tensor, camera: Camera, artwork: Tensor, faces: FacePoints
) -> list[Score]:
    """Scores of one head: points at the artwork's view, yaw over yaw asked at pitch 0, expressions from the front.

    Args:
        generator: the head's. ws: (1, n, w). expression: (1, E) its own, E = 0 where it cannot animate.
        camera: of the artwork. artwork: (1, 3, H, W) in [-1, 1].
        faces: the reader.
    """
    scores = []
    wanted, own = faces.find(resized(artwork, SIDE)), _seen(generator, ws, camera, expression, faces)
    scores.append(Score("input", "face_found", True, float(own is not None)))
    if wanted is not None and own is not None:
        scores.append(Score("input", "points", True, float(landmark_distance(own[None], wanted[None]))))
    seen: dict[float, float] = {}
    neutral = None
    for yaw in YAWS_DEG:
        view = generator.rig.camera(math.radians(yaw), 0.0, expression.device)
        face = _seen(generator, ws, view, expression, faces)
        scores.append(Score(f"yaw={yaw}", "face_found", True, float(face is not None)))
        if face is not None:
            turn = yaw_pitch_roll(faces.canonical.head_pose(face[None]))[0]
            seen[yaw] = math.degrees(float(turn))
        if yaw == 0:
            neutral = face
    farthest = max(YAWS_DEG)
    scores.append(Score("", f"found_{farthest}", True, sum(yaw in seen for yaw in (-farthest, farthest)) / 2))
    if 0 in seen:
        scores.append(Score("", "yaw_offset_deg", True, abs(seen[0])))
    near = {yaw: value for yaw, value in seen.items() if abs(yaw) <= NEAR_DEG}
    if len(near) > 2:
        x, y = torch.tensor([list(near), list(near.values())])
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        scores.append(Score("", "yaw_slope", True, float(slope)))
    for name, (measure, rest) in measured_expressions(generator, ws, expression, faces, neutral).items():
        scores += [Score("front", name, True, measure), Score("front", f"{name}_rest", True, rest)]
    return scores
