"""From where, and under which light, rough shapes are rendered as pseudo samples (Wang et al., Sec. III-D, step 2).

The paper says "randomly" and follows GAN2Shape (Pan et al. 2021), whose views come from a Gaussian that is fitted to
the poses of pictures, its yaw a little enlarged, and whose lights are drawn uniformly around the one that was found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.checks import check_not_negative
from models.errors import UserError

SURE, LEAST = 4, 1e-4  # power of what is no head, and what a pixel counts at least
UNIT, HELD = math.radians(15), 0.03  # of turns, and how strongly what is agreed on is held to no offset at all


@dataclass(frozen=True)
class PseudoSampling:
    """How views and lights are drawn. The lights' defaults are GAN2Shape's for faces.

    Attributes:
        yaw_std_deg, pitch_std_deg, roll_std_deg: of the views, around the front, in degrees. Null is fitted: the spread
            of what a pose network tells of the generator's pictures.
        shift_std: of the movements across, units of the relief.
        yaw_scale: of drawn yaws.
        largest_deg: no angle is larger.
        dx, dy: ranges of the light's slope.
        added: range of r: the diffuse light becomes brighter by r, and the ambient one darker by ``dimmed`` r.
    """

    yaw_std_deg: float | None = None
    pitch_std_deg: float | None = None
    roll_std_deg: float = 0.0
    shift_std: float = 0.0
    yaw_scale: float = 1.2
    largest_deg: float = 60.0
    dx: tuple[float, float] = (-1.0, 1.0)
    dy: tuple[float, float] = (-0.2, 0.8)
    added: tuple[float, float] = (-0.1, 0.6)
    dimmed: float = 0.6

    def __post_init__(self) -> None:
        names = ("yaw_std_deg", "pitch_std_deg", "roll_std_deg", "shift_std", "yaw_scale", "largest_deg", "dimmed")
        check_not_negative(self, *names, where="sampling.")
        for name in ("dx", "dy", "added"):
            low, high = getattr(self, name)
            if not low <= high:
                raise UserError(f"sampling.{name} is from {low} to {high}: give the lower end first")

    @property
    def fitted(self) -> bool:
        """Whether a spread is to be found from pictures."""
        return self.yaw_std_deg is None or self.pitch_std_deg is None

    def spread(self, angles: Tensor | None = None) -> Tensor:
        """(2,) deviations of pitch and yaw, radians.

        Args:
            angles: (K, 2) yaw and pitch of pictures, radians, where something is fitted.
        """
        told = torch.zeros(2) if angles is None else angles.square().mean(0).sqrt().flip(0).float().cpu()
        given = (self.pitch_std_deg, self.yaw_std_deg)
        return torch.stack([
            told[k] if value is None else torch.tensor(math.radians(value)) for k, value in enumerate(given)
        ])  # fmt: skip

    def views(self, count: int, spread: Tensor, generator: torch.Generator) -> Tensor:
        """(count, 6) views, see :class:`models.rendering.relief.Relief`; ``spread`` (2,) of :meth:`spread`."""
        scale = torch.cat([spread, torch.tensor([math.radians(self.roll_std_deg), *2 * [self.shift_std], 0.0])])
        views = torch.randn(count, 6, generator=generator) * scale
        views[:, 1] *= self.yaw_scale
        largest = math.radians(self.largest_deg)
        return torch.cat([views[:, :3].clamp(-largest, largest), views[:, 3:]], 1)

    def lights(self, found: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """``count`` lights (count, 4) around the one that was found (4,): ambient, diffuse, dx, dy."""
        low, high = torch.tensor([self.added, self.dx, self.dy]).T
        drawn = low + (high - low) * torch.rand(count, 3, generator=generator)
        added, slope = drawn[:, :1], drawn[:, 1:]
        return torch.cat([found[0] - self.dimmed * added, found[1] + added, slope], 1)


def agreed(offset: Tensor, turned: Tensor, lit: Tensor) -> Tensor:
    """Offsets of codes as smooth functions of how samples differ from their head's picture.

    An offset that is found for one sample alone brings another mouth, or age, along with another view. What offsets of
    many samples have in common are their view and light: least squares of turns, of their squares and product, and of
    lights. Where nothing differs there is no offset.

    Args:
        offset: (N, K, D) of K samples of each of N heads. turned: (N, K, 2) turns from the picture's view, radians.
        lit: (N, K, L) differences from the picture's light.

    Returns:
        (N, K, D).
    """
    x, y = (turned / UNIT).unbind(-1)
    given = torch.cat([torch.stack([x, y, x * x, x * y, y * y], -1), lit], -1).double()
    held = HELD * given.shape[1] * torch.eye(given.shape[-1], dtype=given.dtype, device=given.device)
    share = torch.linalg.solve(given.mT @ given + held, given.mT @ offset.double())
    return (given @ share).to(offset.dtype)


def behind(image: Tensor, head: Tensor) -> Tensor:
    """What may be behind heads: their pictures' surroundings, drawn smoothly into where the heads are.

    Args:
        image: (B, 3, S, S). head: (B, 1, S, S) how surely the head is there, in [0, 1].
    """
    share = (1 - head) ** SURE + LEAST  # of a pixel: at its rim a head is surer than its colour is
    return _spread(image * share) / _spread(share)


def _spread(maps: Tensor) -> Tensor:
    """Means over two thirds of a picture, twice."""
    side = maps.shape[-1] // 3
    for _ in range(2):
        maps = F.avg_pool2d(maps, 2 * side + 1, 1, side, count_include_pad=False)
    return maps
