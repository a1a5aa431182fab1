"""Toy stages for the tests of the base and the command line; also a program: ``python toy.py toy fit ...``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import safetensors.torch
import torch
from torch import Tensor, nn

from datamodules.artworks import Artwork
from datamodules.items import ItemsDataModule
from datamodules.resumable import ResumableLoader
from models.artifact import Export
from models.files import atomic_write
from stages.base.per_item import GroupState, PerItemStage
from stages.base.seeds import item_generator
from stages.base.stage import Stage


class Rows(nn.Module):
    """One row of parameters per item."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(count, 5))


class ToyPerArtwork(PerItemStage[Artwork, GroupState[Artwork]]):
    """Follows a random target per item and step.

    Args:
        kill_at: (group's first id, step) as "id:step": the process kills itself before this step.
        weight: of the loss.
    """

    name = "toy"

    def __init__(self, kill_at: str | None = None, weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kill_at = kill_at
        self.weight = weight

    def start_group(self, items: Sequence[Artwork]) -> GroupState[Artwork]:
        module = Rows(len(items))
        return GroupState(items, module, {"rows": torch.optim.Adam(module.parameters(), 0.05)})

    def optimise(self, state: GroupState[Artwork], step: int) -> dict[str, Tensor]:
        if self.kill_at == f"{state.items[0].id}:{step}":
            os.kill(os.getpid(), signal.SIGKILL)
        targets = [torch.randn(5, generator=item_generator(self.seed, item.id, step)) for item in state.items]
        stray = torch.rand(())  # a draw that forgot its generator
        distance = (state.module.rows - torch.stack(targets)).square().sum(1)  # type: ignore[operator]
        return {"loss": distance * self.weight * (1 + stray), "distance": distance}

    def before_step(self, state: GroupState[Artwork]) -> None:
        (gradient,) = (p.grad for p in state.module.parameters())
        gradient.div_(gradient.norm(dim=1, keepdim=True).clamp(min=1))  # each item's by itself

    def finish_group(self, state: GroupState[Artwork]) -> None:
        for item, row in zip(state.items, state.module.rows, strict=True):  # type: ignore[arg-type]
            with atomic_write(self.item_dir(item.id) / "result.safetensors") as file:
                file.write_bytes(safetensors.torch.save({"row": row.detach().clone()}))

    def export(self) -> Export:
        rows = {
            item.id: safetensors.torch.load_file(self.item_dir(item.id) / "result.safetensors")["row"].tolist()
            for item in self.items
        }
        return Export(extra={"rows": rows}, metrics={"items": len(rows)})


class ToyArtworks(ItemsDataModule[Artwork]):
    """``count`` artworks without files, in an order that is not theirs."""

    def __init__(self, count: int = 5) -> None:
        super().__init__()
        self.count = count

    def read_items(self) -> list[Artwork]:
        return [Artwork(f"i{k}", torch.full((3, 4, 4), k / 10)) for k in reversed(range(self.count))]


class ToyTraining(Stage):
    """A line with noise from the global generators of torch."""

    name = "training"

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__()
        self.rate = rate

    def build_model(self) -> None:
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.layer(batch + torch.randn_like(batch)) - 1).square().mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.rate)

    def panels(self) -> dict[str, Tensor]:
        return {"weights": self.layer.weight.detach().reshape(1, 1, 2).expand(3, 16, 2)}


class ToyData(pl.LightningDataModule):
    """Twelve batches (4, 2) a pass."""

    def train_dataloader(self) -> ResumableLoader[Tensor]:
        rows = torch.linspace(-1, 1, 96).reshape(48, 2)
        return ResumableLoader(rows, batch_size=4, trainer=self.trainer)  # type: ignore[arg-type]


class Threads(pl.Callback):
    """Tells how many CPU threads a rank has."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        print(f"{torch.get_num_threads()} threads", flush=True)


STAGES = {"toy": ToyPerArtwork, "training": ToyTraining}

if __name__ == "__main__":
    from stages import __main__, table

    sys.modules["toy"] = sys.modules["__main__"]
    table.STAGES.update({name: (f"toy:{cls.__name__}", "a toy") for name, cls in STAGES.items()})
    sys.exit(__main__.main())
