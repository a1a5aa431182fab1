"""Optimisation item by item: groups, and an exact resume of each."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from datamodules.items import Item, ItemsDataModule
from models.errors import UserError
from stages.base.group_file import GroupFile, Progress
from stages.base.seeds import item_seed
from stages.base.stage import Stage


@dataclass
class GroupState(Generic[Item]):
    """What is optimised for the resident group.

    Attributes:
        items: sorted by id.
        module: everything that is optimised or must survive a kill: parameters and buffers. Each
            parameter belongs to one item or has one row per item, so that a sum over items mixes nothing.
        optimizers: by name, over disjoint parameters of the module.
    """

    items: Sequence[Item]
    module: nn.Module
    optimizers: dict[str, Optimizer]


State = TypeVar("State", bound=GroupState[Any])


class PerItemStage(Stage, Generic[Item, State]):
    """Base of stages that optimise items one by one: artworks, or anything else that has an id.

    The items of the data module (:class:`datamodules.items.ItemsDataModule`), sorted by id, form groups of
    ``group_size``; ranks take whole groups in turn; one training step is one optimisation step of the rank's resident
    group. Results do not depend on the number of ranks. A group's state is in ``OUT/items/FIRST_ID/group.safetensors``
    (:class:`stages.base.group_file.GroupFile`): a killed run continues every group at its exact step.

    A stage of several phases tells them apart by the step: in its losses, and in :meth:`active`.

    Args:
        steps: optimisation steps per group, of all phases.
        group_size: items optimised together.
        save_every: steps between saves of the resident group.
        seed: of all draws, see :func:`item_generator`.

    With a ``shard`` (index, count) a run takes every count-th group only, as one of several in the same folder; a run
    without it then finishes and exports.
    """

    wrapped = False
    resumes_itself = True
    shardable = True
    fit_options = {"max_epochs": 1, "max_steps": -1, "enable_model_summary": False}

    def __init__(self, *, steps: int, group_size: int = 1, save_every: int = 100, seed: int = 0) -> None:
        super().__init__()
        if steps < 1 or group_size < 1 or save_every < 1:
            raise UserError("steps, group_size and save_every must be at least 1")
        self.automatic_optimization = False
        self.steps = steps
        self.group_size = group_size
        self.save_every = save_every
        self.seed = seed
        self._plan: deque[_Tick[Item]] = deque()
        self._group: list[State] = []  # a list, so that nn.Module registers nothing of it

    # -- for subclasses ---------------------------------------------------------------------------

    @abstractmethod
    def start_group(self, items: Sequence[Item]) -> State:
        """Fresh parameters and optimisers for ``items``. Global draws are seeded; see :func:`item_generator`."""

    @abstractmethod
    def optimise(self, state: State, step: int) -> dict[str, Tensor]:
        """Losses (n,) per item at ``step``; the sum of ``"loss"`` is minimised, the others are logged.

        The base runs backward, ``before_step`` and the optimisers. Learning rates are set here, as a
        function of ``step``. An item whose loss has no gradient stays as it is.
        """

    @abstractmethod
    def finish_group(self, state: State) -> None:
        """Write the results of the group's items to :meth:`item_dir`; may be called again after a kill."""

    def active(self, state: State, step: int) -> Collection[str]:
        """Names of the optimisers that move at ``step``, asked once its losses are known; all by default.

        The parameters of the others get no gradient, and they and their moments stay as they are.
        """
        return state.optimizers

    def before_step(self, state: State) -> None:
        """Between backward and optimiser steps: clip here, item by item."""

    def settled(self, state: State) -> bool:
        """Whether the group needs no more steps: asked after each one, may end it before ``steps``."""
        return False

    @property
    def items(self) -> list[Item]:
        """All items of the data module, sorted by id.

        Raises:
            UserError: when its data are not items.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, ItemsDataModule):
            raise UserError(f"{self.name} works item by item, and {type(data).__name__} has no items: see --data")
        return data.items

    def item_dir(self, item: str) -> Path:
        """``OUT/items/ID``, where an item's results are written and, on export, read."""
        return self.out / "items" / item

    # -- Lightning --------------------------------------------------------------------------------

    def configure_optimizers(self) -> None:
        """None: each group has its own optimisers."""

    def on_fit_start(self) -> None:
        items = self.items
        groups = [items[i : i + self.group_size] for i in range(0, len(items), self.group_size)]
        groups = groups[self.shard[0] :: self.shard[1]]
        world = self.trainer.world_size
        ticks = [[t for group in groups[rank::world] for t in self._ticks(group)] for rank in range(world)]
        self._plan = deque(ticks[self.global_rank])
        # Every rank runs as many steps as the longest, idle at the end: no rank waits in another's barrier.
        self.trainer.datamodule.steps = range(max(map(len, ticks)))  # type: ignore[attr-defined]

    def on_train_start(self) -> None:
        """Nothing: ranks share nothing."""

    def images_in(self, batch: Any) -> int:
        return len(self._plan[0].items) if self._plan else 0

    def agree(self, asked: bool) -> bool:
        return asked  # ranks work apart, and never wait for one another

    def save_progress(self) -> None:
        if self._group:
            self._save(self._group[0])

    def _ticks(self, items: Sequence[Item]) -> list[_Tick[Item]]:
        found = self._file(items).read()
        begin = 0 if found is None else found[1].step
        if found is not None and found[1].finished:
            return []
        # A group killed between its last step and its results has one tick left, that only writes them.
        return [_Tick(items, step) for step in range(min(begin, self.steps - 1), self.steps)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if not self._plan:
            return
        tick = self._plan.popleft()
        if not self._group:
            self._group = [self._open(tick.items)]
        state = self._group[0]
        if self._step < self.steps:
            self._optimise(state, tick.step)
            if self.settled(state):
                self._step = self.steps
                while self._plan and self._plan[0].items is tick.items:
                    self._plan.popleft()
        if self._step == self.steps:
            self._save(state)
            self.finish_group(state)
            self._save(state, finished=True)
            self._group = []
        elif self._step % self.save_every == 0:
            self._save(state)

    def _optimise(self, state: State, step: int) -> None:
        self._seed(state.items, step)
        losses = self.optimise(state, step)
        for term, values in losses.items():
            for item, finite in zip(state.items, values.isfinite().tolist(), strict=True):
                if not finite:
                    self._stop(state, f"{term} of {item.id} is not finite at step {step}")
        moving = self._backward(state, losses["loss"].float().sum(), self.active(state, step))
        for optimizer in moving:
            self._scaler.unscale_(optimizer)
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                callback.on_before_optimizer_step(self.trainer, self, optimizer)
        self.before_step(state)
        for optimizer in moving:
            self._scaler.step(optimizer)
        if moving:
            self._scaler.update()
        self._step = step + 1
        self.log_dict({f"{self.name}/{key}": value.detach().float().mean() for key, value in losses.items()})

    def _backward(self, state: State, loss: Tensor, names: Collection[str]) -> list[Optimizer]:
        """The optimisers of these names whose parameters have got a gradient."""
        for optimizer in state.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        parameters = {name: _trained(state.optimizers[name]) for name in names}
        if not loss.requires_grad or not parameters:
            return []
        # Autocast must not reach backward; the scaler does nothing unless the precision is 16-mixed.
        with torch.autocast(self.device.type, enabled=False):
            self._scaler.scale(loss).backward(inputs=[p for group in parameters.values() for p in group])
        moved = [name for name, group in parameters.items() if any(p.grad is not None for p in group)]
        return [state.optimizers[name] for name in moved]

    def _seed(self, items: Sequence[Item], step: int) -> None:
        # Draws that miss item_generator still depend on the group and the step only, and need no saving.
        seed = item_seed(self.seed, items[0].id, step)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    # -- the group's file -------------------------------------------------------------------------

    def _file(self, items: Sequence[Item]) -> GroupFile:
        identity = {
            "stage": self.name,
            "items": [item.id for item in items],
            "inputs": self._input_ids(),
            "seed": self.seed,
            "steps": self.steps,
            "step_hash": self.step_hash,
        }
        return GroupFile(self.item_dir(items[0].id) / "group.safetensors", identity)

    def _open(self, items: Sequence[Item]) -> State:
        self._seed(items, -1)
        state = self.start_group(items)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.trainer.precision == "16-mixed")
        self._step = 0
        if (progress := self._file(items).resume()) is not None:
            state.module.load_state_dict(progress.module, strict=True)  # to each parameter's device, as below
            for name, optimizer in state.optimizers.items():
                optimizer.load_state_dict(progress.optimizers[name])
            self._scaler.load_state_dict(progress.scaler)
            self._step = progress.step
        return state

    def _stop(self, state: State, what: str) -> NoReturn:
        found = self._file(state.items).read()
        good = "nothing was saved before" if found is None else f"step {found[1].step} is saved in {found[0]}"
        raise UserError(f"{self.name}: {what}: lower the learning rates or the loss weights; {good}")

    def _save(self, state: State, finished: bool = False) -> None:
        optimizers = {name: optimizer.state_dict() for name, optimizer in state.optimizers.items()}
        values = dict(state.module.named_parameters())
        for name, optimizer in optimizers.items():
            for i, slot in optimizer["state"].items():
                values |= {f"{key} of parameter {i} in optimizer {name}": value for key, value in slot.items()}
        for name, value in values.items():
            if isinstance(value, Tensor) and not value.isfinite().all():
                self._stop(state, f"{name} of {state.items[0].id} is not finite after step {self._step - 1}")
        progress = Progress(self._step, finished, state.module.state_dict(), optimizers, self._scaler.state_dict())
        self._file(state.items).write(progress)


@dataclass(frozen=True)
class _Tick(Generic[Item]):
    items: Sequence[Item]
    step: int


def _trained(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
