"""Photos with where an encoder found them in a generator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from models.generators.base import Generator
from models.heads.codes import HeadCode, HeadCodes


class PhotoSet(HeadCodes):
    """Codes and the photos they are of: all that details are reconstructed from, as a module of an artifact.

    Args:
        side: of the photos, pixels.
        ids, groups, expressions: of :class:`HeadCodes`.
    """

    image: Tensor

    def __init__(
        self,
        ids: Sequence[str],
        groups: Sequence[tuple[str, int, int]],
        side: int,
        expressions: Sequence[str] = (),
    ) -> None:
        super().__init__(ids, groups, 0, expressions)
        self.register_buffer("image", torch.zeros(len(self.ids), 3, side, side))

    @staticmethod
    def collect(anchors: Mapping[str, HeadCode], images: Mapping[str, Tensor], generator: Generator) -> PhotoSet:
        """The set of photos (3, side, side) in [-1, 1] by id; each anchor has a camera."""
        packed = HeadCodes.pack(anchors, generator)
        image = torch.stack([images[identity] for identity in packed.ids])
        photos = PhotoSet(packed.ids, _sizes(packed), image.shape[-1], packed.expressions)
        photos.load_state_dict(packed.state_dict() | {"image": image})
        return photos


def _sizes(anchors: HeadCodes) -> list[tuple[str, int, int]]:
    return [(name, *getattr(anchors, f"latents_{name}").shape[1:]) for name in anchors.groups]
