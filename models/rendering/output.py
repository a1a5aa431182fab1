"""What renderers give and fields answer, and what may come between the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Edit = Callable[[Tensor, Tensor], Tensor]
"""(points (B, P, 3), features (B, P, C)) -> features (B, P, C), differentiable."""

TensorsT = TypeVar("TensorsT", bound="Tensors")


class Tensors:
    """Base of frozen dataclasses whose fields are tensors of B rows each, or None.

    What is a dictionary, as taps are, has other rows: indices, parts and differences come without it.
    """

    def __len__(self) -> int:
        return next(len(value) for value in self.named().values())

    def __getitem__(self: TensorsT, index: int | slice | Tensor) -> TensorsT:
        """Some rows; one row stays a batch of one."""
        if isinstance(index, int):
            index = slice(index, index + 1) if index != -1 else slice(-1, None)
        return self.map(lambda t: t[index])

    def __sub__(self: TensorsT, other: TensorsT) -> TensorsT:
        """Differences of the fields that both have."""
        theirs = other.named()
        return self._with({name: t - theirs[name] for name, t in self.named().items() if name in theirs})

    def __add__(self: TensorsT, other: TensorsT) -> TensorsT:
        """Sums of the fields that both have."""
        theirs = other.named()
        return self._with({name: t + theirs[name] for name, t in self.named().items() if name in theirs})

    def map(self: TensorsT, function: Callable[[Tensor], Tensor]) -> TensorsT:
        """Apply a function to every tensor."""
        return self._with({name: function(t) for name, t in self.named().items()})

    def to(self: TensorsT, *args: Any, **kwargs: Any) -> TensorsT:
        """Move or cast every tensor, as ``Tensor.to``."""
        return self.map(lambda t: t.to(*args, **kwargs))

    def detach(self: TensorsT) -> TensorsT:
        """Detached from the graph."""
        return self.map(Tensor.detach)

    def replace(self: TensorsT, **changes: object) -> TensorsT:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[type-var]

    @classmethod
    def cat(cls: type[TensorsT], parts: Sequence[TensorsT]) -> TensorsT:
        """The rows of all parts, one after the other; of the fields that all have."""
        present = [part.named() for part in parts]
        shared = [name for name in present[0] if all(name in other for other in present)]
        return parts[0]._with({name: torch.cat([p[name] for p in present]) for name in shared})

    def named(self) -> dict[str, Tensor]:
        """The tensors that are there, by their fields."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def _with(self: TensorsT, tensors: dict[str, Tensor]) -> TensorsT:
        return type(self)(**tensors)


@dataclass(frozen=True)
class Rendering(Tensors):
    """What a synthesis returns. Fields a generator cannot give are None."""

    image: Tensor
    """(B, 3, H, W) RGB in [-1, 1]."""
    raw: Tensor | None = None
    """(B, 3, h, w) image before super-resolution."""
    depth: Tensor | None = None
    """(B, 1, h, w) expected camera-z of the subject where alpha > 0, world units; background excluded."""
    alpha: Tensor | None = None
    """(B, 1, h, w) coverage of the subject in [0, 1]."""
    spread: Tensor | None = None
    """(B, 1, h, w) variance of the visible depth, squared world units: 0 for a crisp surface, more for fog."""
    normals: Tensor | None = None
    """(B, 3, h, w) unit normals on world axes, facing the camera; 0 where alpha = 0."""
    albedo: Tensor | None = None
    """(B, 3, h, w) in [-1, 1], for shares in [0, 1]: the colour without its light, where alpha > 0."""
    features: Tensor | None = None
    """(B, C, h, w) rendered features, where the generator has them."""
    taps: dict[str, Tensor] = field(default_factory=dict)
    """Requested block outputs by name, a row for each code, which several of the B views may share."""


@dataclass(frozen=True)
class FieldSample(Tensors):
    """Radiance at points."""

    colour: Tensor
    """(B, P, 3) RGB in [-1, 1]."""
    density: Tensor | None = None
    """(B, P, 1) volume density, 1 / world unit."""
    sdf: Tensor | None = None
    """(B, P, 1) signed distance, world units, negative inside."""
    occupancy: Tensor | None = None
    """(B, P, 1) opacity of one surface layer, in [0, 1]."""
