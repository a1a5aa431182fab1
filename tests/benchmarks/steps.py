"""What the steps of a stage cost, measured inside its own process."""

from __future__ import annotations

import json
import resource
import time
from typing import Any

import pytorch_lightning as pl

from tests.benchmarks.gpu.parts import forget_peak, peak_mib, synchronize
from tests.benchmarks.zoo import BYTES

FILE = "steps.json"


class Steps(pl.Callback):
    """Writes ``OUT/steps.json``: ``seconds`` of each training step, ``peak_mib`` of a GPU's memory after the first, and
    ``rss_mib``, the most that the whole process held of the machine's."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if len(self.seconds) == 1:  # the first also prepares, and finds out which kernels are fast
            forget_peak(pl_module.device)
        synchronize(pl_module.device)
        self._begin = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        synchronize(pl_module.device)
        self.seconds.append(time.perf_counter() - self._begin)

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * BYTES / 2**20
        found = {"seconds": self.seconds, "peak_mib": peak_mib(pl_module.device), "rss_mib": rss}
        (pl_module.out / FILE).write_text(json.dumps(found))
