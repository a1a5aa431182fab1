"""Loaders that continue at their exact batch, loaders that show each item once, and the base of data with both."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from models.errors import UserError

T = TypeVar("T")


class ResumableLoader(DataLoader[T]):
    """Shuffled full batches whose order depends on the seed, the pass and the number of ranks only.

    Lightning stores :meth:`state_dict` in every checkpoint. Without it a run that is resumed within an epoch
    would see that epoch's first batches again.

    Args:
        dataset: with a length.
        batch_size: per rank; a last batch that would be smaller is left out.
        seed: of the order.
        trainer: tells the rank; ``None`` for a single process.
        options: of ``DataLoader``: workers, collation.

    Attributes:
        waited: seconds that batches were waited for, in all.
    """

    def __init__(
        self, dataset: Dataset[T], batch_size: int, *, seed: int = 0, trainer: pl.Trainer | None = None, **options: Any
    ) -> None:
        self.passes = 0
        self.position = 0  # batches of this pass that were handed out
        self.waited = 0.0
        order = _Order(self, dataset, batch_size, seed, trainer)
        # Its own generator: iterating must not advance the global one, which a resumed run restores.
        super().__init__(
            dataset, batch_size, sampler=order, drop_last=True, generator=torch.Generator().manual_seed(seed), **options
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.position >= len(self):
            self.passes, self.position = self.passes + 1, 0
        batches = super().__iter__()
        while True:
            begin = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - begin
            if batch is None:
                return
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where the loader is."""
        return {"passes": self.passes, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self.passes, self.position = state["passes"], state["position"]


class _Order(DistributedSampler[Any]):
    """Being a DistributedSampler, it is left alone by Lightning, which would replace any other."""

    def __init__(
        self,
        loader: ResumableLoader[Any],
        dataset: Dataset[Any],
        batch_size: int,
        seed: int,
        trainer: pl.Trainer | None,
    ) -> None:
        world, rank = (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)
        super().__init__(dataset, num_replicas=world, rank=rank, shuffle=True, seed=seed, drop_last=True)
        self.loader = loader
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Any]:
        self.epoch = self.loader.passes
        yield from list(super().__iter__())[self.loader.position * self.batch_size :]

    def set_epoch(self, epoch: int) -> None:
        """The loader counts its passes itself: on resume, Lightning tells the epoch too late for workers."""


class _Share(DistributedSampler[Any]):
    """Every item in order, dealt out to the ranks in turn."""

    def __init__(self, dataset: Dataset[Any], trainer: pl.Trainer | None) -> None:
        world, rank = (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)
        super().__init__(dataset, num_replicas=world, rank=rank, shuffle=False)
        self.share = range(rank, len(dataset), world)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.share)

    def __len__(self) -> int:
        return len(self.share)


def evaluation_loader(
    dataset: Dataset[T], batch_size: int, *, trainer: pl.Trainer | None = None, **options: Any
) -> DataLoader[T]:
    """Batches in order, in which each item is on one rank and there once.

    Lightning's own sampler fills ranks up with items of others, which then count twice.

    Args:
        dataset: with a length.
        batch_size: per rank; the last batch may be smaller.
        trainer: tells the rank; ``None`` for a single process.
        options: of ``DataLoader``: workers, collation.

    Raises:
        UserError: when there are more ranks than items: one with nothing to do would keep the others waiting.
    """
    share = _Share(dataset, trainer)
    count = len(dataset)  # type: ignore[arg-type]
    if 0 < count < share.num_replicas:
        raise UserError(f"{share.num_replicas} processes cannot share {count} items: use at most {count}")
    return DataLoader(dataset, batch_size=batch_size, sampler=share, **options)


class SplitDataModule(pl.LightningDataModule):
    """Base of data that comes as train, val and test sets: their loaders. ``setup`` of a subclass fills ``datasets``.

    Args:
        batch_size: items per batch.
        workers: loader processes.
        seed: of the order of the training set.
        order: for another order of the same set.
    """

    def __init__(self, batch_size: int, workers: int, seed: int, order: int = 0) -> None:
        super().__init__()
        self.batch_size, self.workers, self.seed, self.order = batch_size, workers, seed, order
        self.datasets: dict[str, Any] = {}

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of the train split; an interrupted run continues at its exact batch."""
        data = self.datasets["train"]
        size = min(self.batch_size, len(data))
        return ResumableLoader(data, size, seed=self.seed + self.order, trainer=self.trainer, **self._workers)

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of the val split, in order."""
        return evaluation_loader(self.datasets["val"], self.batch_size, trainer=self.trainer, **self._workers)

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test split, in order."""
        return evaluation_loader(self.datasets["test"], self.batch_size, trainer=self.trainer, **self._workers)

    def predict_dataloader(self) -> DataLoader[Any]:
        """As the test set."""
        return self.test_dataloader()

    @property
    def _workers(self) -> dict[str, Any]:
        return {"num_workers": self.workers, "persistent_workers": self.workers > 0}
