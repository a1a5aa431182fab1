"""What ranks exchange where Lightning leaves it to a stage."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn


def broadcast(module: nn.Module) -> None:
    """Give all ranks the parameters and buffers of rank 0."""
    if torch.distributed.is_initialized():
        for tensor in module.state_dict().values():
            torch.distributed.broadcast(tensor, 0)


def average_gradients(module: nn.Module) -> None:
    """Replace gradients by their mean over all ranks, which must have them for the same parameters."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    if torch.distributed.is_initialized() and gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def gather(found: list[Any]) -> list[Any]:
    """What all ranks found, rank after rank."""
    if not torch.distributed.is_initialized():
        return found
    lists: list[list[Any]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(lists, found)
    return [entry for part in lists for entry in part]


def collect(found: list[Any]) -> list[Any]:
    """As :func:`gather` on rank 0, and nothing on the others: for what is large."""
    if not torch.distributed.is_initialized():
        return found
    lists: list[Any] = [[] for _ in range(torch.distributed.get_world_size())]
    first = torch.distributed.get_rank() == 0
    torch.distributed.gather_object(found, lists if first else None)
    return [entry for part in lists for entry in part] if first else []


def means(scores: list[dict[str, Tensor]]) -> dict[str, float]:
    """Mean of each score (B,) over the items of all batches and all ranks, to be called by all ranks.

    Ranks may have different numbers of items, which Lightning's ``sync_dist`` does not weigh right.
    """
    found = gather([{name: values.detach().cpu().double() for name, values in batch.items()} for batch in scores])
    return {name: float(torch.cat([batch[name] for batch in found]).mean()) for name in (found[0] if found else ())}


class IndependentRanks(DDPStrategy):
    """Ranks whose gradients Lightning leaves alone: no wrapper."""

    strategy_name = "independent_ranks"

    def configure_ddp(self) -> None:
        """Leave the module as it is."""
