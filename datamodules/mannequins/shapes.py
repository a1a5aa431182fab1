"""The geometry of a head: a signed distance field of about 25 smooth primitives.

World units: y up, the face looks along +z, x to the viewer's right. The skull is about 1.5 wide and the
head reaches from the chin at y = -0.9 to the crown at y = 1.05. ``side`` is |x|: most parts are symmetric.
Distances are first-order estimates, scaled by the tracer's step factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from datamodules.mannequins.scene import PARAMETERS

EYE_HEIGHT = 0.06
MOUTH_HEIGHT = -0.46
ABSENT = 10.0  # added to the distance of a part that a head does not have
MATERIALS = ("skin", "hair", "cloth", "glasses")

Knobs = dict[str, Any]  # name -> float; scalar tensor in a compiled kernel, (B, 1) of many heads


def named(parameters: Tensor | list[float]) -> Knobs:
    """Name the len(PARAMETERS) numbers of one head, or of many (len(PARAMETERS), B, 1), eyes already exaggerated.

    Plain floats make eager evaluation twice as fast as scalar tensors do.
    """
    values = parameters.unbind(0) if isinstance(parameters, Tensor) else parameters
    knob: Knobs = dict(zip(PARAMETERS, values, strict=True))
    knob["eye_size"] = knob["eye_size"] * (1 + 0.50 * knob["big_eyes"])
    knob["eye_spacing"] = knob["eye_spacing"] + 0.055 * knob["big_eyes"]
    return knob


def head_space(knob: Knobs, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Undo the long-face exaggeration: world x and y (N,) to those of the normal head."""
    long_face = knob["long_face"]
    below = (y - 0.2).clamp(max=0)
    narrow = 1 + 0.14 * long_face * smooth_step(0.5, -0.4, y)
    return x * narrow, y - below + below / (1 + 0.20 * long_face)


def _lacks(value: Any, absent: float) -> bool:
    """Whether a part is known to be absent; of tensors (a compiled kernel, many heads) it never is."""
    return not isinstance(value, Tensor) and value == absent


def smooth_min(a: Tensor, b: Tensor, radius: float) -> Tensor:
    """Union of two distances with a fillet of ``radius``."""
    overlap = (radius - (a - b).abs()).clamp(min=0)
    return torch.minimum(a, b) - overlap * overlap * (0.25 / radius)


def smooth_max(a: Tensor, b: Tensor, radius: float) -> Tensor:
    """Intersection of two distances with a fillet of ``radius``."""
    overlap = (radius - (a - b).abs()).clamp(min=0)
    return torch.maximum(a, b) + overlap * overlap * (0.25 / radius)


def smooth_step(start: float, stop: float, value: Tensor) -> Tensor:
    """0 at ``start``, 1 at ``stop`` (which may be the smaller one), cubic between."""
    t = ((value - start) / (stop - start)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def ellipsoid(x: Tensor, y: Tensor, z: Tensor, rx: Tensor | float, ry: Tensor | float, rz: Tensor | float) -> Tensor:
    """Distance estimate to an ellipsoid at the origin with the given radii."""
    u, v, w = x / rx, y / ry, z / rz
    level = (u * u + v * v + w * w).sqrt()
    u, v, w = u / rx, v / ry, w / rz
    return level * (level - 1) / ((u * u + v * v + w * w).sqrt() + 1e-6)


def sphere(x: Tensor, y: Tensor, z: Tensor, radius: Tensor | float) -> Tensor:
    """Distance to a sphere at the origin."""
    return (x * x + y * y + z * z).sqrt() - radius


def capsule(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    start: tuple[Tensor | float, ...],
    stop: tuple[Tensor | float, ...],
    start_radius: Tensor | float,
    stop_radius: Tensor | float,
) -> Tensor:
    """Distance estimate to a rounded cone between two points."""
    ax, ay, az = (b - a for a, b in zip(start, stop, strict=True))
    x, y, z = x - start[0], y - start[1], z - start[2]
    along = ((x * ax + y * ay + z * az) / (ax * ax + ay * ay + az * az)).clamp(0, 1)
    x, y, z = x - along * ax, y - along * ay, z - along * az
    return (x * x + y * y + z * z).sqrt() - (start_radius + (stop_radius - start_radius) * along)


@dataclass(frozen=True)
class Mouth:
    """The mouth at each point, seen from the front; shared by the geometry and the texture.

    Attributes:
        across: x over the half width, -1 and 1 at the corners.
        height: y above the line where the lips meet.
        half_width: of the mouth, world units.
        gap: half height of the opening at each point, 0 for a closed mouth.
        fullness: of the lips, 1 = average.
        open: how far the lips are parted, 0 to 1.
    """

    across: Tensor
    height: Tensor
    half_width: Any
    gap: Tensor
    fullness: Any
    open: Any


def mouth(knob: Knobs, x: Tensor, y: Tensor) -> Mouth:
    """Mouth coordinates of points (N,)."""
    smile, frown, pucker = knob["smile"], knob["frown"], knob["pucker"]
    half_width = knob["mouth_width"] * (1 + 0.26 * smile - 0.10 * knob["mouth_open"]) * (1 - 0.42 * pucker)
    across = x / half_width
    bend = 0.125 * smile * (1 - 0.6 * pucker) - 0.12 * frown
    curve = bend * ((across * across).clamp(max=1.1) - 0.40) - 0.045 * knob["mouth_open"]
    arch = (1 - across * across).clamp(min=0)
    parted = knob["mouth_open"] + 0.42 * smile * (1 - 0.6 * pucker) * (1 - knob["mouth_open"])
    return Mouth(
        across=across,
        height=y - MOUTH_HEIGHT - knob["mouth_height"] - curve,
        half_width=half_width,
        gap=0.115 * parted * arch,
        fullness=knob["lip_fullness"] * (1 + 0.55 * pucker),
        open=parted,
    )


def skin(knob: Knobs, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Distance to head, ears and neck."""
    side = x.abs()
    smile, opening = knob["smile"], knob["mouth_open"]
    head_width, face_width = knob["head_width"], knob["face_width"]
    chin_y = y + 0.11 * opening * smooth_step(-0.30, -0.75, y)  # an opening mouth drops the jaw
    taper = 1 - knob["jaw_taper"] * smooth_step(0.20, -0.95, chin_y)
    head = ellipsoid(x, y - 0.30, z + 0.12, 0.74 * head_width, 0.75 * knob["head_height"], 0.85)
    head = smooth_min(head, ellipsoid(x / taper, chin_y + 0.15, z - 0.13, 0.63 * face_width, 0.76, 0.64), 0.20)
    head = smooth_min(head, sphere(x, chin_y + 0.67 + knob["chin_drop"], z - 0.46, 0.22), 0.26)
    cheek = sphere(side - 0.33 * face_width, y + 0.20 - 0.06 * smile, z - 0.46, knob["cheek_size"] + 0.03 * smile)
    head = smooth_min(head, cheek, 0.16)
    eye_x = side - knob["eye_spacing"]
    head = smooth_max(head, -ellipsoid(eye_x, y - EYE_HEIGHT - 0.005, z - 0.87, 0.20, 0.14, 0.17), 0.12)
    eye = knob["eye_size"]
    head = smooth_min(head, ellipsoid(eye_x, y - EYE_HEIGHT, z - 0.735 + eye, eye * 1.15, eye, eye), 0.045)
    # Nose: bridge, tip, wings.
    tip_y, tip_z, wing = -0.19 + knob["nose_lift"], 0.81 + knob["nose_length"], knob["nose_width"]
    bridge = capsule(x, y, z, (0.0, 0.16, 0.70), (0.0, tip_y, tip_z), 0.05, 0.085 * wing**0.5)
    head = smooth_min(head, bridge, 0.10)
    head = smooth_min(head, sphere(side - 0.072 * wing, y - tip_y + 0.015, z - tip_z + 0.075, 0.062 * wing), 0.06)
    # Lips, and the hollow of the open mouth.
    lip = mouth(knob, x, y)
    front = z - 0.705 - 0.09 * knob["pucker"]
    thick = 0.045 * lip.fullness * (1 - 0.25 * smile)
    upper = ellipsoid(x, lip.height - 0.6 * thick - lip.gap, front - 0.012, 0.95 * lip.half_width, thick, 0.065)
    lower = ellipsoid(x, lip.height + 0.8 * thick + lip.gap, front, 0.85 * lip.half_width, 1.15 * thick, 0.075)
    head = smooth_min(head, smooth_min(upper, lower, 0.03), 0.09)
    # The hollow of the mouth comes in from the front as the lips part.
    depth = 0.72 + 0.12 * (1 - lip.open)
    hollow = ellipsoid(x, lip.height, z - depth - 0.15, 0.9 * lip.half_width, 0.012 + 0.1 * lip.open, 0.18)
    head = smooth_max(head, -hollow, 0.03)
    ear = knob["ear_size"]
    ear_x = side - 0.735 * head_width
    ears = ellipsoid(ear_x - 0.04, y - 0.0, z + 0.05 + ear_x * 0.8, 0.06 * ear, 0.19 * ear, 0.115 * ear)
    head = smooth_min(head, ears, 0.05)
    neck = capsule(x, y, z, (0.0, -0.50, -0.12), (0.0, -1.50, -0.24), 0.36, 0.42)
    return smooth_min(head, neck, 0.10)


def cloth(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Distance to shoulders and collar."""
    shoulders = ellipsoid(x, y + 2.02, z + 0.30, 1.34, 0.70, 0.60)
    collar = capsule(x, y, z, (0.0, -1.22, -0.22), (0.0, -1.50, -0.25), 0.45, 0.54)
    neckline = ellipsoid(x, y + 1.06, z - 0.18, 0.40, 0.27, 0.42)
    return smooth_max(smooth_min(shoulders, collar, 0.15), -neckline, 0.06)


def _hanging_hair(knob: Knobs, side: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Two strands beside the face and a curtain behind the neck."""
    bob, long, head_width = knob["bob"], knob["long"], knob["head_width"]
    length = bob * (0.40 + 0.20 * knob["hair_length"]) + long * (0.90 + 0.40 * knob["hair_length"])
    strand = capsule(
        side,
        y,
        z,
        (0.60 * head_width + 0.05, 0.35, -0.12),
        (0.63 * head_width + 0.08 * long, -0.1 - length, -0.14),
        0.20,
        0.16 + 0.05 * bob,
    )
    curtain = ellipsoid(side, y + 0.55 * length - 0.10, z + 0.38, 0.76 * head_width, 0.62 + 0.60 * length, 0.44)
    return smooth_min(strand, curtain, 0.10)


def hair(knob: Knobs, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Distance to the hair."""
    side = x.abs()
    head_width, parting = knob["head_width"], knob["parting"]
    fringe, afro, bob, long = knob["fringe"], knob["afro"], knob["bob"], knob["long"]
    hanging = bob + long
    thickness = knob["hair_volume"] + 0.08 * afro
    cap = ellipsoid(
        x, y - 0.33, z + 0.15, 0.74 * head_width + thickness, 0.77 * knob["head_height"] + thickness, 0.86 + thickness
    )
    face_y = y + 0.13 + knob["hairline"] + 0.12 * fringe + 0.05 * bob
    face = ellipsoid(x - 0.5 * parting, face_y, z - 0.98, 0.70, 0.78, 0.86)
    nape = -(y + 0.22 + 0.25 * hanging + 0.12 * smooth_step(0.0, -0.6, z) * (1 - afro))
    hair = smooth_max(smooth_max(cap, -face, 0.10), nape, 0.15)
    if not (_lacks(bob, 0.0) and _lacks(long, 0.0)):
        hair = smooth_min(hair, _hanging_hair(knob, side, y, z) + ABSENT * (1 - hanging), 0.10)
    if not _lacks(fringe, 0.0):
        bangs = ellipsoid(x + 0.6 * parting, y - 0.62, z - 0.50, 0.52, 0.31, 0.33)
        bangs = smooth_max(bangs, 0.42 + (x + parting) * parting - y, 0.08)
        hair = smooth_min(hair, bangs + ABSENT * (1 - fringe), 0.10)
    if not _lacks(knob["bun"], 0.0):
        hair = smooth_min(hair, sphere(x, y - 1.16, z + 0.36, 0.31) + ABSENT * (1 - knob["bun"]), 0.06)
    if not _lacks(afro, 0.0):
        hair = smooth_min(hair, ellipsoid(x, y - 0.45, z + 0.25, 1.02, 0.90, 0.95) + ABSENT * (1 - afro), 0.15)
    hair = smooth_max(hair, -face, 0.08)
    angle = (x - parting) / (z + 1.6).clamp(min=0.3)
    locks = 0.007 * torch.sin(34 * angle + 3 * torch.sin(2.5 * y)) * (1 - afro)
    curls = 0.016 * torch.sin(17 * x) * torch.sin(17 * y) * torch.sin(17 * z) * afro
    return hair + locks + curls + ABSENT * knob["bald"]


def glasses(knob: Knobs, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Distance to round spectacles: rims, bridge and temples."""
    side = x.abs()
    rim = ((side - knob["eye_spacing"] - 0.01) ** 2 + ((y - EYE_HEIGHT + 0.01) * 1.12) ** 2).sqrt()
    rim = rim - 0.195 - 0.05 * knob["big_eyes"]
    front = z - 0.81 + 0.35 * (side - 0.15).clamp(min=0) ** 2
    frame = (rim * rim + front * front).sqrt()
    bridge = ((y - EYE_HEIGHT - 0.03) ** 2 + (z - 0.825) ** 2 + (side - 0.07).clamp(min=0) ** 2).sqrt()
    temple_x = 0.50 + (0.76 * knob["head_width"] - 0.50) * ((0.72 - z) / 0.7).clamp(0, 1)
    temple = (
        (y - EYE_HEIGHT - 0.04) ** 2 + (side - temple_x) ** 2 + ((z - 0.35).abs() - 0.40).clamp(min=0) ** 2
    ).sqrt()
    return torch.minimum(torch.minimum(frame, bridge), temple) - 0.019 + ABSENT * (1 - knob["glasses"])


def distances(knob: Knobs, points: Tensor) -> Tensor:
    """Signed distances of points to each material of one head.

    Args:
        knob: the named parameters of the head.
        points: (3, N) world points.

    Returns:
        (4, N) in world units, in the order of ``MATERIALS``.
    """
    x, y, z = points.unbind(0)
    head_x, head_y = head_space(knob, x, y)
    return torch.stack(
        [
            skin(knob, head_x, head_y, z),
            hair(knob, head_x, head_y, z),
            cloth(x, y, z),
            glasses(knob, head_x, head_y, z),
        ]
    )


def distance(knob: Knobs, points: Tensor) -> Tensor:
    """(N,) signed distance of points (3, N) to one head with all its parts; (B, N) of (3, B, N) to B heads."""
    x, y, z = points.unbind(0)
    head_x, head_y = head_space(knob, x, y)
    body = torch.minimum(skin(knob, head_x, head_y, z), cloth(x, y, z))
    if not _lacks(knob["bald"], 1.0):
        body = torch.minimum(body, hair(knob, head_x, head_y, z))
    if not _lacks(knob["glasses"], 0.0):
        body = torch.minimum(body, glasses(knob, head_x, head_y, z))
    return body
