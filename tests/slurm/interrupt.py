"""Callbacks of jobs that the scheduler asks to leave, at known batches."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

from callbacks.progress import batches_done


class Interrupt(pl.Callback):
    """The first time the job is started it is asked to leave after ``first`` batches, the second after ``second``."""

    def __init__(self, first: int, second: int = 0) -> None:
        self.moments = [first, second]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._leave(trainer, batches_done(trainer))

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._leave(trainer, batch_idx + 1)

    def _leave(self, trainer: pl.Trainer, done: int) -> None:
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        if restarts < 2 and done == self.moments[restarts]:
            wait_for_signal(self._ask if trainer.is_global_zero else None)

    @staticmethod
    def _ask() -> None:
        task = os.environ.get("SLURM_ARRAY_TASK_ID")  # the last one's job has the number of the whole array
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}" if task else os.environ["SLURM_JOB_ID"]
        subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)


class UntilTimeLimit(pl.Callback):
    """After ``batches`` batches the job waits until the scheduler itself asks it to leave; resumed, it goes on."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batches_done(trainer) == self.batches:
            wait_for_signal()


def wait_for_signal(ask: Callable[[], None] | None = None) -> None:
    """Call ``ask`` and wait for the signal that answers, for four minutes at most."""
    taken = signal.getsignal(signal.SIGUSR1)
    arrived = []
    signal.signal(signal.SIGUSR1, lambda *event: arrived.append(taken(*event)))  # type: ignore[operator]
    if ask is not None:
        ask()
    deadline = time.monotonic() + 240
    while not arrived and time.monotonic() < deadline:
        time.sleep(0.05)
