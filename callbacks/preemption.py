"""Leaves in good order when the scheduler wants the machine back."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Any

import pytorch_lightning as pl

from callbacks.checkpoint import save_now
from callbacks.progress import batches_done
from callbacks.protocol import StageLike

log = logging.getLogger(__name__)

PREEMPTED = os.EX_TEMPFAIL


class Preemption(pl.Callback):
    """After ``SIGUSR1`` the stage saves itself between two batches and the process ends with ``PREEMPTED``.

    The same command continues it at that very batch. Lightning's own handler would save at once, in the middle of a
    step; so it finds the signal taken. Comes last, after the callbacks that save.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: StageLike, stage: str) -> None:
        self._before = signal.signal(signal.SIGUSR1, self._ask)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        signal.signal(signal.SIGUSR1, self._before)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: StageLike, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_last_batch:  # resumed after it, the epoch's validation would be left out
            self._leave_if_asked(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: StageLike) -> None:
        self._leave_if_asked(trainer, pl_module)

    def _leave_if_asked(self, trainer: pl.Trainer, stage: StageLike) -> None:
        if stage.agree(self._asked):
            stage.save_progress()
            save_now(trainer)
            log.info("asked to stop: saved after %d batches", batches_done(trainer))
            sys.exit(PREEMPTED)

    def on_test_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if self._asked and trainer.state.fn != "fit":  # nothing to save: what is finished is in files
            log.info("asked to stop: stopped between two batches")
            sys.exit(PREEMPTED)

    on_validation_batch_end = on_predict_batch_end = on_test_batch_end
