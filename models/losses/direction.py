"""Direction losses in the space of an image embedding (3DArtmator, Eq. 4-7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class PerItem:
    """A loss for each item.

    Attributes:
        loss: (B,), exactly 0 and without gradient where not valid.
        valid: (B,) bool.
    """

    loss: Tensor
    valid: Tensor

    def mean(self) -> Tensor:
        """Mean over the valid items; 0 when there is none."""
        return self.loss.sum() / self.valid.sum().clamp(min=1)


def displacement(after: Tensor, before: Tensor, normalize_embedding: bool = True) -> Tensor:
    """after - before of embeddings (B, D), each brought to unit length first unless told otherwise (Eq. 4 and 6)."""
    if normalize_embedding:
        after, before = F.normalize(after, dim=-1), F.normalize(before, dim=-1)
    return after - before


def directional_loss(guide: Tensor, delta: Tensor, eps: float = 1e-8) -> PerItem:
    """1 - cos(guide, delta) (Eq. 5 and 7).

    Where the tuned generator still equals the original, ``delta`` is 0 and its direction undefined; such an item,
    any with a squared norm up to ``eps``, contributes neither loss nor gradient.

    Args:
        guide: (D,) or (B, D), E(I_ref) - E(G_ori(z*, theta)) (Eq. 4).
        delta: (B, D), E(G_trn(z*, theta_i)) - E(G_ori(z*, theta_i)) (Eq. 6).
        eps: floor of the squared norms.
    """
    guide = guide.expand_as(delta)
    guide_square, delta_square = guide.square().sum(-1), delta.square().sum(-1)
    valid = (guide_square > eps) & (delta_square > eps)
    norms = guide_square.clamp(min=eps).sqrt() * delta_square.clamp(min=eps).sqrt()
    loss = 1 - (guide * delta).sum(-1) / norms
    return PerItem(torch.where(valid, loss, torch.zeros_like(loss)), valid)


def directional_l2(guide: Tensor, delta: Tensor, eps: float = 1e-8) -> PerItem:
    """|delta - guide|^2 / |guide|^2: asks for the length as well, and is smooth at delta = 0, where it is 1.

    Args:
        guide: (D,) or (B, D). delta: (B, D). eps: items whose guide has a squared norm up to it are not valid.
    """
    guide = guide.expand_as(delta)
    square = guide.square().sum(-1)
    valid = square > eps
    loss = (delta - guide).square().sum(-1) / square.clamp(min=eps)
    return PerItem(torch.where(valid, loss, torch.zeros_like(loss)), valid)
