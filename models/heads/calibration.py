"""How far along a direction is useful: strengths that change pictures as much as is asked.

All of it is computed in float64, but for the pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.checks import check_positive
from models.errors import UserError
from models.generators.base import Generator
from models.heads.boundaries import Found, Samples
from models.heads.directions import Directions, fingerprint
from models.latents import Latents

_HALVINGS = 5  # of the last step towards a useful range's end


@dataclass(frozen=True)
class Calibration:
    """How the useful range of a direction is found: strengths that change a picture as much as is asked, on both sides.

    Attributes:
        distance: perceptual, between the edited picture and the unedited one, mean over the codes.
        codes: validation codes that are edited.
        steps: at which the distance is measured, from 0 to as far as sampled codes reach.
        symmetric: end both sides where the nearer one ends, so that w + dw and w - dw are of one size.
    """

    distance: float = 0.3
    codes: int = 8
    steps: int = 8
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "distance", "codes", "steps", where="calibration.")


def useful_end(change: Callable[[float], float], reach: float, wanted: float, steps: int) -> tuple[float, float]:
    """How far to go for a change of ``wanted``: the first of ``steps`` equal steps that has it, halved down to where it
    begins; all of ``reach`` where none has.

    Args:
        change: by strength, from 0 to ``reach``, which may be below 0.

    Returns:
        the strength, and the change there.
    """
    before, there, found = 0.0, reach, 0.0
    for step in range(1, steps + 1):
        there = reach * step / steps
        found = change(there)
        if found >= wanted:
            break
        before = there
    else:
        return there, found
    for _ in range(_HALVINGS):
        middle = (before + there) / 2
        if (now := change(middle)) >= wanted:
            there, found = middle, now
        else:
            before = middle
    return there, found


def spread_and_reach(codes: Tensor, normal: Tensor) -> tuple[float, float, float]:
    """Of codes (N, rows, w_dim) along a unit normal (rows, w_dim): their standard deviation, and how far the lowest and
    the highest are from the mean, in standard deviations, both above 0. Codes of one row count for all rows.

    Raises:
        UserError: when they do not differ.
    """
    normal = normal.double()
    if codes.shape[1] == 1 < len(normal):  # nothing is repeated: of many samples it would not fit
        normal = normal.sum(0, keepdim=True)
    place = codes.double().flatten(1) @ normal.flatten()
    place = place - place.mean()
    spread = float(place.std(correction=0))
    if not spread > 0:
        raise UserError("sampled codes do not differ along a direction: take more samples")
    return spread, float(-place.min()) / spread, float(place.max()) / spread


@torch.no_grad()
def calibrate(
    found: Sequence[Found],
    samples: Samples,
    generator: Generator,
    heads: Latents,
    change: Callable[[Latents], Tensor],
    calibration: Calibration,
) -> tuple[Directions, list[dict[str, float]]]:
    """Directions with their spreads and useful ranges.

    Args:
        found: directions of the generator.
        samples: its codes, which tell how far codes reach.
        heads: codes that the method was not fitted to, of all rows, where the directions are to be.
        change: of these heads with other codes, from what they look like as they are: (n,).

    Returns:
        the directions; and of each the ``low_distance`` and ``high_distance``, the changes at its ends.

    Raises:
        UserError: when sampled codes do not differ along a direction.
    """
    groups = {name: t.shape[1:] for name, t in generator.mean_latents.groups.items()}
    # All rows are kept where one direction has them: a boundary of one row counts for each.
    rows = {g: max([1, *(f.normals[g].shape[0] for f in found if g in f.normals)]) for g in groups}
    sizes = [(g, rows[g], width) for g, (_, width) in groups.items()]
    directions = Directions([f.name for f in found], sizes, fingerprint(generator))
    reaches: list[tuple[float, float]] = []
    for k, direction in enumerate(found):
        reach = (math.inf, math.inf)
        for group, normal in direction.normals.items():
            own = normal.expand(rows[group], -1) / math.sqrt(rows[group] / normal.shape[0])
            spread, low, high = spread_and_reach(samples.codes[group], own)
            directions.direction(group)[k], directions.spread(group)[k] = own.float(), spread
            reach = min(reach[0], low), min(reach[1], high)
        reaches.append(reach)
    directions.to(next(iter(heads.groups.values())).device)
    measured = []
    for k, direction in enumerate(found):

        def distance(strength: float, name: str = direction.name) -> float:
            return float(change(directions.moved(heads, name, strength)).double().mean())

        ends = [
            useful_end(distance, sign * reach, calibration.distance, calibration.steps)
            for sign, reach in zip((-1, 1), reaches[k], strict=True)
        ]
        if calibration.symmetric:
            nearer = min(abs(end) for end, _ in ends)
            ends = [(sign * nearer, distance(sign * nearer)) for sign in (-1, 1)]
        directions.limits[k] = torch.tensor([end for end, _ in ends])
        measured.append({"low_distance": ends[0][1], "high_distance": ends[1][1]})
    return directions, measured
