"""What every stage shares: inputs by artifact, exact resume, export.

A subclass of :class:`Stage` sets ``name``, builds its networks in ``build_model`` (inputs through :meth:`Stage.take`)
and says what it hands on in ``export``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from models.artifact import Artifact, Export, load
from models.errors import UserError
from models.features.base import frozen_of
from models.metrics.records import FILE, Record, write_records
from stages.base.ranks import average_gradients, broadcast
from stages.base.records import Records, averages
from stages.base.seeds import rng_state, set_rng_state

log = logging.getLogger(__name__)

_RECORD = "galatea"  # our key in a Lightning checkpoint


@dataclass(frozen=True)
class ArtifactRef:
    """An artifact, as named in YAML.

    Attributes:
        path: its folder, or a folder that holds it as ``artifact/``.
    """

    path: str


@dataclass(frozen=True)
class GeneratorRef:
    """A generator of an artifact, as named in YAML.

    Attributes:
        path: as of :class:`ArtifactRef`.
        module: name of the generator: an artifact may hold several.
    """

    path: str
    module: str = "generator"


ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Stage(pl.LightningModule):
    """Base of all stages.

    Attributes:
        name: the stage's name on the command line.
        monitor: what is logged in validation, and "max" or "min", by which the best checkpoint is known.
        wrapped: whether ``DistributedDataParallel`` may synchronise gradients. It expects one backward pass a step
            through all parameters; a stage that has others sets this to false and synchronises itself.
        resumes_itself: whether a fit finds by itself what is done already, so that there may be nothing left to do;
            it needs no checkpoints.
        shardable: whether several fits may share a folder, each doing its ``shard`` of the work.
        fit_options: options of the trainer that a fit has, whatever is asked.
        shard: (index, count) of this run. Set by the command line.
        inputs: by role, the artifacts taken with :meth:`take`.
        step_hash: hash of everything the step depends on; set by the command line,
            on rank 0, and told to the others when a run begins.
        records: what the running test has measured, item by item; ``test_step`` adds to them.
        validated: scores of the last validation, for the artifact; checkpoints keep them.
    """

    name: ClassVar[str]
    monitor: ClassVar[tuple[str, Literal["max", "min"]] | None] = None
    wrapped: ClassVar[bool] = True
    resumes_itself: ClassVar[bool] = False
    shardable: ClassVar[bool] = False
    fit_options: ClassVar[dict[str, Any]] = {}
    shard: tuple[int, int] = (0, 1)

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[str, Artifact] = {}
        self.step_hash: str | None = None
        self.records = Records()
        self.validated: dict[str, float] = {}
        self._taken: list[tuple[nn.Module, tuple[Artifact, str]]] = []
        self._built = False
        self._rng: dict[str, Any] | None = None

    # -- for subclasses ---------------------------------------------------------------------------

    def build_model(self) -> None:
        """Build networks; called once, before a checkpoint is restored. Inputs come from :meth:`take`."""

    def export(self) -> Export | None:
        """What the stage hands on, or ``None`` for nothing.

        Called on rank 0 at the end of fit and predict, after all ranks have finished.
        """
        return None

    def summary(self) -> Iterable[Record]:
        """What only all items together tell; called by all ranks when a test ends."""
        return ()

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
        """Save what the run continues from beside its checkpoints; between batches, after :meth:`agree`."""

    def take(self, role: str, path: str, module: str, kind: type[ModuleT]) -> ModuleT:
        """A module of the artifact ``path``, which becomes a parent of what this stage exports.

        Raises:
            ArtifactError: when the artifact is missing or damaged, or has no such module.
            UserError: when the module is of another kind.
        """
        if role not in self.inputs:
            self.inputs[role] = load(path)
        source = self.inputs[role]
        found = source.module(module)
        if not isinstance(found, kind):
            noun = re.sub(r"(?<!^)(?=[A-Z])", " ", kind.__name__).lower()
            raise UserError(
                f"{path} (stage {source.stage}) is not what {self.name} needs as its {role}: module {module!r} is not "
                f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}, but {type(found).__name__}"
            )
        self._taken.append((found, (source, module)))
        return found

    def unchanged(self, modules: Mapping[str, nn.Module]) -> dict[str, tuple[Artifact, str]]:
        """Of modules to hand on, those that were taken and do not learn, with where they are stored already."""
        return {
            name: origin
            for name, module in modules.items()
            for taken, origin in self._taken
            if taken is module and not any(p.requires_grad for p in module.parameters())
        }

    @property
    def world_size(self) -> int:
        """Number of ranks; 1 without a trainer."""
        return 1 if self._trainer is None else self._trainer.world_size

    def global_rows(self, rows: int, views: int = 1) -> Tensor:
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

    def setup(self, stage: str) -> None:
        self.step_hash = self.trainer.strategy.broadcast(self.step_hash)  # rank 0 alone has read all inputs

    def configure_model(self) -> None:
        if not self._built:
            self.build_model()
            self._built = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Stage:
        """Frozen networks move with the stage, though it does not own them."""
        super()._apply(fn, recurse)
        for held in frozen_of(self):
            held.module._apply(fn)
        return self

    def on_train_start(self) -> None:
        if not self.wrapped:
            broadcast(self)

    def on_after_backward(self) -> None:
        if not self.wrapped and self.automatic_optimization:
            average_gradients(self)

    def on_test_epoch_end(self) -> None:
        """The scores of all ranks, in ``OUT/metrics.csv`` and, averaged, in the log."""
        self.records.add(self.summary())
        records = self.records.collect()
        if self.trainer.is_global_zero:
            write_records(self.out / FILE, records)
        for name, value in averages(records).items():
            self.log(f"test/{name}", value, rank_zero_only=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        states: list[Any] = [rng_state()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, rng_state())
        checkpoint[_RECORD] = {"stage": self.name, "inputs": self._input_ids(), "rng": states}
        checkpoint["validated"] = self.validated

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
        self.validated = checkpoint.get("validated", {})
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
