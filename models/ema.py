"""Networks averaged over training."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class EMA(nn.Module, Generic[ModuleT]):
    """Follows a network: exponential moving averages of its parameters, copies of its buffers.

    Args:
        network: copied as ``module``, whose parameters get no gradient.
        half_life: images after which a weight counts half.
        ramp: the half-life is at most this share of the images so far: the average must forget the initial weights.
    """

    module: ModuleT

    def __init__(self, network: ModuleT, half_life: float, ramp: float = 0.05) -> None:
        super().__init__()
        self.module = copy.deepcopy(network).requires_grad_(False)
        self.half_life, self.ramp = half_life, ramp

    @torch.no_grad()
    def update(self, network: ModuleT, images: int, seen: int) -> None:
        """Follow ``network`` after a step over so many ``images``; ``seen`` counts them and all before."""
        half_life = min(self.half_life, self.ramp * seen)
        keep = 0.5 ** (images / max(half_life, 1e-8))
        for average, current in zip(self.module.parameters(), network.parameters(), strict=True):
            average.lerp_(current, 1 - keep)
        for average, current in zip(self.module.buffers(), network.buffers(), strict=True):
            average.copy_(current)
