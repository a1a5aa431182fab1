"""Progress with the time left: bars on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import math
import sys
import time
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar, RichProgressBar


def progress() -> ProgressBar:
    """The progress display that suits standard output."""
    return Bars() if sys.stdout.isatty() else Lines()


def batches_done(trainer: pl.Trainer) -> int:
    """Training batches of the whole run so far, those before a resume included; right inside the batch hooks."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]


class Bars(RichProgressBar):
    """Rich bars with elapsed and remaining time."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # the logger's version says nothing about the run
        return metrics


class Lines(ProgressBar):
    """One line every ``seconds``: done, total, speed, time left and the last metrics."""

    def __init__(self, seconds: float = 10.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._last = 0.0
        self._clocks: dict[str, tuple[float, int]] = {}  # by kind of run, when it started and what was done then

    @property
    def is_enabled(self) -> bool:
        return self._enabled

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **_: Any) -> None:
        print(*args, flush=True)

    def _begin(self, what: str, done: int = 0) -> None:
        self._last = time.monotonic()
        self._clocks[what] = self._last, done

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin("fit", batches_done(trainer))  # a resumed run starts to count here

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin("validate")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin("test")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin("predict")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        done = batches_done(trainer)
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else math.inf
        total = self.total_train_batches * epochs
        if trainer.max_steps > 0 and trainer.global_step:  # may count several optimiser steps per batch
            total = min(total, done * trainer.max_steps / trainer.global_step)
        metrics = {k: float(v) for k, v in trainer.progress_bar_metrics.items() or trainer.logged_metrics.items()}
        self._line("fit", done, total, metrics)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, o: Any, b: Any, i: int, d: int = 0) -> None:
        if not trainer.sanity_checking and not trainer.training:
            self.has_dataloader_changed(d)  # remembers which loader the total is of
            self._line("validate", i + 1, self.total_val_batches_current_dataloader, {})

    def on_test_batch_end(self, trainer: Any, pl_module: Any, o: Any, b: Any, i: int, d: int = 0) -> None:
        self.has_dataloader_changed(d)
        self._line("test", i + 1, self.total_test_batches_current_dataloader, {})

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, o: Any, b: Any, i: int, d: int = 0) -> None:
        self.has_dataloader_changed(d)
        self._line("predict", i + 1, self.total_predict_batches_current_dataloader, {})

    def _line(self, what: str, done: int, total: float, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        if not self._enabled or (now - self._last < self.seconds and done < total):
            return
        self._last = now
        start, before = self._clocks[what]
        rate = (done - before) / max(now - start, 1e-9)
        text = f"{what} {done}"
        if math.isfinite(total):
            text += f"/{round(total)}, {timedelta(seconds=round(max(total - done, 0) / rate))} left"
        values = "".join(f", {name} {value:.4g}" for name, value in sorted(metrics.items()) if name != "v_num")
        print(f"{text}, {rate:.2f} it/s{values}", flush=True)
