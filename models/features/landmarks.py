"""Points of the face in pictures, as a feature network."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.configurable import Configurable
from models.faces.crop import cut
from models.faces.pose import CanonicalFace
from models.faces.reader import FaceReader, framed, unframed

_SURE = 0.8  # how much of a face a mask must hold


class FaceLandmarks(Configurable):
    """468 points of the face in pictures of one: MediaPipe's mesh.

    Args:
        weights: "embedded" for those that are shipped, or an artifact of ``galatea zoo import faces``.
    """

    def __init__(self, weights: str = "embedded") -> None:
        super().__init__()
        self.reader = FaceReader.load(weights)

    @property
    def canonical(self) -> CanonicalFace:
        """The face that all people share."""
        return self.reader.canonical

    def find(self, image: Tensor) -> Tensor | None:
        """The points of the largest face in units of the picture's side, None where there is none.

        Args:
            image: (1, 3, S, S) in [-1, 1].

        Returns:
            (468, 3): x right and y down from 0 to 1, z away from the viewer.
        """
        with _exactly(image):
            faces = self.reader.find(image.float())
        return faces[0].points / image.shape[-1] if faces else None

    def person(self, image: Tensor, points: Tensor) -> Tensor | None:
        """Mask of the person whose face is known; None where the mask does not even hold the face, as on some drawings.

        Args:
            image: (1, 3, S, S) in [-1, 1]. points: (468, 3) as :meth:`find`.

        Returns:
            (1, 1, S, S) from 0 to 1.
        """
        mask = self.reader.person(image)
        on_face = F.grid_sample(mask, (2 * points[None, None, :, :2] - 1).to(mask), align_corners=False)
        return mask if float(on_face.mean()) > _SURE else None

    def forward(self, image: Tensor, near: Tensor) -> Tensor:
        """Points of faces whose places are roughly known; differentiable with respect to the pictures.

        Args:
            image: (B, 3, S, S) in [-1, 1].
            near: (B, 468, 2 or 3) roughly where, in units of the picture's side.

        Returns:
            (B, 468, 3) in units of the picture's side.
        """
        side, size = image.shape[-1], self.reader.mesher.size
        with _exactly(image):
            squares = [framed(face * side) for face in near.detach().float()]
            cuts = [cut(one[None], *square, size) for one, square in zip(image.float(), squares, strict=True)]
            points, _ = self.reader.mesh(torch.cat(cuts))
            return torch.stack([unframed(p, *square) for p, square in zip(points, squares, strict=True)]) / side


def _exactly(image: Tensor) -> torch.autocast:
    """Not under the caller's autocast: half precision moves points by pixels."""
    return torch.autocast(image.device.type, enabled=False)
