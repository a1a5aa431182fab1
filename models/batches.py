"""What data modules give to stages: B subjects, V pictures of each; the fields' shapes and units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Required, TypedDict, cast

from torch import Tensor


class PortraitBatch(TypedDict, total=False):
    """Pictures, and what is known of them. What a kind of data does not know is not there."""

    image: Required[Tensor]
    """(B, V, 3, H, W) RGB in [-1, 1], float."""
    label: Tensor
    """(B, V, 25) camera labels: row-major cam2world, then intrinsics, see :mod:`models.camera`."""
    name: list[str]
    """B names of the pictures' files."""
    seed: Tensor
    """(B,) numbers of the embedded world's subjects."""
    z: Tensor
    """(B, z_dim) codes behind the pictures."""
    expression: Tensor
    """(B, V, E) coefficients."""
    twin: Tensor
    """(B, V, 3, H, W) the same heads in a style."""
    style: Tensor
    """(B, V) indices of art styles."""
    mask: Tensor
    """(B, V, 1, H, W) coverage of the subject in [0, 1]."""
    depth: Tensor
    """(B, V, 1, H, W) camera-z of the subject, world units; 0 where there is none."""
    normals: Tensor
    """(B, V, 3, H, W) unit normals on world axes."""
    segmentation: Tensor
    """(B, V, H, W) indices into ``models.segments.SEGMENTS``."""


class SampleBatch(PortraitBatch, total=False):
    """Samples of a frozen generator: pictures, the codes behind them, and the shape of these (E3DGE, Eq. 1).

    Depth, mask and normals have the size (h, w) of ``raw``. A picture has P points on what it shows and Q in space.
    """

    raw: Tensor
    """(B, V, 3, h, w) pictures before super-resolution, in [-1, 1]; of a generator that renders such."""
    ws: Required[dict[str, Tensor]]
    """The groups of B codes, as of :class:`models.latents.Latents`."""
    draws: Required[Tensor]
    """(B, V) seeds of the draws of points, int64."""
    surface: Required[Tensor]
    """(B, V, P, 3) points at the expected depths of pixels, P_O; world units."""
    surface_mask: Required[Tensor]
    """(B, V, P, 1) 1 where the pixel shows the subject, else 0."""
    surface_value: Required[Tensor]
    """(B, V, P, 1) the field there, see :class:`models.generators.geometry.FieldGeometry`."""
    surface_normals: Required[Tensor]
    """(B, V, P, 3) unit, outward, world axes."""
    space: Required[Tensor]
    """(B, V, Q, 3) points around the surface and anywhere in the scene, P_F; world units."""
    space_mask: Required[Tensor]
    """(B, V, Q, 1) 1 within the scene's cube, else 0."""
    space_value: Required[Tensor]
    """(B, V, Q, 1) the field there."""


_OF_SUBJECTS = ("name", "seed", "z", "ws")


def some_views(batch: PortraitBatch, views: slice | Tensor) -> PortraitBatch:
    """The chosen views of each subject, all fields of them."""
    picked = {name: value if name in _OF_SUBJECTS else cast(Tensor, value)[:, views] for name, value in batch.items()}
    return cast(PortraitBatch, picked)


def some_subjects(batch: PortraitBatch, rows: Sequence[int]) -> PortraitBatch:
    """The chosen subjects, all fields of them."""

    def picked(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: picked(part) for name, part in value.items()}
        return value[list(rows)] if isinstance(value, Tensor) else [value[row] for row in rows]

    return cast(PortraitBatch, {name: picked(value) for name, value in batch.items()})


def subject(batch: PortraitBatch, row: int) -> dict[str, Any]:
    """The fields of one subject, without the leading dimension."""

    def own(value: Any) -> Any:
        return {name: part[row] for name, part in value.items()} if isinstance(value, dict) else value[row]

    return {name: own(value) for name, value in batch.items()}


class PairBatch(TypedDict):
    """Six pictures of each of B subjects: three poses, twice each, in two styles."""

    image: Tensor
    """(B, 6, 3, H, W) RGB, uint8: they are augmented before they become floats."""
    segmentation: Tensor
    """(B, 6, H, W) uint8 indices into ``models.segments.SEGMENTS``."""
    style: Tensor
    """(B, 6) indices of art styles."""
    yaw: Tensor
    """(B, 6) radians."""
    pitch: Tensor
    """(B, 6) radians."""
