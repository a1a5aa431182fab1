"""One random change of view for both images of a pair, before they are embedded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class PairAugmentation:
    """Random crop and resize, small perspective and flip, the same for both images of a pair.

    With a change of its own for each image, their difference would hold the difference of the augmentations.

    Attributes:
        count: augmented copies of each pair; 0 returns the pairs as they are.
        crop: smallest side of the crop, as a share of the image's.
        perspective: largest change of scale across the image by the perspective.
        flip: probability of a mirror image.
        size: side of the result in pixels, None for the input's.
    """

    count: int = 1
    crop: float = 0.75
    perspective: float = 0.2
    flip: float = 0.5
    size: int | None = None

    def __post_init__(self) -> None:
        if self.count < 0 or not 0 < self.crop <= 1 or not 0 <= self.perspective < 1 or not 0 <= self.flip <= 1:
            raise ValueError(f"out of range: {self}")

    def __call__(self, first: Tensor, second: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) twice -> (B * count, C, size, size) twice; copies of a pair are neighbours. Differentiable.

        The draws are made on the CPU, so that they are the same on every device.
        """
        if first.shape != second.shape:
            raise ValueError(f"a pair's images differ in shape: {tuple(first.shape)} and {tuple(second.shape)}")
        if self.count == 0:
            return first, second
        height, width = (self.size, self.size) if self.size else first.shape[-2:]
        grid = self.grid(len(first) * self.count, height, width, generator).to(first)

        def sample(image: Tensor) -> Tensor:
            image = image.repeat_interleave(self.count, 0)
            return F.grid_sample(image, grid, padding_mode="reflection", align_corners=False)

        return sample(first), sample(second)

    def grid(self, count: int, height: int, width: int, generator: Generator) -> Tensor:
        """Sampling positions (count, height, width, 2) in [-1, 1], as of ``grid_sample``."""
        scale, dx, dy, px, py, mirrored = torch.rand(6, count, 1, 1, generator=generator)
        side = self.crop + (1 - self.crop) * scale
        v, u = torch.meshgrid(_centres(height), _centres(width), indexing="ij")
        u = torch.where(mirrored < self.flip, -u, u)
        depth = 1 + self.perspective * ((px - 0.5) * u + (py - 0.5) * v)
        x = side * u / depth + (1 - side) * (2 * dx - 1)
        y = side * v / depth + (1 - side) * (2 * dy - 1)
        return torch.stack([x, y], -1)


def _centres(count: int) -> Tensor:
    return (torch.arange(count) * 2 + 1) / count - 1
