"""What data may know beyond what they give: how their heads look from anywhere."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from models.camera import Camera
from models.metrics.portrait import HeadTruth, ViewTruth
from models.metrics.scan import Scan
from models.metrics.surface import SurfaceTruth


@dataclass(frozen=True)
class Movable:
    """Base of dataclasses of tensors, and of what moves as they do."""

    def to(self, device: torch.device) -> Self:
        """On another device."""
        moved = {field.name: getattr(self, field.name).to(device) for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **moved)


@runtime_checkable
class KnowsItemTruth(Protocol):
    """Items whose truth is known."""

    split: str
    """The items' part of the data, for the records."""

    def item_truth(self, identity: str) -> HeadTruth:
        """What the item of that id must look like."""
        ...


@runtime_checkable
class KnowsSurface(Protocol):
    """Items whose pictures' surfaces are known."""

    split: str
    """The items' part of the data, for the records."""

    def surface(self, identity: str) -> SurfaceTruth:
        """What the picture of the item of that id shows."""
        ...


class Samples(Protocol):
    """Samples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class KnowsStyleSet(Protocol):
    """Photos that are to be shown in the style of some pictures; with ``twin``, where that is known."""

    def style_set(self) -> Samples:
        """Samples whose ``image`` (V, 3, H, W) is in the style."""
        ...


@runtime_checkable
class KnowsViewTruth(Protocol):
    """Samples of a training set whose heads can be drawn from other cameras."""

    def view_truth(self, sample: dict[str, Any], camera: Camera) -> ViewTruth:
        """What the first view of a sample (V, ...) shows, seen by B cameras."""
        ...


@runtime_checkable
class KnowsTraits(KnowsViewTruth, Protocol):
    """Samples whose heads can be drawn with a trait changed."""

    traits: tuple[str, ...]
    """Names of the numbers of a sample's code, N(0, 1) each."""

    def changed(self, sample: dict[str, Any], trait: str, deviations: float) -> dict[str, Any]:
        """A sample whose heads have more of a trait, or less, by so many standard deviations of its number in the
        code; all else is the same. Its picture is not drawn: ask :meth:`view_truth`."""
        ...


@runtime_checkable
class KnowsScan(Protocol):
    """Samples whose faces' surfaces are known."""

    def scan_truth(self, sample: dict[str, Any]) -> Scan:
        """The surface that the first view of a sample (V, ...) shows."""
        ...


class Attributes(Protocol):
    """What is known of heads by their codes."""

    names: tuple[str, ...]

    def __call__(self, z: Tensor, /) -> Tensor:
        """Codes (B, z_dim) -> scores (B, len(names)); higher is more of it."""
        ...


@runtime_checkable
class KnowsCodeTruth(Protocol):
    """Codes of a generator that are the codes of a world whose attributes are known."""

    def code_truth(self, z_dim: int) -> Attributes:
        """The attributes of codes of that size.

        Raises:
            UserError: when they are not codes of that world.
        """
        ...
