"""A callback that has the scheduler ask its job to leave, at known batches."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import Any

import pytorch_lightning as pl

from callbacks.progress import batches_done


class Interrupt(pl.Callback):
    """The first time the job is started it is asked to leave after ``first`` batches, the second after ``second``."""

    def __init__(self, first: int, second: int = 0) -> None:
        self.moments = [first, second]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        if restarts < 2 and batches_done(trainer) == self.moments[restarts]:
            taken = signal.getsignal(signal.SIGUSR1)
            arrived = []
            signal.signal(signal.SIGUSR1, lambda *event: arrived.append(taken(*event)))  # type: ignore[operator]
            if trainer.is_global_zero:
                task = os.environ.get("SLURM_ARRAY_TASK_ID")  # the last one's job has the number of the whole array
                job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}" if task else os.environ["SLURM_JOB_ID"]
                subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
            deadline = time.monotonic() + 120
            while not arrived and time.monotonic() < deadline:
                time.sleep(0.05)
