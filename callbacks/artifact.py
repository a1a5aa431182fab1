"""Writes what a stage hands on when it is done."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from callbacks.progress import batches_done
from models import artifact


class ExportArtifact(pl.Callback):
    """Saves ``stage.export()`` as ``OUT/artifact`` at the end of fit and predict, on rank 0 after all ranks.

    The artifact's metrics also go to the loggers, as ``final/NAME``.
    """

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        trainer.strategy.barrier("before export")
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            metrics = self.export(pl_module)
            for logger in trainer.loggers if metrics else ():
                logger.log_metrics({f"final/{name}": value for name, value in metrics.items()}, batches_done(trainer))
                logger.save()
        trainer.strategy.barrier("after export")

    on_predict_end = on_fit_end

    def export(self, stage: Any) -> dict[str, float]:
        """Save the artifact now, if the stage hands one on; returns its metrics."""
        if (content := stage.export()) is None:
            return {}
        parents, step_hash = stage.inputs, stage.step_hash
        artifact.save(stage.out / "artifact", stage=stage.name, parents=parents, step_hash=step_hash, **content)
        return content.get("metrics", {})
