"""Writes what a stage hands on when it is done."""

from __future__ import annotations

import pytorch_lightning as pl

from callbacks.dashboard import Dashboard
from callbacks.progress import batches_done
from callbacks.protocol import StageLike
from models import artifact
from models.errors import UserError
from models.metrics.records import FILE, holds_records


class ExportArtifact(pl.Callback):
    """Saves ``stage.export()`` as ``OUT/artifact`` at the end of fit and predict, on rank 0 after all ranks.

    The artifact's metrics also go to the loggers, as ``final/NAME``; to the dashboard, as a table too, as what ``test``
    measures, and the artifact by reference.
    """

    def on_fit_end(self, trainer: pl.Trainer, pl_module: StageLike) -> None:
        trainer.strategy.barrier("before export")
        if trainer.state.fn == "fit" and not batches_done(trainer) and not pl_module.resumes_itself:
            raise UserError(
                "nothing was trained, so that nothing is handed on: there was no batch (trainer.max_steps, max_epochs "
                "and limit_train_batches, and the size of the data)"
            )
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            saved = self.export(pl_module)
            if saved is not None:
                _log(saved, trainer)
        trainer.strategy.barrier("after export")

    on_predict_end = on_fit_end  # type: ignore[assignment]

    def on_test_end(self, trainer: pl.Trainer, pl_module: StageLike) -> None:
        records = pl_module.out / FILE
        if trainer.is_global_zero and records.exists() and holds_records(records):
            for logger in trainer.loggers:
                if isinstance(logger, Dashboard):
                    logger.log_csv("final/records", records, batches_done(trainer))

    def export(self, stage: StageLike) -> artifact.Artifact | None:
        """Save the artifact now, if the stage hands one on."""
        if (content := stage.export()) is None:
            return None
        about = {"stage": stage.name, "parents": stage.inputs, "step_hash": stage.step_hash}
        return artifact.save(stage.out / "artifact", **about, **vars(content))


def _log(saved: artifact.Artifact, trainer: pl.Trainer) -> None:
    step, metrics = batches_done(trainer), {n: v for n, v in saved.metrics.items() if v is not None}
    for logger in trainer.loggers:
        if metrics:
            logger.log_metrics({f"final/{name}": value for name, value in metrics.items()}, step)
            logger.save()
        if isinstance(logger, Dashboard):
            if metrics:
                logger.log_table("final/metrics", ["metric", "value"], sorted(metrics.items()), step)
            facts = {"id": saved.id, "step_hash": saved.manifest["step_hash"], "licence": saved.licence}
            logger.log_artifact(saved.path, saved.stage, facts | {"metrics": metrics})
