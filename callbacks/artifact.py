"""Writes what a stage hands on when it is done."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from models import artifact


class ExportArtifact(pl.Callback):
    """Saves ``stage.export()`` as ``OUT/artifact`` at the end of fit and predict, on rank 0 after all ranks."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        trainer.strategy.barrier("before export")
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.export(pl_module)
        trainer.strategy.barrier("after export")

    on_predict_end = on_fit_end

    def export(self, stage: Any) -> None:
        """Save the artifact now, if the stage hands one on."""
        if (content := stage.export()) is not None:
            parents, step_hash = stage.inputs, stage.step_hash
            artifact.save(stage.out / "artifact", stage=stage.name, parents=parents, step_hash=step_hash, **content)
