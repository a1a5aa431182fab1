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
    """Writes ``OUT/steps.json``: ``seconds`` of each training step, of them ``cpu`` seconds of all threads, which what
    else the machine does hardly changes; ``peak_mib`` of a GPU's memory after the first step, and ``rss_mib``, the most
    that the whole process held of the machine's."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if len(self.seconds) == 1:  # the first also prepares, and finds out which kernels are fast
            forget_peak(pl_module.device)
        synchronize(pl_module.device)
        self._begin, self._cpu = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        synchronize(pl_module.device)
        self.seconds.append(time.perf_counter() - self._begin)
        self.cpu.append(time.process_time() - self._cpu)

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * BYTES / 2**20
        found = {"seconds": self.seconds, "cpu": self.cpu, "whole_cpu": time.process_time()}
        found |= {"peak_mib": peak_mib(pl_module.device), "rss_mib": rss}
        (pl_module.out / FILE).write_text(json.dumps(found))
