"""Small feature networks for the embedded world, shipped with the project (a few MB in all).

They know procedural mannequin heads only and stand in for LPIPS, CLIP, ArcFace, a face parser and a pose estimator
where no official weights are at hand. ``configs/stages/features.yaml`` trains them.

Shape suffixes: B batch, C channels, H/W image size, S segments.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.configurable import Configurable
from models.features.weights import load_weights
from models.image import resized
from models.segments import SEGMENTS

WORKING_SIZE = 64
"""Side in pixels at which the embedded networks look at an image."""
WIDTHS = (8, 24, 48, 96, 160)
"""Channels of the trunk at 64, 32, 16, 8 and 4 pixels."""


class Residual(nn.Module):
    """x + gain * conv(act(conv(act(x)))), the gain learnt from a small start: no normalisation is needed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, 1, 1)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1)
        self.gain = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.second(F.silu(self.first(F.silu(x))))


class Trunk(nn.Module):
    """Convolutional encoder without normalisation layers, so that absolute colour survives.

    Returns five feature maps, at 1, 1/2, 1/4, 1/8 and 1/16 of the input's side, with ``WIDTHS`` channels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTHS[0], 3, 1, 1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(WIDTHS))
        self.refine = nn.ModuleList([nn.Identity(), Residual(WIDTHS[2]), Residual(WIDTHS[3]), nn.Identity()])
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(torch.as_tensor(layer.bias))

    def forward(self, image: Tensor) -> list[Tensor]:
        x = self.stem(image)
        features = [x]
        for down, refine in zip(self.down, self.refine, strict=True):
            x = refine(down(F.silu(x)))
            features.append(x)
        return features


class GridHead(nn.Module):
    """Reads the coarsest map with its layout: (B, C, 4, 4) -> (B, dim)."""

    def __init__(self, dim: int, hidden: int = 48) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(WIDTHS[-1], hidden, 1)
        self.out = nn.Linear(hidden * (WORKING_SIZE // 16) ** 2, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.reduce(F.silu(x))).flatten(1))


class StatisticsHead(nn.Module):
    """Reads the mean and the deviation of every channel at every scale, as style losses do: -> (B, dim)."""

    def __init__(self, dim: int, hidden: int = 192) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * sum(WIDTHS), hidden)
        self.out = nn.Linear(hidden, dim)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.out(self.statistics(features))

    def statistics(self, features: list[Tensor]) -> Tensor:
        """The hidden layer: (B, hidden)."""
        features = [full(f) for f in features]
        means = [f.mean((2, 3)) for f in features]
        squares = [f.square().mean((2, 3)) for f in features]
        deviations = [((s - m.square()).clamp(min=0) + 1e-4).sqrt() for s, m in zip(squares, means, strict=True)]
        return F.silu(self.hidden(torch.cat(means + deviations, 1)))


def labelled(name: str, weights: str | None) -> str:
    """A network's name in scores: what its weights are called says which of several it is."""
    return name if weights in (None, "embedded") else f"{name} ({Path(weights).stem})"


class EmbeddedFeature(Configurable):
    """Base of the embedded networks.

    Args:
        weights: "embedded" for the shipped file, the path of another safetensors file, or None for a network
            whose owner fills it (the training stage, or an artifact being loaded).
    """

    kind: ClassVar[str]

    @property
    def label(self) -> str:
        """Its class, and the weights where these are not the shipped ones that losses know."""
        return labelled(type(self).__name__, self.init_args["weights"])

    def _finish(self, weights: str | None) -> None:
        if weights is not None:
            load_weights(self, self.kind, weights)


class EmbeddedStyle(EmbeddedFeature):
    """Style embedding: (B, 3, H, W) in [-1, 1] -> (B, 64) unit vectors.

    A change of style moves the embedding in one direction whatever the head and the view; colours move it too.
    """

    kind = "style"
    dim = 64

    def __init__(self, weights: str | None = "embedded") -> None:
        super().__init__()
        self.trunk = Trunk()
        self.head = StatisticsHead(self.dim)
        self._finish(weights)

    def forward(self, image: Tensor) -> Tensor:
        return F.normalize(self.head(self.trunk(resized(image, WORKING_SIZE))), dim=1)


class EmbeddedIdentity(EmbeddedFeature):
    """Identity embedding: (B, 3, H, W) in [-1, 1] -> (B, 64) unit vectors, alike over views, light and styles."""

    kind = "identity"
    dim = 64

    def __init__(self, weights: str | None = "embedded") -> None:
        super().__init__()
        self.trunk = Trunk()
        self.head = GridHead(self.dim)
        self._finish(weights)

    def forward(self, image: Tensor) -> Tensor:
        return F.normalize(self.head(self.trunk(resized(image, WORKING_SIZE))[-1]), dim=1)

    def early(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 48, 16, 16), the output of the first residual stage."""
        return self.trunk(resized(image, WORKING_SIZE))[2]


class EmbeddedPose(EmbeddedFeature):
    """Camera pose: (B, 3, H, W) in [-1, 1] -> (B, 2) yaw and pitch in radians.

    Each angle comes out bounded, as ``limit * tanh``.
    """

    kind = "pose"
    limit: ClassVar[float] = math.radians(100.0)

    def __init__(self, weights: str | None = "embedded") -> None:
        super().__init__()
        self.trunk = Trunk()
        self.head = GridHead(2)
        self._finish(weights)

    def forward(self, image: Tensor) -> Tensor:
        return self.limit * torch.tanh(self.head(self.trunk(resized(image, WORKING_SIZE))[-1]))


class ParserHead(nn.Module):
    """U-Net decoder over the trunk's five maps: -> (B, segments, H, W) logits at the trunk's input size."""

    def __init__(self, segments: int) -> None:
        super().__init__()
        depths = (16, 24, 32, 48, 64)
        self.lateral = nn.ModuleList(nn.Conv2d(w, d, 1) for w, d in zip(WIDTHS, depths, strict=True))
        self.merge = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(depths[1:], depths, strict=False))
        self.smooth = nn.ModuleList(nn.Conv2d(d, d, 3, 1, 1) for d in depths[:-1])
        self.out = nn.Conv2d(depths[0], segments, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.lateral[4](features[4])
        for level in (3, 2, 1, 0):
            lateral = self.lateral[level](features[level])
            x = F.interpolate(self.merge[level](F.silu(x)), lateral.shape[-2:], mode="nearest") + lateral
            x = x + self.smooth[level](F.silu(x))
        return self.out(F.silu(x))


class EmbeddedParser(EmbeddedFeature):
    """Face parsing: (B, 3, H, W) in [-1, 1] -> (B, S, H, W) logits.

    Args:
        segments: names of the classes, in order.
    """

    kind = "parser"

    def __init__(self, segments: tuple[str, ...] = SEGMENTS, weights: str | None = "embedded") -> None:
        super().__init__()
        self.segments = tuple(segments)
        self.trunk = Trunk()
        self.head = ParserHead(len(self.segments))
        self._finish(weights)

    def forward(self, image: Tensor) -> Tensor:
        logits = self.head(self.trunk(resized(image, WORKING_SIZE)))
        if logits.shape[-2:] == image.shape[-2:]:
            return logits
        return F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False)


class PerceptualHead(nn.Module):
    """Weighted squared differences of unit-normalised channels at the four finest scales, as LPIPS (Zhang 2018, Eq. 1).

    The weights are softplus of free parameters, hence positive; ``scale`` brings the distance to LPIPS's range.
    """

    scales: ClassVar[int] = 4

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.ParameterList(nn.Parameter(torch.zeros(w)) for w in WIDTHS[: self.scales])
        self.scale: Tensor
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        total = full(a[0]).new_zeros(len(a[0]))
        for raw, x, y in zip(self.raw, a, b, strict=False):
            weight_C = F.softplus(raw)[:, None, None]
            difference = unit_channels(full(x)) - unit_channels(full(y))
            total = total + (weight_C * difference.square()).sum(1).mean((1, 2))
        return self.scale * total

    @torch.no_grad()
    def calibrate(self, distance: Tensor, wanted: float = 0.5, momentum: float = 0.02) -> None:
        """Move ``scale`` towards the value at which the distances (B,), measured with it, average ``wanted``."""
        self.scale = self.scale * (wanted / distance.mean().clamp(min=1e-8)) ** momentum


def full(x: Tensor) -> Tensor:
    """At least float32: squares overflow float16, and small distances vanish in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_channels(x: Tensor, eps: float = 1e-2) -> Tensor:
    """Divide (B, C, H, W) by its norm over channels; ``eps`` keeps the gradient finite on flat features."""
    return x / (x.square().sum(1, keepdim=True) + eps).sqrt()


class EmbeddedLPIPS(EmbeddedFeature):
    """Perceptual distance: two (B, 3, H, W) in [-1, 1] -> (B,).

    Args:
        size: working side in pixels; None compares at the images' own resolution.
    """

    kind = "perceptual"

    def __init__(self, size: int | None = WORKING_SIZE, weights: str | None = "embedded") -> None:
        super().__init__()
        self.size = size
        self.trunk = Trunk()
        self.head = PerceptualHead()
        self._finish(weights)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if a.shape != b.shape:
            raise ValueError(f"images differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
        if self.size is not None:
            a, b = resized(a, self.size), resized(b, self.size)
        features = self.trunk(torch.cat([a, b]))
        first, second = zip(*(f.chunk(2) for f in features), strict=True)
        return self.head(list(first), list(second))
