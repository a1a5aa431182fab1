"""Generators between two related ones, by resolution: layer swapping and smooth blends (Pinkney and Adler 2020)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch

from models.checks import check_not_negative, check_positive
from models.errors import UserError
from models.generators.base import Generator
from models.generators.stylegan2 import SynthesisNetwork


@dataclass(frozen=True)
class Blend:
    """How much of an adapted generator there is at each resolution.

    Attributes:
        swap: side in pixels from which on layers are the original's; those below are the adapted one's. Coarse layers
            hold shapes, fine ones colours and textures.
        width: octaves over which the share falls, 0 for a hard swap.
        coarse, fine: share of the adapted generator far below and far above the swap: 1 and 0 keep the original's
            textures on the style's shapes (Toonify), 0 and 1 do the opposite, equal ones are a style's strength.
    """

    swap: int = 32
    width: float = 0.0
    coarse: float = 1.0
    fine: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "swap", where="blend.")
        check_not_negative(self, "width", "coarse", "fine", where="blend.")

    def share(self, side: int) -> float:
        """Of the adapted generator at layers of a side: a logistic curve over its logarithm."""
        above = math.log2(side / self.swap)
        if self.width == 0:
            rise = 1.0 if above >= 0 else 0.0
        else:
            rise = (1 + math.tanh(2 * (above + 0.5) / self.width)) / 2  # the middle is between two octaves
        return self.coarse + (self.fine - self.coarse) * rise


def alike(one: Generator, other: Generator) -> bool:
    """Whether two generators have equal layers, as one has with what it became."""
    shapes = [{name: t.shape for name, t in generator.state_dict().items()} for generator in (one, other)]
    return shapes[0] == shapes[1]


def blended(original: Generator, adapted: Generator, blend: Blend) -> Generator:
    """A generator whose weights are between those of two with equal layers; what has no resolution is the coarsest.

    Raises:
        UserError: when they are not of one kind and size, or have no layers of growing resolution.
    """
    mixed, second = copy.deepcopy(original), dict(adapted.named_parameters())
    if not alike(original, adapted):
        raise UserError("blend: the two generators have other layers: only a generator and what it became can be mixed")
    sides = layer_sides(original)
    if not sides:
        raise UserError(f"blend: {type(original).__name__} has no layers of growing resolution")
    smallest = min(sides.values())
    with torch.no_grad():
        for name, parameter in mixed.named_parameters():
            parameter.lerp_(second[name], blend.share(sides.get(name, smallest)))
    mixed.update_mean()
    return mixed


def layer_sides(generator: Generator) -> dict[str, int]:
    """By name of a parameter in a block, the side of what the block makes, pixels."""
    found = {}
    for place, network in generator.named_modules():
        if isinstance(network, SynthesisNetwork):
            for k, (side, block) in enumerate(zip(network.sides, network.blocks, strict=True)):
                prefix = ".".join(part for part in (place, f"blocks.{k}") if part)
                found |= {f"{prefix}.{name}": side for name, _ in block.named_parameters()}
    return found
