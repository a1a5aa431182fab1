"""Points of the face in pictures, as a feature network."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from models.configurable import Configurable
from models.faces.pose import CanonicalFace
from models.faces.reader import FaceReader

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
        faces = self.reader.find(image)
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
        side = image.shape[-1]
        return self.reader.follow(image, near * side) / side
