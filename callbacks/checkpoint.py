"""The checkpoint a killed run continues from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from callbacks.progress import batches_done
from models.errors import UserError
from models.files import atomic_write


class LastCheckpoint(pl.Callback):
    """Keeps ``OUT/checkpoints/last.ckpt`` every ``every_n_batches`` and at the end of each epoch, atomically.

    The last batch of an epoch waits for its end: resumed before that, the epoch's validation would be left out.
    Batches are counted, not optimiser steps: with two optimisers Lightning's own count may step over every multiple.
    """

    def __init__(self, every_n_batches: int = 500) -> None:
        self.every_n_batches = every_n_batches
        self._saved = -1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batches_done(trainer) % self.every_n_batches == 0 and not trainer.is_last_batch:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Save now, unless this very batch is saved; all ranks call it together."""
        if trainer.fast_dev_run or self._saved == batches_done(trainer):  # type: ignore[attr-defined]
            return
        self._saved = batches_done(trainer)
        path = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        if trainer.is_global_zero:
            try:
                with atomic_write(path) as temporary:
                    trainer.save_checkpoint(temporary, weights_only=False)
            except UserError as error:
                raise UserError(f"{error} (it takes about {_bytes(trainer) / 1e6:.1f} MB)") from error
        else:  # gathering the state is collective; rank 0 alone writes
            trainer.save_checkpoint(path, weights_only=False)


def _bytes(trainer: pl.Trainer) -> int:
    """Of all weights, and of what the optimisers remember of them."""
    slots = [slot for optimizer in trainer.optimizers for slot in optimizer.state.values()]
    values = [*trainer.lightning_module.state_dict().values(), *(v for slot in slots for v in slot.values())]
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))
