"""Heads of a generator as items, by their codes: drawn, or of an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from datamodules.items import ItemsDataModule
from datamodules.seeds import index_generator
from models.artifact import load
from models.errors import UserError, shown
from models.generators.base import Generator
from models.heads.codes import HeadCodes
from models.heads.index import read_index
from models.latents import Latents


@dataclass
class Head:
    """One head.

    Attributes:
        id: of the item.
        latents: its style codes, a batch of one, where these are known.
        z: (1, z_dim) otherwise, or, where that is not known either, drawn by ``draw``: seed and number.
        picture: of the photo that it was found in, where there is one.
    """

    id: str
    latents: Latents | None = None
    z: Tensor | None = None
    draw: tuple[int, int] = (0, 0)
    picture: Path | None = None

    def codes(self, generator: Generator) -> Latents:
        """Its style codes, a batch of one, on the generator's device.

        Raises:
            UserError: when they are codes of another kind of generator.
        """
        mean = generator.mean_latents
        device = next(iter(mean.groups.values())).device
        if self.latents is not None:
            shapes = [{name: tuple(t.shape) for name, t in codes.groups.items()} for codes in (self.latents, mean)]
            if shapes[0] != shapes[1]:
                raise UserError(f"{self.id} has codes of the shapes {shapes[0]}, this generator's are {shapes[1]}")
            return self.latents.to(device)
        z = self.z
        if z is None:
            z = torch.randn(1, generator.z_dim, generator=index_generator(*self.draw))
        if z.shape[1] != generator.z_dim:
            raise UserError(f"{self.id} has a code of {z.shape[1]} numbers, this generator takes {generator.z_dim}")
        with torch.autocast(device.type, enabled=False):
            return generator.mapping(z.to(device))


class DrawnHeads(ItemsDataModule[Head]):
    """Heads that are drawn: z ~ N(0, I), which depends on the seed and the head's number alone.

    Args:
        heads: how many, from number ``first`` on. seed: of the draws.
    """

    def __init__(self, heads: int = 4, first: int = 0, seed: int = 0) -> None:
        super().__init__()
        if heads < 1 or first < 0:
            raise UserError("heads must be at least 1, and first not negative")
        self.heads, self.first, self.seed = heads, first, seed

    def read_items(self) -> Sequence[Head]:
        return [
            Head(f"{number:08d}", draw=(self.seed, number)) for number in range(self.first, self.first + self.heads)
        ]


class FoundHeads(ItemsDataModule[Head]):
    """Heads of an artifact: of ``restyle``, ``optimise`` or ``invert`` predict, which find those of photos, or of
    ``directions`` predict, which moves heads.

    Args:
        path: of the artifact. module: with their codes.
        leave: patterns of ids that are left out, as ``*-less``.
    """

    def __init__(self, path: str, module: str = "anchors", leave: list[str] | None = None) -> None:
        super().__init__()
        self.path, self.module, self.leave = path, module, leave or []

    def read_items(self) -> Sequence[Head]:
        found = found_heads(self.path, self.module)
        kept = [head for head in found if not any(fnmatchcase(head.id, pattern) for pattern in self.leave)]
        if not kept:
            raise UserError(f"{self.path}: of its {len(found)} heads data.init_args.leave leaves none")
        return kept


def found_heads(path: str, module: str) -> list[Head]:
    """The heads of an artifact whose codes are in a module of it.

    Raises:
        UserError: when there are none.
    """
    source = load(path)
    found = source.module(module)
    if not isinstance(found, HeadCodes):
        raise UserError(f"{path}: {shown(module)} holds no codes of heads, but {type(found).__name__}")
    photos = {e.id: source.media(e.artwork) for e in read_index(source.manifest) if e.artwork is not None}
    return [Head(i, found[i].latents, picture=photos.get(i)) for i in found.ids]
