"""torch.compile for chosen modules of a stage."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from torch import nn

from models.errors import UserError, one_line
from models.generators.base import Generator

log = logging.getLogger(__name__)


class Compile(pl.Callback):
    """Compiles modules of the stage in place; names in checkpoints and artifacts stay as they are.

    A module that cannot be compiled as one graph runs as it is from then on, and a line says why.

    Args:
        modules: their names in the stage: ``encoder``, ``generator.backbone``.

    Raises:
        UserError: when a run begins, for a name that the stage does not have, or of a module that is never called.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = list(modules)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Its pool of compiling processes hangs beside those of data loaders.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        for name in self.modules:
            compile_module(_find(pl_module, name), name)

    on_test_start = on_predict_start = on_fit_start

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.on_fit_start(trainer, pl_module)


def compile_module(module: nn.Module, name: str) -> None:
    """Compile ``module`` in place; ``name`` is for the line that says why it could not be.

    Only its own call is compiled: other methods, and calls under ``torch.compiler.set_stance("force_eager")``, are not.
    """
    module.compile(fullgraph=True, dynamic=False)
    module._compiled_call_impl = _Guarded(module, name)


class _Guarded:
    """A module's compiled call, which gives way to its own when compiling fails.

    Nothing has been computed or drawn then: one graph is compiled whole before any of it runs.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.compiled: Any = module._compiled_call_impl

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.compiled(*args, **kwargs)
        except Exception as error:
            reason = one_line(str(error).partition("\n\n")[0])
            log.warning("%s runs without torch.compile: %s: %s", self.name, type(error).__name__, reason)
        self.module._compiled_call_impl = None
        return self.module(*args, **kwargs)  # a mistake that is not the compiler's shows itself here


def _find(stage: nn.Module, name: str) -> nn.Module:
    module, place = stage, "the stage"
    for part in name.split("."):
        children = dict(module.named_children())
        if part not in children:
            raise UserError(f"--compile {name}: {place} has no {part!r}, it has: {_parts(module)}")
        module, place = children[part], part
    if not _is_called(module):
        raise UserError(f"--compile {name}: {place} is not called itself, name one of its parts: {_parts(module)}")
    return module


def _parts(module: nn.Module) -> str:
    return ", ".join(name for name, _ in module.named_children()) or "nothing"


def _is_called(module: nn.Module) -> bool:
    # A generator's forward is for notebooks: stages ask for codes and pictures one after the other.
    return type(module).forward is not nn.Module.forward and not isinstance(module, Generator)
