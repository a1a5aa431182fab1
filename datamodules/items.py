"""Data that come as items, each with an id: what is optimised or shown one by one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from datamodules.resumable import evaluation_loader


class HasId(Protocol):
    """Anything with a name that is unique among its kind and safe as a file name."""

    @property
    def id(self) -> str:
        """The name."""
        ...


Item = TypeVar("Item", bound=HasId)


class ItemsDataModule(pl.LightningDataModule, Generic[Item]):
    """Base of such data; a subclass reads its items once.

    Attributes:
        steps: of a per-item stage, which sets them when its fit starts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: Iterable[int] = ()
        self._items: list[Item] | None = None

    @abstractmethod
    def read_items(self) -> Sequence[Item]:
        """All items."""

    @property
    def items(self) -> list[Item]:
        """The items, sorted by id."""
        if self._items is None:
            self._items = sorted(self.read_items(), key=lambda item: item.id)
        return self._items

    def setup(self, stage: str) -> None:
        _ = self.items  # all are read before anything is computed: mistakes show at once

    def train_dataloader(self) -> Iterable[int]:
        return self.steps

    def test_dataloader(self) -> DataLoader[Any]:
        """One item a batch, as a list of one."""
        return evaluation_loader(self.items, 1, trainer=self.trainer, collate_fn=list)  # type: ignore[arg-type]

    def predict_dataloader(self) -> DataLoader[Any]:
        """As the test set."""
        return self.test_dataloader()
