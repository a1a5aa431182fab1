"""The NoW benchmark's numbers (Sanyal et al. 2019), of scans and reconstructions that :mod:`datamodules.now` reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from models.errors import UserError
from models.metrics.records import Record
from models.metrics.scan import Scan, pooled, scan_distances, scan_scores

PROTOCOL, VERSION = "now", "1"


@dataclass(frozen=True)
class NoWPicture:
    """A picture of the benchmark, and where its reconstruction is."""

    subject: str
    challenge: str
    name: str

    @property
    def item(self) -> str:
        """What it is called in tables."""
        return f"{self.subject}/{self.challenge}/{self.name}"


class Reconstruction(NamedTuple):
    """A surface and its keypoints.

    Attributes:
        vertices: (V, 3). faces: (F, 3). keypoints: (7, 3), in the order of :data:`models.metrics.scan.KEYPOINTS`.
    """

    vertices: Tensor
    faces: Tensor
    keypoints: Tensor


Pair = tuple[NoWPicture, tuple[Scan, Reconstruction] | None]
"""A picture, and what is compared; None where there is no reconstruction."""


def measure(pairs: Iterable[Pair], scale: bool = True) -> Iterator[tuple[NoWPicture, Tensor | None]]:
    """Distances (M,) of each picture's scan to its reconstruction, in the scan's units; None where there is none.

    Args:
        pairs: as :func:`datamodules.now.pairs` reads them.
        scale: whether the alignment may scale; NoW's "metrical" variant does not.

    Raises:
        UserError: naming the picture, when a reconstruction or a scan cannot be measured.
    """
    for picture, pair in pairs:
        if pair is None:
            yield picture, None
            continue
        scan, found = pair
        try:
            yield picture, scan_distances(scan, found.vertices, found.faces, found.keypoints, scale)
        except UserError as error:
            raise UserError(f"{picture.item}: {error}") from error


def records(measured: list[tuple[NoWPicture, Tensor | None]], variant: str, split: str = "val") -> list[Record]:
    """Each picture's scores, and those of all points of all pictures together, which NoW's tables have, as item "all".

    Raises:
        UserError: when there is no reconstruction of any picture.
    """

    def rows(item: str, subject: str, values: dict[str, float]) -> list[Record]:
        return [
            Record(PROTOCOL, VERSION, split, item, "", 0, variant, "", metric, value, subject)
            for metric, value in values.items()
        ]

    there = [(picture, distances) for picture, distances in measured if distances is not None]
    if not there:
        raise UserError("there is no picture with a reconstruction")
    found = [row for picture, d in there for row in rows(picture.item, picture.subject, scan_scores(d))]
    return found + rows("all", "", pooled([distances for _, distances in measured]))
