"""What renderers give and fields answer, and what may come between the two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

Edit = Callable[[Tensor, Tensor], Tensor]
"""(points (B, P, 3), features (B, P, C)) -> features (B, P, C), differentiable."""


@dataclass(frozen=True)
class Rendering:
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
    features: Tensor | None = None
    """(B, C, h, w) rendered features, where the generator has them."""
    taps: dict[str, Tensor] = field(default_factory=dict)
    """Requested block outputs by name."""

    def replace(self, **changes: object) -> Rendering:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class FieldSample:
    """Radiance at points."""

    colour: Tensor
    """(B, P, 3) RGB in [-1, 1]."""
    density: Tensor | None = None
    """(B, P, 1) volume density, 1 / world unit."""
    sdf: Tensor | None = None
    """(B, P, 1) signed distance, world units, negative inside."""
    occupancy: Tensor | None = None
    """(B, P, 1) opacity of one surface layer, in [0, 1]."""
