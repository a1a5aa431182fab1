"""What every stage shares: inputs by artifact, exact resume, export; and optimisation item by item.

A subclass of :class:`Stage` sets ``name``, builds its networks in ``build_model`` (inputs through
:meth:`Stage.take`) and says what it hands on in ``export``. Per-artwork stages subclass
:class:`PerArtworkStage` and write ``start_group``, ``optimise`` and ``finish_group``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, NoReturn, TypeVar

import numpy as np
import pytorch_lightning as pl
import safetensors
import safetensors.torch
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from callbacks.checkpoint import LastCheckpoint
from datamodules.artworks import Artwork
from models.artifact import Artifact, load
from models.errors import UserError
from models.files import atomic_write, previous, versions

log = logging.getLogger(__name__)

_RECORD = "galatea"  # our key in a Lightning checkpoint


@dataclass(frozen=True)
class ArtifactRef:
    """A module of an artifact, as named in YAML.

    Attributes:
        path: the artifact's folder, or a folder that holds it as ``artifact/``.
        module: name of the module inside.
    """

    path: str
    module: str = "generator"


class Stage(pl.LightningModule):
    """Base of all stages.

    Attributes:
        name: the stage's name on the command line.
        monitor: what is logged in validation, and "max" or "min", by which the best checkpoint is known.
        wrapped: whether ``DistributedDataParallel`` may synchronise gradients. It expects one backward pass a step
            through all parameters; a stage that has others sets this to false and synchronises itself.
        resumes_itself: whether a fit finds by itself what is done already, so that there may be nothing left to do.
        inputs: by role, the artifacts taken with :meth:`take`.
        step_hash: hash of everything the step depends on; set by the command line.
    """

    name: ClassVar[str]
    monitor: ClassVar[tuple[str, Literal["max", "min"]] | None] = None
    wrapped: ClassVar[bool] = True
    resumes_itself: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[str, Artifact] = {}
        self.step_hash: str | None = None
        self._built = False
        self._rng: dict[str, Any] | None = None

    # -- for subclasses ---------------------------------------------------------------------------

    def build_model(self) -> None:
        """Build networks; called once, before a checkpoint is restored. Inputs come from :meth:`take`."""

    def export(self) -> dict[str, Any] | None:
        """What the stage hands on: keyword arguments of :func:`models.artifact.save`, or ``None`` for nothing.

        ``path``, ``stage``, ``parents`` and ``step_hash`` are filled in. Called on rank 0 at the end of fit
        and predict, after all ranks have finished.
        """
        return None

    def panels(self) -> dict[str, Tensor]:
        """Pictures of the current state by name: images (3, H, W) or frames (T, 3, H, W) in [-1, 1].

        Called on rank 0 only, between steps.
        """
        return {}

    def images_in(self, batch: Any) -> int:
        """Pictures in a batch of this rank, for the throughput; 0 when they cannot be counted."""
        return batch["image"].shape[:-3].numel() if isinstance(batch, dict) and "image" in batch else 0

    def agree(self, asked: bool) -> bool:
        """Whether any rank is ``asked`` to stop. Ranks that train together call it together, and stop together."""
        return self.trainer.strategy.reduce_boolean_decision(asked, all=False)

    def save_progress(self) -> None:
        """Save what the run continues from; between batches, after :meth:`agree`."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LastCheckpoint):
                callback.save(self.trainer)
        self.trainer.strategy.barrier("saved")  # no rank ends while another writes

    def take(self, role: str, ref: ArtifactRef) -> nn.Module:
        """The module that ``ref`` names; its artifact becomes a parent of what this stage exports.

        Raises:
            ArtifactError: when the artifact is missing or damaged, or has no such module.
        """
        if role not in self.inputs:
            self.inputs[role] = load(ref.path)
        return self.inputs[role].module(ref.module)

    @property
    def world_size(self) -> int:
        """Number of ranks; 1 without a trainer."""
        return 1 if self._trainer is None else self._trainer.world_size

    def own(self, rows: int, views: int = 1) -> Tensor:
        """Where this rank's ``rows``, ``views`` of each subject in a row, are in the batch of all ranks.

        The loaders deal subjects out in turn. Draws for the whole batch, of which a rank takes its own rows, belong to
        the pictures: equal global batches give equal results on any number of ranks.
        """
        places = torch.arange(self.world_size * rows).unflatten(0, (-1, self.world_size, views))
        return places[:, self.global_rank].flatten()

    @property
    def out(self) -> Path:
        """The run's output folder (``--out``)."""
        return Path(self.trainer.default_root_dir)

    # -- Lightning --------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if not self._built:
            self.build_model()
            self._built = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        states: list[Any] = [rng_state()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, rng_state())
        checkpoint[_RECORD] = {"stage": self.name, "inputs": self._input_ids(), "rng": states}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        record = checkpoint.get(_RECORD)
        if record is None or record["stage"] != self.name:
            origin = "is not a checkpoint of galatea" if record is None else f"belongs to stage {record['stage']!r}"
            raise UserError(f"the checkpoint {origin}: stage {self.name!r} only resumes its own")
        for role, identity in self._input_ids().items():
            if record["inputs"].get(role) != identity:
                raise UserError(
                    f"the checkpoint was made with another {role}: artifact {str(record['inputs'].get(role))[:12]}, "
                    f"not {identity[:12]} ({self.inputs[role].path}); start again in a new --out folder"
                )
        if self.global_rank < len(record["rng"]):
            self._rng = record["rng"][self.global_rank]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        # Restored at the first step, not when the checkpoint is read: setting up the loaders draws numbers too.
        if self._rng is not None:
            set_rng_state(self._rng)
            self._rng = None
        return None

    def _input_ids(self) -> dict[str, str]:
        return {role: artifact.id for role, artifact in self.inputs.items()}


def rng_state() -> dict[str, Any]:
    """States of the Python, NumPy and torch generators, as tensors and primitives only."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],  # type: ignore[union-attr]
        "python": [version, list(words), gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what :func:`rng_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


def item_seed(seed: int, item: str, step: int) -> int:
    """A 63-bit seed that depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{seed}:{step}:{item}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def item_generator(seed: int, item: str, step: int) -> torch.Generator:
    """A CPU generator for the draws of one item at one step, whatever rank or group the item is in."""
    return torch.Generator().manual_seed(item_seed(seed, item, step))


def step_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """A CPU generator for the draws of one training step; the same on all ranks unless they name their own."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 1009 + rank)


def broadcast(module: nn.Module) -> None:
    """Give all ranks the parameters and buffers of rank 0."""
    if torch.distributed.is_initialized():
        for tensor in module.state_dict().values():
            torch.distributed.broadcast(tensor, 0)


def average_gradients(module: nn.Module) -> None:
    """Replace gradients by their mean over all ranks, which must have them for the same parameters."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    if torch.distributed.is_initialized() and gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def gather(found: list[Any]) -> list[Any]:
    """What all ranks found, rank after rank."""
    if not torch.distributed.is_initialized():
        return found
    lists: list[list[Any]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(lists, found)
    return [entry for part in lists for entry in part]


def means(scores: list[dict[str, Tensor]]) -> dict[str, float]:
    """Mean of each score (B,) over the items of all batches and all ranks, to be called by all ranks.

    Ranks may have different numbers of items, which Lightning's ``sync_dist`` does not weigh right.
    """
    found = gather([{name: values.detach().cpu().double() for name, values in batch.items()} for batch in scores])
    return {name: float(torch.cat([batch[name] for batch in found]).mean()) for name in (found[0] if found else ())}


class IndependentRanks(DDPStrategy):
    """Ranks whose gradients Lightning leaves alone: no wrapper."""

    strategy_name = "independent_ranks"

    def configure_ddp(self) -> None:
        """Leave the module as it is."""


@dataclass
class GroupState:
    """What is optimised for the resident group.

    Attributes:
        items: the artworks, sorted by id.
        module: everything that is optimised or must survive a kill: parameters and buffers. Each
            parameter belongs to one item or has one row per item, so that a sum over items mixes nothing.
        optimizer: over the module's parameters.
    """

    items: Sequence[Artwork]
    module: nn.Module
    optimizer: Optimizer


State = TypeVar("State", bound=GroupState)


class PerArtworkStage(Stage, Generic[State]):
    """Base of stages that optimise artworks one by one.

    The items of ``trainer.datamodule.items``, sorted by id, form groups of ``group_size``; ranks take whole
    groups in turn; one training step is one optimisation step of the rank's resident group. Results do not
    depend on the number of ranks. A group's state is in ``OUT/items/FIRST_ID/group.safetensors``, written
    atomically: a killed run continues every group at its exact step; should the file be damaged, from the one before.

    Args:
        steps: optimisation steps per group.
        group_size: items optimised together.
        save_every: steps between saves of the resident group.
        seed: of all draws, see :func:`item_generator`.

    Attributes:
        shard: (index, count) takes every count-th group only, as one of several runs in the same folder; a run
            without it then finishes and exports. Set by the command line.
    """

    wrapped = False
    resumes_itself = True
    shard: tuple[int, int] = (0, 1)

    def __init__(self, *, steps: int, group_size: int = 1, save_every: int = 100, seed: int = 0) -> None:
        super().__init__()
        if steps < 1 or group_size < 1 or save_every < 1:
            raise UserError("steps, group_size and save_every must be at least 1")
        self.automatic_optimization = False
        self.steps = steps
        self.group_size = group_size
        self.save_every = save_every
        self.seed = seed
        self._plan: deque[_Tick] = deque()
        self._group: list[State] = []  # a list, so that nn.Module registers nothing of it

    # -- for subclasses ---------------------------------------------------------------------------

    @abstractmethod
    def start_group(self, items: Sequence[Artwork]) -> State:
        """Fresh parameters and optimiser for ``items``. Global draws are seeded; see :func:`item_generator`."""

    @abstractmethod
    def optimise(self, state: State, step: int) -> dict[str, Tensor]:
        """Losses (n,) per item at ``step``; the sum of ``"loss"`` is minimised, the others are logged.

        The base runs backward, ``before_step`` and the optimiser. Learning rates are set here, as a
        function of ``step``.
        """

    @abstractmethod
    def finish_group(self, state: State) -> None:
        """Write the results of the group's items to :meth:`item_dir`; may be called again after a kill."""

    def before_step(self, state: State) -> None:
        """Between backward and optimiser step: clip here, with :func:`clip_per_item`."""

    def settled(self, state: State) -> bool:
        """Whether the group needs no more steps: asked after each one, may end it before ``steps``."""
        return False

    def item_dir(self, item: str) -> Path:
        """``OUT/items/ID``, where an item's results are written and, on export, read."""
        return self.out / "items" / item

    # -- Lightning --------------------------------------------------------------------------------

    def configure_optimizers(self) -> None:
        """None: each group has its own optimiser."""

    def on_fit_start(self) -> None:
        items = sorted(self.trainer.datamodule.items, key=lambda item: item.id)  # type: ignore[attr-defined]
        groups = [items[i : i + self.group_size] for i in range(0, len(items), self.group_size)]
        groups = groups[self.shard[0] :: self.shard[1]]
        world = self.trainer.world_size
        ticks = [[t for group in groups[rank::world] for t in self._ticks(group)] for rank in range(world)]
        self._plan = deque(ticks[self.global_rank])
        # Every rank runs as many steps as the longest, idle at the end: no rank waits in another's barrier.
        self.trainer.datamodule.steps = range(max(map(len, ticks)))  # type: ignore[attr-defined]

    def images_in(self, batch: Any) -> int:
        return len(self._plan[0].items) if self._plan else 0

    def agree(self, asked: bool) -> bool:
        return asked  # ranks work apart, and never wait for one another

    def save_progress(self) -> None:
        if self._group:
            self._save(self._group[0])

    def _ticks(self, items: Sequence[Artwork]) -> list[_Tick]:
        if (found := self._read(items)) is None:
            return [_Tick(items, step) for step in range(self.steps)]
        _, record, _ = found
        if record["finished"]:
            return []
        # A group killed between its last step and its results has one tick left, that only writes them.
        return [_Tick(items, step) for step in range(min(record["step"], self.steps - 1), self.steps)]

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
        state.optimizer.zero_grad(set_to_none=True)
        # Autocast must not reach backward; the scaler does nothing unless the precision is 16-mixed.
        with torch.autocast(self.device.type, enabled=False):
            self._scaler.scale(losses["loss"].float().sum()).backward()
        self._scaler.unscale_(state.optimizer)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            callback.on_before_optimizer_step(self.trainer, self, state.optimizer)
        self.before_step(state)
        self._scaler.step(state.optimizer)
        self._scaler.update()
        self._step = step + 1
        self.log_dict({f"{self.name}/{key}": value.detach().float().mean() for key, value in losses.items()})

    def _seed(self, items: Sequence[Artwork], step: int) -> None:
        # Draws that miss item_generator still depend on the group and the step only, and need no saving.
        seed = item_seed(self.seed, items[0].id, step)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    # -- the group's file -------------------------------------------------------------------------

    def _group_file(self, items: Sequence[Artwork]) -> Path:
        return self.item_dir(items[0].id) / "group.safetensors"

    def _identity(self, items: Sequence[Artwork]) -> dict[str, Any]:
        return {
            "stage": self.name,
            "items": [item.id for item in items],
            "inputs": self._input_ids(),
            "seed": self.seed,
            "steps": self.steps,
            "step_hash": self.step_hash,
        }

    def _read(self, items: Sequence[Artwork]) -> tuple[Path, dict[str, Any], dict[str, Tensor]] | None:
        """The newest file of the group that is not damaged, with its record and its tensors."""
        files = versions(self._group_file(items))
        for file in files:
            try:
                with safetensors.safe_open(file, "pt") as handle:
                    record = json.loads(handle.metadata()[_RECORD])
                    tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
                intact = record["sha256"] == _digest(tensors)
            except (OSError, safetensors.SafetensorError, TypeError, KeyError, ValueError):
                intact = False
            if not intact:
                continue
            if record["identity"] != self._identity(items):
                raise UserError(f"{file} is of a run with other settings or inputs: choose another --out folder")
            return file, record, tensors
        if files:
            names = " and ".join(map(str, files))
            verb, what = ("is", "it") if len(files) == 1 else ("are", "them")
            raise UserError(f"{names} {verb} damaged: remove {what} to start this group again")
        return None

    def _open(self, items: Sequence[Artwork]) -> State:
        self._seed(items, -1)
        state = self.start_group(items)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.trainer.precision == "16-mixed")
        self._step = 0
        if (found := self._read(items)) is not None:
            file, record, tensors = found  # each tensor goes to its parameter's device below
            damaged = self._group_file(items)
            if file != damaged and damaged.exists():
                log.warning("%s is damaged: continuing from %s, step %d", damaged, file, record["step"])
                damaged.unlink()  # so that it does not take the place of the good one
            state.module.load_state_dict(_under("module", tensors), strict=True)
            slots: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in record["slots"].items()}
            for name, tensor in _under("optimizer", tensors).items():
                index, _, key = name.partition("/")
                slots.setdefault(int(index), {})[key] = tensor
            state.optimizer.load_state_dict({"state": slots, "param_groups": record["param_groups"]})
            self._scaler.load_state_dict(record["scaler"])
            self._step = record["step"]
        return state

    def _stop(self, state: State, what: str) -> NoReturn:
        found = self._read(state.items)
        good = "nothing was saved before" if found is None else f"step {found[1]['step']} is saved in {found[0]}"
        raise UserError(f"{self.name}: {what}: lower the learning rates or the loss weights; {good}")

    def _save(self, state: State, finished: bool = False) -> None:
        optimizer = state.optimizer.state_dict()
        values = dict(state.module.named_parameters())
        values |= {f"{k} of parameter {i}": v for i, slot in optimizer["state"].items() for k, v in slot.items()}
        for name, value in values.items():
            if isinstance(value, Tensor) and not value.isfinite().all():
                self._stop(state, f"{name} of {state.items[0].id} is not finite after step {self._step - 1}")
        record: dict[str, Any] = {"identity": self._identity(state.items), "step": self._step, "finished": finished}
        tensors: dict[str, Tensor] = {}
        if not finished:
            slots = optimizer["state"]
            record["param_groups"] = optimizer["param_groups"]
            record["scaler"] = self._scaler.state_dict()
            record["slots"] = {
                i: {k: v for k, v in slot.items() if not isinstance(v, Tensor)} for i, slot in slots.items()
            }
            tensors = {f"module/{name}": value for name, value in state.module.state_dict().items()}
            for i, slot in slots.items():
                tensors |= {f"optimizer/{i}/{k}": v for k, v in slot.items() if isinstance(v, Tensor)}
        content = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        record["sha256"] = _digest(content)
        target = self._group_file(state.items)
        if finished:  # the results are in files of their own
            previous(target).unlink(missing_ok=True)
        with atomic_write(target, keep=not finished) as file:
            file.write_bytes(safetensors.torch.save(content, {_RECORD: json.dumps(record)}))


@dataclass(frozen=True)
class _Tick:
    items: Sequence[Artwork]
    step: int


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names and contents: safetensors notices a file that is cut off, not one with changed bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}


def clip_per_item(parameters: Sequence[Tensor], max_norm: float) -> None:
    """Clip gradients so that each item's norm over all ``parameters`` (n, ...) is at most ``max_norm``."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
    scale = (max_norm / norms.clamp_min(1e-12)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(scale.reshape(-1, *[1] * (gradient.ndim - 1)))
