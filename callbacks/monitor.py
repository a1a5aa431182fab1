"""How fast a training goes and how healthy it is."""

from __future__ import annotations

import math
import resource
import sys
import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch.optim import Optimizer

from callbacks.progress import batches_done
from callbacks.protocol import StageLike


class Monitor(pl.Callback):
    """Logs to every logger, each ``trainer.log_every_n_steps`` steps, on rank 0:

    - ``speed/images_per_s``, ``speed/steps_per_s``: since the last record, of all ranks, without validation;
    - ``speed/data_wait``: share of that time spent waiting for the next batch, where the loader measures it;
    - ``memory/peak_gb``, ``memory/gpu_peak_gb``: most that this process has held so far;
    - ``lr/NETWORK``, ``gradient_norm/NETWORK``, ``gradient_norm/total``: of the stage's networks that step, gradients
      as they are before clipping; a norm that overflowed under 16-mixed is left out.

    When a run begins, the ids of its input artifacts and its step hash go to the loggers' hyperparameters.
    """

    def __init__(self) -> None:
        self._due = False  # whether the current step is recorded
        self._begin = self._paused = self._waited = 0.0
        self._steps = self._images = 0
        self._squares: dict[str, float] = {}
        self._rates: dict[str, float] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: StageLike) -> None:
        inputs = {role: artifact.id for role, artifact in pl_module.inputs.items()}
        for logger in trainer.loggers:
            logger.log_hyperparams({"inputs": inputs, "step_hash": pl_module.step_hash})

    on_test_start = on_predict_start = on_fit_start  # type: ignore[assignment]

    def on_train_start(self, trainer: pl.Trainer, pl_module: StageLike) -> None:
        self._restart(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: StageLike) -> None:
        self._paused = time.monotonic()
        if trainer.state.fn == "validate":
            self.on_fit_start(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: StageLike) -> None:
        self._begin += time.monotonic() - self._paused

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: StageLike, batch: Any, batch_idx: int) -> None:
        self._steps += 1
        self._images += pl_module.images_in(batch)
        self._due = (batches_done(trainer) + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: StageLike, optimizer: Optimizer) -> None:
        if not (self._due and trainer.is_global_zero):
            return
        owner = {p: name for name, network in pl_module.named_children() for p in network.parameters()}
        found: dict[str, list[torch.Tensor]] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = owner.get(parameter, pl_module.name)
                self._rates.setdefault(name, group["lr"])
                if parameter.grad is not None:
                    found.setdefault(name, []).append(parameter.grad)
        for name, gradients in found.items():
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)).float())
            self._squares[name] = self._squares.get(name, 0.0) + float(norm) ** 2

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: StageLike, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._due:
            return
        values = {**self._speed(trainer), **_memory(pl_module.device), **self._optimisers()}
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.log_metrics(values, batches_done(trainer) - 1)  # the step as Lightning counts it
        self._restart(trainer)

    def _speed(self, trainer: pl.Trainer) -> dict[str, float]:
        seconds = max(time.monotonic() - self._begin, 1e-9)
        values = {"speed/steps_per_s": self._steps / seconds}
        if self._images:
            values["speed/images_per_s"] = self._images * trainer.world_size / seconds
        if (waited := _waited(trainer)) is not None:
            values["speed/data_wait"] = (waited - self._waited) / seconds
        return values

    def _optimisers(self) -> dict[str, float]:
        squares = {name: square for name, square in self._squares.items() if math.isfinite(square)}
        values = {f"lr/{name}": rate for name, rate in self._rates.items()}
        values |= {f"gradient_norm/{name}": math.sqrt(square) for name, square in squares.items()}
        return values | ({"gradient_norm/total": math.sqrt(sum(squares.values()))} if squares else {})

    def _restart(self, trainer: pl.Trainer) -> None:
        self._begin, self._waited = time.monotonic(), _waited(trainer) or 0.0
        self._steps = self._images = 0
        self._squares, self._rates = {}, {}


def _waited(trainer: pl.Trainer) -> float | None:
    """Seconds that the training loader has let us wait, see :class:`datamodules.resumable.ResumableLoader`."""
    return getattr(trainer.train_dataloader, "waited", None)


def _memory(device: torch.device) -> dict[str, float]:
    unit = 1e-9 if sys.platform == "darwin" else 1024e-9  # bytes there, kibibytes elsewhere
    values = {"memory/peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        values["memory/gpu_peak_gb"] = torch.cuda.max_memory_allocated(device) * 1e-9
    return values
