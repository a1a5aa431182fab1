"""Stops a run whose numbers are no longer numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from callbacks.checkpoint import checkpoints, folder_of
from callbacks.progress import batches_done
from callbacks.protocol import StageLike
from models.errors import UserError

LEAST_SCALE = 2.0**-10  # of losses under 16-mixed: 26 steps in a row were skipped from the first one, 2^16, on


class FiniteGuard(pl.Callback):
    """Checks what training logs, and the state before each checkpoint: none with a NaN takes a good one's place.

    Reading a value waits for the GPU: those of the last steps are read together, every ``every_n_steps`` and before a
    checkpoint. All ranks stop together. So does a run under ``16-mixed`` whose steps are all skipped.

    Raises:
        UserError: naming the first step and term that was NaN or infinite, and the last good checkpoint.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        self.every_n_steps = every_n_steps
        self._logged: list[tuple[int, dict[str, Tensor]]] = []  # since the last check

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: StageLike, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = batches_done(trainer)
        terms = {name: value for name, value in trainer.callback_metrics.items() if not name.startswith("val/")}
        self._logged.append((step, terms))
        if step % self.every_n_steps == 0:
            self._check(trainer, pl_module, self._terms() or _lost_scale(trainer))

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: StageLike, checkpoint: dict[str, Any]) -> None:
        found = self._terms()
        if found is None and (name := next(not_finite(checkpoint), None)) is not None:
            found = f"{name} is not finite at step {batches_done(trainer)}"
        self._check(trainer, pl_module, found)

    def _terms(self) -> str | None:
        """The first term that was not finite."""
        logged, self._logged = self._logged, []
        for step, terms in logged:
            for name, value in terms.items():
                if not math.isfinite(value):
                    return f"{name} is {float(value)} at step {step}"
        return None

    def _check(self, trainer: pl.Trainer, stage: StageLike, found: str | None) -> None:
        if stage.agree(found is not None):
            good = checkpoints(folder_of(trainer))
            last = f"the last good checkpoint is {good[0]}" if good else "no checkpoint was saved before"
            found = found or "another process met a number that is not finite"
            raise UserError(f"{found}: lower the learning rate or the loss weights; {last}")


def _lost_scale(trainer: pl.Trainer) -> str | None:
    """What is wrong when ``16-mixed`` skips step after step, halving its loss scale, and so learns nothing."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or (scale := scaler.get_scale()) > LEAST_SCALE:
        return None
    return f"no gradient fits float16 at step {batches_done(trainer)} (loss scale {scale:.2g}; bf16-mixed may do)"


def not_finite(checkpoint: dict[str, Any]) -> Iterator[str]:
    """Names of the weights and optimiser states in a checkpoint that hold a NaN or an infinity."""
    for name, value in checkpoint["state_dict"].items():
        if isinstance(value, Tensor) and not value.isfinite().all():
            yield name
    for number, optimizer in enumerate(checkpoint["optimizer_states"]):
        for index, slot in optimizer["state"].items():
            for name, value in slot.items():
                if isinstance(value, Tensor) and not value.isfinite().all():
                    yield f"{name} of parameter {index} in optimizer {number}"
