"""What callbacks know of a stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from models.artifact import Artifact, Export


class StageLike(Protocol):
    """A stage as callbacks see it; ``stages.base.stage.Stage`` says what each member is."""

    name: ClassVar[str]
    monitor: ClassVar[tuple[str, Literal["max", "min"]] | None]
    resumes_itself: ClassVar[bool]
    inputs: dict[str, Artifact]
    step_hash: str | None

    @property
    def out(self) -> Path: ...

    @property
    def device(self) -> torch.device: ...

    def named_children(self) -> Iterator[tuple[str, nn.Module]]: ...

    def export(self) -> Export | None: ...

    def panels(self) -> dict[str, Tensor]: ...

    def images_in(self, batch: Any) -> int: ...

    def agree(self, asked: bool) -> bool: ...

    def save_progress(self) -> None: ...
