"""Learning rates over a run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from torch.optim import Optimizer

Schedule = Literal["constant", "cosine"]


def rate(schedule: Schedule, step: int, steps: int, final: float = 0.05) -> float:
    """Share of the full learning rate at ``step`` of ``steps``; "cosine" falls to ``final``."""
    return 1.0 if schedule == "constant" else final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / steps))


def projector_rate(at: float) -> float:
    """Share of the full learning rate at ``at``, from 0 to 1, of StyleGAN2's projector: it rises over the first 5 %
    and falls to 0, as a cosine, over the last 25 %."""
    rise, fall = min(1.0, at / 0.05), min(1.0, (1 - at) / 0.25)
    return rise * (0.5 - 0.5 * math.cos(math.pi * fall))


def set_rates(optimizers: Iterable[Optimizer], share: float) -> None:
    """Bring all learning rates to this share of those that the optimisers were made with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * share
