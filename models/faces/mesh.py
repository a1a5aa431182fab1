"""The face as 468 points, by MediaPipe's face mesh; differentiable with respect to the picture.

Kartynnik et al., "Real-time facial surface geometry from monocular video on mobile GPUs", 2019.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from models.configurable import Configurable
from models.faces.layers import BlazeBlock, Convolution

POINTS = 468


class FaceMesh(Configurable):
    """Points of a face that fills two thirds of a square, and whether there is one."""

    size = 192

    def __init__(self) -> None:
        super().__init__()

        def more(channels: int) -> list[nn.Module]:
            return [BlazeBlock(channels, channels, leaky=True) for _ in range(2)]

        def stage(inputs: int, outputs: int) -> list[nn.Module]:
            return [BlazeBlock(inputs, outputs, 2, leaky=True), *more(outputs)]

        def head(outputs: int) -> list[nn.Module]:
            return [Convolution(128, 32), nn.PReLU(32), BlazeBlock(32, 32, leaky=True), nn.Conv2d(32, outputs, 3)]

        widths = (16, 32, 64, 128, 128)
        stages = [block for a, b in pairwise(widths) for block in stage(a, b)]
        self.trunk = nn.Sequential(Convolution(3, 16, 3, 2), nn.PReLU(16), *more(16), *stages)
        self.points = nn.Sequential(*stage(128, 128), *head(3 * POINTS))
        self.presence = nn.Sequential(BlazeBlock(128, 128, 2, leaky=True), *head(1))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, 192, 192) in [-1, 1] -> (B, 468, 3) in units of the side: x and y from 0 to 1, z alike and away from
        the viewer; (B,) logits of presence."""
        x = self.trunk((image + 1) / 2)
        return self.points(x).reshape(-1, POINTS, 3) / self.size, self.presence(x).flatten()
