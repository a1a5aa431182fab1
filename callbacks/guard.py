"""Stops a run whose losses are no longer numbers."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl

from callbacks.progress import batches_done
from models.errors import UserError


class FiniteGuard(pl.Callback):
    """Checks what the stage logs every ``every_n_steps`` steps (reading a value waits for the GPU).

    Raises:
        UserError: naming the step and the term that is NaN or infinite.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = batches_done(trainer)
        if step % self.every_n_steps:
            return
        for name, value in trainer.callback_metrics.items():
            if not math.isfinite(value):
                raise UserError(f"{name} is {float(value)} at step {step}: lower the learning rate or the loss weights")
