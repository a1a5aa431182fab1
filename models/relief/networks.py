"""The networks that tell what a picture shows: V, L, D and A (Wu et al. 2020; Wang et al., Sec. III-D), and E.

Pictures are (B, 3, S, S) in [-1, 1], S a power of two of at least 16.

Sources: Unsup3D (Wu et al. 2020, supplement, Tables 6 to 8) and GAN2Shape (Pan et al. 2021), whose layers these are, at
64 px with a width of 64, at 128 px with one of 32, and at 256 px with one of 16.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.errors import UserError
from models.rendering.relief import Relief

START = 0.02  # spread of what V and L first say, of their range: at exactly the front, gradients hang on roundings


class PictureEncoder(nn.Module):
    """V and L: (B, 3, S, S) -> (B, out) in [-1, 1].

    Args:
        size: S. width: channels after the first layer, twice as many after each further one. out: numbers.
    """

    def __init__(self, size: int, width: int, out: int) -> None:
        super().__init__()
        widths = _widths(size, width)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise((3, *widths)):
            layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False), nn.ReLU()]
        layers += [nn.Conv2d(widths[-1], widths[-1], 4, bias=False), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.out = nn.Linear(widths[-1], out)
        nn.init.normal_(self.out.bias, std=START)

    def forward(self, image: Tensor) -> Tensor:
        return self.out(self.trunk(image).flatten(1)).tanh()


class MapNetwork(nn.Module):
    """D and A: (B, 3, S, S) -> (B, channels, S, S), unbounded; through a code, so that the whole picture tells it.

    Args:
        size, width: as of :class:`PictureEncoder`. channels: of the map. code: numbers between the two halves.
        group: channels that are normalised together.
    """

    def __init__(self, size: int, width: int, channels: int, code: int = 256, group: int = 4) -> None:
        super().__init__()
        if width % group:
            raise UserError(f"networks.width ({width}) must be a multiple of networks.group ({group})")
        widths = _widths(size, width)

        def normed(features: int) -> nn.GroupNorm:
            return nn.GroupNorm(features // group, features)

        down: list[nn.Module] = []
        for before, after in itertools.pairwise((3, *widths)):
            down += [nn.Conv2d(before, after, 4, 2, 1, bias=False), normed(after), nn.LeakyReLU(0.2)]
        del down[-2]  # the coarsest features are not normalised
        down += [nn.Conv2d(widths[-1], code, 4, bias=False), nn.ReLU()]
        up: list[nn.Module] = [nn.ConvTranspose2d(code, widths[-1], 4, bias=False), nn.ReLU()]
        up += [nn.Conv2d(widths[-1], widths[-1], 3, 1, 1, bias=False), nn.ReLU()]
        for before, after in itertools.pairwise(widths[::-1]):
            up += [nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), normed(after), nn.ReLU()]
            up += [nn.Conv2d(after, after, 3, 1, 1, bias=False), normed(after), nn.ReLU()]
        up += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, 1, 1, bias=False), normed(width), nn.ReLU()]
        up += [nn.Conv2d(width, width, 5, 1, 2, bias=False), normed(width), nn.ReLU()]
        up += [nn.Conv2d(width, channels, 5, 1, 2, bias=False)]
        self.layers = nn.Sequential(*down, *up)

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


class FreeMap(nn.Module):
    """D or A of a single head as a map that is free, in place of the network whose only input its picture is.

    It is the sum of maps of 4, 8, ... S pixels, so that a step moves coarse and fine shapes alike. (1, 3, S, S) ->
    (1, channels, S, S), zeros at first.

    Args:
        size, channels: as of :class:`MapNetwork`.
    """

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        sides = [4 * 2**k for k in range(len(_widths(size, 1)) + 1)]
        self.levels = nn.ParameterList(nn.Parameter(torch.zeros(1, channels, side, side)) for side in sides)

    def forward(self, image: Tensor) -> Tensor:
        if len(image) != 1:
            raise ValueError(f"a free map is of one picture, got {len(image)}")
        grown = [F.interpolate(level, size=image.shape[-2:], mode="bilinear") for level in self.levels]
        return torch.stack(grown).sum(0)


class OffsetEncoder(nn.Module):
    """E: (B, 3, S, S) -> (B, out), unbounded: a residual network (GAN2Shape's).

    Args:
        size, width: as of :class:`PictureEncoder`. out: numbers of w.
    """

    def __init__(self, size: int, width: int, out: int) -> None:
        super().__init__()
        widths = _widths(size, width)
        blocks = [_Halved(before, after) for before, after in itertools.pairwise(widths)]
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1, bias=False),
            *blocks,
            nn.ReLU(),
            nn.Conv2d(widths[-1], 2 * widths[-1], 4, bias=False),
            nn.ReLU(),
            nn.Conv2d(2 * widths[-1], out, 1, bias=False),
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image).flatten(1)


class _Halved(nn.Module):
    """A residual block that halves the side."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, 2, 1, bias=False)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.skip = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(F.avg_pool2d(x, 2)) + self.second(self.first(x.relu()).relu())


class ReliefNetworks(nn.Module):
    """V, L, D and A of one head, or of all heads that share them.

    Args:
        relief: how depth maps are seen.
        size: S, pixels. width, code, group: as of :class:`MapNetwork`. encoder_width: of V and L.
        free_maps: whether D and A are a :class:`FreeMap`.
        slack: the share of their ranges by which V and L may leave what their answers are offsets to.

    Weights are drawn from torch's global generator.
    """

    def __init__(
        self,
        relief: Relief,
        size: int,
        width: int = 64,
        encoder_width: int = 64,
        code: int = 256,
        group: int = 4,
        free_maps: bool = False,
        slack: float = 1.0,
    ) -> None:
        super().__init__()
        self.relief, self.slack = relief, slack
        self.V = PictureEncoder(size, encoder_width, 6)
        self.L = PictureEncoder(size, encoder_width, 4)
        self.D, self.A = (
            FreeMap(size, channels) if free_maps else MapNetwork(size, width, channels, code, group)
            for channels in (1, 3)
        )

    def view(self, image: Tensor, around: Tensor) -> Tensor:
        """Where pictures are seen from: (B, 6), see :class:`models.rendering.relief.Relief`, offsets to ``around``."""
        return around + self.slack * self.relief.view(self.V(image))

    def light(self, image: Tensor, around: Tensor) -> Tensor:
        """What lights them: (B, 4) ambient, diffuse, dx and dy, offsets to ``around``."""
        raw = self.L(image).float()
        return around + self.slack * raw * raw.new_tensor([0.5, 0.5, 1.0, 1.0])  # the first two are shares in [0, 1]

    def depth(self, image: Tensor) -> Tensor:
        """The canonical depth (B, 1, S, S) of what they show."""
        return self.relief.depth(self.D(image))

    def albedo(self, image: Tensor) -> Tensor:
        """Its canonical albedo (B, 3, S, S) in [-1, 1]."""
        return self.A(image).float().tanh()


def _widths(size: int, width: int) -> list[int]:
    """Channels at sides S / 2 to 4."""
    levels = math.log2(size) - 2 if size > 0 else 0
    if levels < 2 or levels % 1:
        raise UserError(f"the shape's networks see pictures of 16, 32, 64, ... px, and this generator's have {size}")
    return [width * 2**k for k in range(int(levels))]
