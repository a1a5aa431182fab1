"""Losses that order embeddings and distances."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def supervised_contrastive(embedding: Tensor, label: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, Eq. 2); with two views an item it is NT-Xent.

    Args:
        embedding: (B, D) unit vectors.
        label: (B,) integers; equal labels are positives. An item without a positive is left out.
        temperature: divides the cosines.

    Returns:
        Scalar; 0 when no item has a positive.
    """
    itself = torch.eye(len(embedding), dtype=torch.bool, device=embedding.device)
    logits = (embedding @ embedding.T / temperature).masked_fill(itself, float("-inf"))
    log_probability = logits - logits.logsumexp(1, keepdim=True)
    positive = (label[:, None] == label[None]) & ~itself
    count = positive.sum(1)
    mean_positive = -log_probability.masked_fill(~positive, 0.0).sum(1) / count.clamp(min=1)
    return mean_positive.sum() / (count > 0).sum().clamp(min=1)


def ranking(near: Tensor, far: Tensor, sharpness: float = 4.0) -> Tensor:
    """Two-alternative ranking loss: log-odds that ``far`` is judged further than ``near``.

    Args:
        near, far: (B,) positive distances, compared by ratio.
        sharpness: slope of the odds over the log ratio.

    Returns:
        (B,) losses, log 2 at a tie.
    """
    ratio = torch.log(far + 1e-8) - torch.log(near + 1e-8)
    return F.softplus(-sharpness * ratio)
