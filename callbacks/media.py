"""Pictures of a running stage, to files and to the dashboard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from callbacks.dashboard import Dashboard
from callbacks.progress import batches_done
from callbacks.protocol import StageLike
from models.image import write_image, write_video


class MediaPanels(pl.Callback):
    """Shows ``stage.panels()`` every ``every_n_steps`` steps and at the end of fit and predict, on rank 0.

    A panel is an image (3, H, W) or frames (T, 3, H, W) in [-1, 1]. Files: ``OUT/panels/NAME/STEP.png|mp4``.
    """

    def __init__(self, every_n_steps: int = 250) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: StageLike, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = batches_done(trainer)
        if step % self.every_n_steps == 0:
            self._show(trainer, pl_module, step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: StageLike) -> None:
        step = batches_done(trainer)
        if step % self.every_n_steps != 0:
            self._show(trainer, pl_module, step)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: StageLike) -> None:
        self._show(trainer, pl_module, 0)

    def _show(self, trainer: pl.Trainer, pl_module: StageLike, step: int) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for name, panel in pl_module.panels().items():
            path = write_panel(pl_module.out / "panels" / name, step, panel)
            for logger in trainer.loggers:
                if isinstance(logger, Dashboard):
                    logger.log_media(f"panels/{name}", path, step)


def write_panel(folder: Path, step: int, panel: Tensor) -> Path:
    """Write an image (3, H, W) or frames (T, 3, H, W) as ``folder/STEP.png`` or ``.mp4``; returns the path."""
    path = folder / f"{step:07d}{'.png' if panel.ndim == 3 else '.mp4'}"
    if panel.ndim == 3:
        write_image(path, panel)
    else:
        write_video(path, panel)
    return path
