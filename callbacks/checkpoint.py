"""The checkpoints that a killed run continues from."""

from __future__ import annotations

import io
import itertools
import logging
import math
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from callbacks.progress import batches_done
from callbacks.protocol import StageLike
from models.errors import UserError, one_line
from models.files import atomic_write, is_intact, os_errors

log = logging.getLogger(__name__)

LAST, BEST = "last.ckpt", "best.ckpt"
_STEP = re.compile(r"step=(\d+)\.ckpt")


class LastCheckpoint(pl.Callback):
    """Keeps ``OUT/checkpoints/step=N.ckpt`` of the last ``keep`` times, and ``best.ckpt``, each written atomically.

    Saves every ``every_n_batches``, at the end of each epoch, and when a validation was the best so far by the stage's
    ``monitor``. ``last.ckpt`` links to the newest, where links can be; see :func:`checkpoint_to_read` for how it is
    read.

    Batches are counted, not optimiser steps: with two optimisers Lightning's own count may step over every multiple.
    A batch that is validated is saved after that: resumed before, the run would go on without. All others are saved at
    their own end, the last of an epoch too: resumed from the end of an epoch that had no validation, Lightning loses
    the next one.

    A run that does not go on from a checkpoint in its folder leaves those that are there alone: see :func:`set_aside`.

    Raises:
        UserError: when a checkpoint cannot be written; those before are untouched.
    """

    def __init__(self, every_n_batches: int = 500, keep: int = 2) -> None:
        if every_n_batches < 1 or keep < 1:
            raise UserError("every_n_batches and keep must be at least 1")
        self.every_n_batches = every_n_batches
        self.keep = keep
        self._saved = -1
        self._best: float | None = None
        self._is_due = self._is_best = False  # what is saved next
        self._said = False  # that there are no links

    def setup(self, trainer: pl.Trainer, pl_module: StageLike, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFiles()

    def on_train_start(self, trainer: pl.Trainer, pl_module: StageLike) -> None:
        folder, start = folder_of(trainer), trainer.ckpt_path
        goes_on = start is not None and Path(start).resolve().parent == folder.resolve()
        if trainer.is_global_zero and not goes_on and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            set_aside(folder)
        loop = trainer.fit_loop
        if loop._combined_loader is not None and loop._combined_loader_states_to_load:
            # Of a checkpoint from the end of an epoch, where Lightning would begin with the first pass's order again.
            loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: StageLike, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop
        self._is_due = _ends(trainer) or batches_done(trainer) % self.every_n_batches == 0
        if self._is_due and not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):  # type: ignore[arg-type]
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: StageLike) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if pl_module.monitor is not None:
            name, mode = pl_module.monitor
            score = float(trainer.callback_metrics.get(name, math.nan))
            sign = 1 if mode == "max" else -1
            if math.isfinite(score) and (self._best is None or sign * score > sign * self._best):
                self._best, self._is_best = score, True
        if (self._is_due or self._is_best) and not _ends(trainer):
            self.save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: StageLike) -> None:
        self.save(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = state_dict["best"]

    def save(self, trainer: pl.Trainer) -> None:
        """Save now, unless this very batch is saved; all ranks call it together."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        step = batches_done(trainer)
        file = folder_of(trainer) / f"step={step}.ckpt"
        try:
            if self._saved != step:
                self._saved = step
                if trainer.is_global_zero:
                    self._write(trainer, file)
                else:  # gathering the state is collective; rank 0 alone writes
                    trainer.save_checkpoint(file, weights_only=False)
            if self._is_best and trainer.is_global_zero:
                with atomic_write(file.with_name(BEST)) as temporary:
                    shutil.copyfile(file, temporary)
        except UserError as error:
            if isinstance(error.__cause__, OSError):
                raise UserError(f"{error} (it takes about {_bytes(trainer) / 1e6:.1f} MB)") from error
            raise
        self._is_best = False

    def _write(self, trainer: pl.Trainer, file: Path) -> None:
        trainer.save_checkpoint(file, weights_only=False)
        others = [other for other in checkpoints(file.parent) if other != file]
        after = [other for other in others if step_of(other) > step_of(file)]  # of a run that went on from before them
        for other in [*after, *others[len(after) + self.keep - 1 :]]:
            other.unlink()
        link = file.with_name(LAST)
        try:
            with atomic_write(link) as temporary:
                temporary.symlink_to(file.name)
        except UserError:  # exFAT, SMB and Google's drive know no links: the newest is found by its name
            link.unlink(missing_ok=True)
            if not self._said:
                log.info("%s cannot hold links: there is no %s, --ckpt_path last finds the newest", link.parent, LAST)
            self._said = True


def save_now(trainer: pl.Trainer) -> None:
    """Save what a run continues from, where it keeps checkpoints; all ranks call it together and wait for it."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LastCheckpoint):
            callback.save(trainer)
            trainer.strategy.barrier("saved")  # no rank ends while another writes


class CheckpointFiles(TorchCheckpointIO):
    """How checkpoints become files, and come out of them, as numbers and names alone.

    Lightning's own way puts them into the system's temporary folder first, which may be small, and moves them from
    there with their permissions, which some disks have none of.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()  # torch's own errors hide those of the disk
        torch.save(checkpoint, buffer)
        with atomic_write(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        try:
            found = torch.load(path, map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            text = f"{path} holds more than numbers and names, nothing of it was run: {one_line(error)[:200]}"
            raise UserError(text) from error
        except RuntimeError as error:  # another kind of zip
            raise UserError(f"{path} is not a checkpoint: {one_line(error)[:200]}") from error
        if not isinstance(found, dict) or not {"state_dict", "pytorch-lightning_version"} <= found.keys():
            raise UserError(f"{path} is not a checkpoint of a training, though it may hold weights")
        return found


def _ends(trainer: pl.Trainer) -> bool:
    """Whether this batch is the last one of its epoch, or of the run."""
    return trainer.is_last_batch or trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step


def folder_of(trainer: pl.Trainer) -> Path:
    """``OUT/checkpoints``."""
    return Path(trainer.default_root_dir) / "checkpoints"


def step_of(file: Path) -> int:
    """The training batches that went into ``step=N.ckpt``."""
    match = _STEP.fullmatch(file.name)
    assert match is not None
    return int(match[1])


def checkpoints(folder: Path) -> list[Path]:
    """``step=N.ckpt`` in a folder, newest first."""
    return sorted(filter(lambda file: _STEP.fullmatch(file.name), folder.glob("*.ckpt")), key=step_of, reverse=True)


def set_aside(folder: Path) -> None:
    """Rename a folder with checkpoints, before another run saves its own there, which would take their places.

    Raises:
        UserError: when it cannot be renamed.
    """
    kept = checkpoints(folder)
    if not kept and not (folder / BEST).exists():
        return
    place = next(p for n in itertools.count(1) if not (p := folder.with_name(f"{folder.name}.{n}")).exists())
    with os_errors(folder, "rename"):
        os.rename(folder, place)
    step = f", up to step {step_of(kept[0])}," if kept else ""
    log.warning(
        "this run does not go on from the checkpoints in its folder: those of an earlier one%s are kept in %s; "
        "--ckpt_path last would have continued it, --ckpt_path %s still does",
        *(step, place, place / (kept[0].name if kept else BEST)),
    )


def checkpoint_to_read(path: Path) -> Path:
    """The checkpoint that ``path`` stands for: for a ``last.ckpt`` the newest beside it that is intact.

    Raises:
        UserError: when there is none, or ``path`` is another file that is damaged or none.
    """
    found = checkpoints(path.parent) if path.name == LAST else []
    damaged: list[str] = []
    for file in found or [path]:
        if not file.exists():
            raise UserError(f"there is no checkpoint {file}")
        if is_intact(file):  # torch.load does not check
            if damaged:
                names = f"{' and '.join(damaged)} {'is' if len(damaged) == 1 else 'are'}"
                rank_zero_only(log.warning)(
                    "%s damaged: continuing from %s, step %d", f"{path.parent}/{names}", file, step_of(file)
                )
            return file
        damaged.append(file.name)
    if found:
        raise UserError(
            f"no checkpoint in {path.parent} can be read ({', '.join(damaged)}): remove the folder to start again"
        )
    raise UserError(f"{path} is not a checkpoint, or damaged")


def _bytes(trainer: pl.Trainer) -> int:
    """Of all weights, and of what the optimisers remember of them."""
    slots = [slot for optimizer in trainer.optimizers for slot in optimizer.state.values()]
    values = [*trainer.lightning_module.state_dict().values(), *(v for slot in slots for v in slot.values())]
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))
