"""Codes of a generator as data: z of the i-th head depends on the seed and i alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.heads import Head, found_heads
from datamodules.items import ItemsDataModule
from datamodules.mannequins.scene import CODE_NAMES, POSED_NAMES, Z_NAMES
from datamodules.resumable import evaluation_loader
from datamodules.seeds import index_generator
from models.errors import UserError


@dataclass
class CodeBlock:
    """Codes that are rendered together.

    Attributes:
        start, count: the heads' numbers are from ``start`` on.
        seed: of the draws.
        found: heads whose codes are known, in place of draws.
    """

    start: int
    count: int
    seed: int
    found: Sequence[Head] = ()

    @property
    def id(self) -> str:
        """The first number, in eight digits."""
        return f"{self.start:08d}"

    @property
    def numbers(self) -> range:
        """Of the heads."""
        return range(self.start, self.start + self.count)

    @property
    def names(self) -> list[str]:
        """Ids of the heads: numbers of eight digits, where these are drawn."""
        return [head.id for head in self.found] or [f"{number:08d}" for number in self.numbers]

    def z(self, z_dim: int) -> Tensor:
        """(count, z_dim) from N(0, I)."""
        return torch.stack([torch.randn(z_dim, generator=index_generator(self.seed, i)) for i in self.numbers])

    def generators(self, purpose: str) -> list[torch.Generator]:
        """One for each head's further draws."""
        return [index_generator(self.seed, i, purpose) for i in self.numbers]


class LatentDataModule(ItemsDataModule[CodeBlock]):
    """Heads of a generator by number: the first are for fit, those after them for test and predict.

    Args:
        samples: heads of fit.
        test_samples: heads of test and predict.
        block: heads rendered together. Blocks are dealt out to ranks whole, so that results do not depend on the number
            of ranks.
        seed: of the draws.
    """

    def __init__(self, samples: int = 10_000, test_samples: int = 64, block: int = 16, seed: int = 0) -> None:
        super().__init__()
        for name, value in {"samples": samples, "test_samples": test_samples, "block": block}.items():
            if value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")
        self.samples, self.test_samples, self.block, self.seed = samples, test_samples, block, seed

    def read_items(self) -> list[CodeBlock]:
        return self.blocks(0, self.samples)

    def blocks(self, start: int, count: int) -> list[CodeBlock]:
        """Blocks of ``count`` heads from the ``start``-th on; the last may be smaller."""
        end = start + count
        return [CodeBlock(i, min(self.block, end - i), self.seed) for i in range(start, end, self.block)]

    def test_dataloader(self) -> DataLoader[Any]:
        """One block a batch, as a list of one."""
        blocks = self.blocks(self.samples, self.test_samples)
        return evaluation_loader(blocks, 1, trainer=self.trainer, collate_fn=list)  # type: ignore[arg-type]


class FoundLatents(LatentDataModule):
    """Heads of an artifact, as :class:`datamodules.heads.FoundHeads`, for predict: there are none for fit.

    Args:
        path, module, block: as there, and above.
    """

    def __init__(self, path: str, module: str = "photos", block: int = 16) -> None:
        super().__init__(block=block)
        self.path, self.module, self.samples = path, module, 0

    def read_items(self) -> list[CodeBlock]:
        self.found = found_heads(self.path, self.module)
        self.test_samples = len(self.found)
        return []

    def blocks(self, start: int, count: int) -> list[CodeBlock]:
        return [replace(b, found=self.found[b.start : b.start + b.count]) for b in super().blocks(start, count)]


class CodeTruth:
    """Attributes that are numbers of the code itself.

    Args:
        names: of the numbers, in order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def __call__(self, z: Tensor) -> Tensor:
        """The code: traits rise with their numbers."""
        return z


class MannequinLatents(LatentDataModule):
    """Codes of generators whose z is the embedded world's own: each number is a trait's, see
    :mod:`datamodules.mannequins.scene`."""

    def code_truth(self, z_dim: int) -> CodeTruth:
        for names in (Z_NAMES, CODE_NAMES, POSED_NAMES):
            if len(names) == z_dim:
                return CodeTruth(names)
        raise UserError(
            f"the codes of this generator have {z_dim} numbers, those of the embedded world {len(Z_NAMES)}, "
            f"{len(CODE_NAMES)} or {len(POSED_NAMES)}: their traits are not known, take "
            "datamodules.latents.LatentDataModule"
        )
