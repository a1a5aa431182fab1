"""The true surface of a face, and the points on it that surfaces are aligned by."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from datamodules.mannequins.render import RIG, render
from datamodules.mannequins.scene import HAIR_STYLES, Scene
from datamodules.mannequins.shapes import EYE_HEIGHT, Knobs, distance, mouth, named
from models.metrics.scan import Scan

_FRONT = 2.0  # world units; nothing of a face lies before it
_STEPS = 1500  # of the march, for grazing rays; most are there after some ten
_FACTOR = 0.6  # distances are estimates; less than the tracer's factor, since a step too far is never taken back
_NEAR = 1e-7  # world units


def bare(scene: Scene) -> Scene:
    """The same heads without hair and glasses: what a scanner of faces sees under a cap."""
    traits = dict(scene.traits)
    for name in (*HAIR_STYLES, "glasses"):
        traits[name] = torch.full_like(traits[name], float(name == "bald"))
    return replace(scene, traits=traits)


def keypoints(scene: Scene) -> Tensor:
    """The corners of eyes and mouth and the base of the nose, in NoW's order (:data:`models.metrics.scan.KEYPOINTS`).

    They are where the face is painted and formed, with its expression and exaggeration, on the first surface that is
    met from the front: hair or glasses where these lie before the skin (:func:`bare` takes them off).

    Returns:
        (B, 7, 3) world points, float64.
    """
    return torch.stack([_on_surface(knob, _places(knob)) for knob in _heads(scene)])


def face_scan(scene: Scene, size: int = 128) -> Scan:
    """The surface of one head as the front sees it, a point for each pixel of a picture of ``size`` x ``size``.

    Raises:
        ValueError: when the scene does not hold one head.
    """
    if len(scene) != 1:
        raise ValueError(f"a scan is of one head, got {len(scene)}")
    camera = RIG.camera(0.0)
    truth = render(scene, camera, size, supersample=1)  # one sample a pixel: its depth is of its middle
    origins, directions = camera.rays(size)
    points = origins + truth.depth.flatten(2).mT * directions
    return Scan(points[0][truth.mask.flatten() > 0.5], keypoints(scene)[0])


def _heads(scene: Scene) -> list[Knobs]:
    return [named(row.tolist()) for row in scene.parameters().double()]


def _places(knob: Knobs) -> Tensor:
    """(7, 2) x and y of the keypoints."""
    unit = knob["eye_size"] * 1.15  # half width of an eye, as it is painted
    corner = 0.6 * knob["eye_tilt"] * unit  # how much higher the outer corner is than the middle
    outer, inner = (knob["eye_spacing"] + unit, EYE_HEIGHT + corner), (knob["eye_spacing"] - unit, EYE_HEIGHT - corner)
    # Where the underside of the nose meets the lip: below the ball of the tip, see shapes.skin.
    nose = -0.19 + knob["nose_lift"] - 0.085 * knob["nose_width"] ** 0.5 - 0.02
    zero = torch.zeros(1, dtype=torch.float64)
    half_width = mouth(knob, zero, zero).half_width
    lips = -float(mouth(knob, zero + half_width, zero).height)  # height is y above the corner
    right = [(-outer[0], outer[1]), (-inner[0], inner[1])]
    places = [*right, inner, outer, (0.0, nose), (-half_width, lips), (half_width, lips)]
    x, y = torch.tensor(places, dtype=torch.float64).unbind(1)
    # The inverse of shapes.head_space.
    long_face = knob["long_face"]
    y = torch.where(y < 0.2, 0.2 + (y - 0.2) * (1 + 0.20 * long_face), y)
    step = ((y - 0.5) / (-0.4 - 0.5)).clamp(0, 1)
    return torch.stack([x / (1 + 0.14 * long_face * step * step * (3 - 2 * step)), y], 1)


def _on_surface(knob: Knobs, places: Tensor) -> Tensor:
    """(N, 3) first points of the head that are met from the front along z, at places (N, 2)."""
    z = torch.full_like(places[:, 0], _FRONT)
    for _ in range(_STEPS):
        free = distance(knob, torch.stack([*places.unbind(1), z]))
        if float(free.abs().max()) < _NEAR:
            break
        z = z - _FACTOR * free
    return torch.cat([places, z[:, None]], 1)
