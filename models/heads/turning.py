"""Heads of a 2D generator, turned: their codes move along directions of pose (e4e with InterFaceGAN)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.camera import Camera
from models.generators.base import Generator
from models.heads.directions import Directions
from models.latents import Latents
from models.rendering.output import Rendering

ANGLES = ("yaw", "pitch")
Pose = Callable[[Tensor], Tensor]
"""Pictures (B, 3, H, W) -> yaw and pitch (B, 2), radians."""
REACH, STEPS = 2.5, 33  # deviations to either side of the mean code at which the pose of each head is looked up


@torch.no_grad()
def turned_heads(
    generator: Generator, directions: Directions, pose: Pose, ws: Latents, camera: Camera
) -> Callable[[Camera], Rendering]:
    """What B cameras saw with codes ``ws`` of B heads, from other cameras, V in a row of each head.

    How far codes move is looked up for each head: along each direction its pictures are rendered, and a pose network
    tells how they are turned. A view is told from the head's own by its yaw and pitch; beyond what the direction
    reaches, the head stays at its end.

    Args:
        generator: a 2D one.
        directions: with ``yaw``; with ``pitch`` too, heads also nod.
        pose: tells poses.
    """
    angles = [name for name in ANGLES if name in directions.names]
    tables = [
        [_table(generator, directions, pose, ws[row : row + 1], name) for name in angles] for row in range(len(ws))
    ]

    def show(views: Camera) -> Rendering:
        count = len(views) // len(ws)
        pictures = []
        for row in range(len(ws)):
            own, seen = camera[row : row + 1], views[row * count : (row + 1) * count]
            codes = ws[row : row + 1].repeat_interleave(count)
            for name, (strengths, turns) in zip(angles, tables[row], strict=True):
                wanted = getattr(seen, name) - getattr(own, name)
                codes = directions.moved(codes, name, interpolated(wanted, turns, strengths))
            pictures.append(generator.synthesis(codes, None))
        return Rendering.cat(pictures)

    return show


def _table(generator: Generator, directions: Directions, pose: Pose, ws: Latents, name: str) -> tuple[Tensor, Tensor]:
    """Deviations (N,) along a direction, and how far they turn a head, radians, never falling.

    Codes stay within what sampled ones are: beyond it pictures fall apart, and a pose network says anything.
    """
    place = (directions.read(ws) - directions.read(generator.mean_latents))[0, directions.names.index(name)]
    strengths = torch.linspace(-REACH, REACH, STEPS, device=place.device) - place.clamp(-REACH, REACH)
    strengths = torch.cat([strengths, strengths.new_zeros(1)]).sort().values  # the head as it is
    codes = directions.moved(ws.repeat_interleave(len(strengths)), name, strengths)
    told = pose(generator.synthesis(codes, None).image.clamp(-1, 1))[:, ANGLES.index(name)].float()
    if told[-1] < told[0]:
        strengths, told = strengths.flip(0), told.flip(0)
    told = told.cummax(0).values
    return strengths, told - told[strengths == 0][0]


def interpolated(wanted: Tensor, given: Tensor, values: Tensor) -> Tensor:
    """What belongs to ``wanted`` (M,) by lines between the points of a table, ``values`` (N,) at ``given`` (N,), which
    never falls; beyond its ends the ends'.
    """
    above = torch.searchsorted(given, wanted.contiguous()).clamp(1, len(given) - 1)
    low, high = given[above - 1], given[above]
    share = ((wanted - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    return torch.lerp(values[above - 1], values[above], share)
