"""What a frozen feature network answers, kind by kind, and the holder that keeps it frozen.

Every network takes images (B, 3, H, W) in [-1, 1] of any size and is differentiable with respect to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn

from models.errors import UserError
from models.faces.pose import CanonicalFace

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@runtime_checkable
class PerceptualDistance(Protocol):
    """Distance between two images as a viewer would judge it."""

    def __call__(self, a: Tensor, b: Tensor, /) -> Tensor:
        """(B, 3, H, W) twice -> (B,) distances, 0 for equal images."""
        ...


@runtime_checkable
class ImageEmbedding(Protocol):
    """Embedding in which a change of style is a direction."""

    dim: int

    def __call__(self, image: Tensor, /) -> Tensor:
        """(B, 3, H, W) -> (B, dim)."""
        ...


@runtime_checkable
class IdentityEmbedding(Protocol):
    """Embedding of who is shown; the cosine of two of them is the identity similarity."""

    dim: int

    def __call__(self, image: Tensor, /) -> Tensor:
        """(B, 3, H, W) -> (B, dim) unit vectors."""
        ...


@runtime_checkable
class FaceRecognition(IdentityEmbedding, Protocol):
    """An identity embedding that shows its early features, which tell the small things of a picture."""

    def early(self, image: Tensor, /) -> Tensor:
        """(B, 3, H, W) -> (B, C, h, w), the output of its first residual stage."""
        ...


@runtime_checkable
class FaceParser(Protocol):
    """Segmentation of a head into named parts."""

    segments: tuple[str, ...]

    def __call__(self, image: Tensor, /) -> Tensor:
        """(B, 3, H, W) -> (B, len(segments), H, W) logits at the input's resolution."""
        ...


@runtime_checkable
class PoseEstimator(Protocol):
    """Camera position around the head."""

    def __call__(self, image: Tensor, /) -> Tensor:
        """(B, 3, H, W) -> (B, 2) yaw and pitch in radians, with the signs of ``models.camera``."""
        ...


@runtime_checkable
class AttributeScorer(Protocol):
    """How much a head has of some attributes."""

    names: tuple[str, ...]

    def __call__(self, image: Tensor, /) -> Tensor:
        """(B, 3, H, W) -> (B, len(names)), higher is more of it; NaN where it cannot be told."""
        ...


@runtime_checkable
class FacePoints(Protocol):
    """Points of faces: MediaPipe's 468, in units of the picture's side."""

    canonical: CanonicalFace

    def find(self, image: Tensor, /) -> Tensor | None:
        """(1, 3, S, S) -> (468, 3) of the largest face, None where there is none."""
        ...

    def person(self, image: Tensor, points: Tensor, /) -> Tensor | None:
        """(1, 3, S, S) and the face in it -> (1, 1, S, S) mask of the person, None where it is not sure."""
        ...

    def __call__(self, image: Tensor, near: Tensor, /) -> Tensor:
        """(B, 3, S, S) and roughly where its faces are (B, 468, 2 or 3) -> (B, 468, 3)."""
        ...


def network_name(network: nn.Module) -> str:
    """How scores name the network they are measured with: its ``label`` where it has one, else its class."""
    return getattr(network, "label", type(network).__name__)


class Frozen(Generic[ModuleT]):
    """Holds a network outside its owner's ``state_dict``, ``parameters()`` and DDP buckets.

    It is not an ``nn.Module``, so the owner neither registers, saves nor trains it. A stage moves its own with itself;
    any other owner calls :func:`move_frozen`. Gradients flow through the network to its input, never to its weights.
    """

    def __init__(self, module: ModuleT) -> None:
        self.module: ModuleT = module.eval().requires_grad_(False)

    def __call__(self, *args: Tensor) -> Tensor:
        return cast(Tensor, self.module(*args))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Frozen[ModuleT]:
        """Move the network in place; cheap when it is already there."""
        self.module.to(device=device, dtype=dtype)
        return self

    def __repr__(self) -> str:
        return f"Frozen({type(self.module).__name__})"


class FrozenHolder:
    """Holds networks for its owner: what is frozen in it is the owner's."""


def frozen_of(owner: object) -> Iterator[Frozen[nn.Module]]:
    """Every :class:`Frozen` that is an attribute of ``owner``, or in a list, or a holder, that is one."""
    for value in vars(owner).values():
        if isinstance(value, FrozenHolder):
            yield from frozen_of(value)
        yield from (held for held in (value if isinstance(value, list) else [value]) if isinstance(held, Frozen))


def move_frozen(owner: object, device: torch.device | str) -> None:
    """Move what :func:`frozen_of` finds to ``device``."""
    for held in frozen_of(owner):
        held.to(device)


def frozen_scorers(networks: Sequence[nn.Module] | None) -> list[Frozen[Any]]:
    """Networks that score attributes (:class:`AttributeScorer`), frozen.

    Raises:
        UserError: for one that scores none.
    """
    for network in networks or ():
        if not isinstance(getattr(network, "names", None), tuple | list):
            raise UserError(f"{type(network).__name__} scores no attributes: it has no names of any")
    return [Frozen(network) for network in networks or ()]
