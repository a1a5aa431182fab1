"""What was found of heads: depth, albedo, view and light, as a module of an artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.configurable import Configurable
from models.errors import shown
from models.names import is_plain
from models.rendering.output import Rendering, Tensors
from models.rendering.relief import Light, Relief


@dataclass(frozen=True)
class Shape(Tensors):
    """B heads, canonical, as :class:`models.rendering.relief.Relief` sees them."""

    depth: Tensor
    """(B, 1, S, S)."""
    albedo: Tensor
    """(B, 3, S, S) in [-1, 1]."""
    view: Tensor
    """(B, 6) of the picture that they were found in."""
    light: Tensor
    """(B, 4) of that picture: ambient, diffuse, dx, dy, as of :class:`models.rendering.relief.Light`."""

    @property
    def lit(self) -> Light:
        """The light, by name."""
        return light_of(self.light)

    def seen(self, relief: Relief, view: Tensor | None = None, light: Tensor | None = None) -> Rendering:
        """As in the picture, or from other views (B, 6), under other lights (B, 4)."""
        lit = self.lit if light is None else light_of(light)
        return relief(self.depth, self.albedo, self.view if view is None else view, lit)


def light_of(numbers: Tensor) -> Light:
    """A light of its numbers (B, 4): ambient, diffuse, dx, dy."""
    return Light(numbers[:, 0], numbers[:, 1], numbers[:, 2:])


class ReliefShapes(Configurable):
    """Shapes of several heads.

    Args:
        ids: of the heads, in the order of the rows.
        size: S of the maps, pixels.
        relief: how they are seen.

    Raises:
        ValueError: for an id that cannot name a file, or is there twice.
    """

    depth: Tensor
    albedo: Tensor
    view: Tensor
    light: Tensor

    def __init__(self, ids: Sequence[str], size: int, relief: Relief = Relief()) -> None:  # noqa: B008 - frozen
        super().__init__()
        self.ids, self.size, self.relief = tuple(ids), size, relief
        if wrong := [identity for identity in self.ids if not is_plain(identity)]:
            raise ValueError(f"the id {shown(wrong[0])} cannot name a file")
        if len(set(self.ids)) != len(self.ids):
            raise ValueError("two heads have the same id")
        count = len(self.ids)
        self.register_buffer("depth", torch.zeros(count, 1, size, size))
        self.register_buffer("albedo", torch.zeros(count, 3, size, size))
        self.register_buffer("view", torch.zeros(count, 6))
        self.register_buffer("light", torch.zeros(count, 4))

    @staticmethod
    def pack(shapes: Mapping[str, Shape], relief: Relief) -> ReliefShapes:
        """Of heads by id, one or more, sorted."""
        ids = sorted(shapes)
        together = Shape.cat([shapes[identity] for identity in ids])
        packed = ReliefShapes(ids, together.depth.shape[-1], relief)
        packed.load_state_dict(vars(together))
        return packed

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, identity: str) -> bool:
        return identity in self.ids

    def __getitem__(self, identity: str) -> Shape:
        """The shape of one head, a batch of one.

        Raises:
            KeyError: when there is none of that id.
        """
        if identity not in self.ids:
            raise KeyError(identity)
        row = self.ids.index(identity)
        return Shape(self.depth, self.albedo, self.view, self.light)[row]

    @property
    def normals(self) -> Tensor:
        """(N, 3, S, S) unit, canonical, towards the camera: those of the depth maps."""
        return self.relief.normals(self.depth)
