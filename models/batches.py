"""What data modules give to stages: B subjects, V pictures of each; the fields' shapes and units."""

from __future__ import annotations

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


_OF_SUBJECTS = ("name", "seed", "z")


def some_views(batch: PortraitBatch, views: slice | Tensor) -> PortraitBatch:
    """The chosen views of each subject, all fields of them."""
    picked = {name: value if name in _OF_SUBJECTS else cast(Tensor, value)[:, views] for name, value in batch.items()}
    return cast(PortraitBatch, picked)


def subject(batch: PortraitBatch, row: int) -> dict[str, Any]:
    """The fields of one subject, without the leading dimension."""
    return {name: cast(Any, value)[row] for name, value in batch.items()}


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
