"""Points of the face in pictures, as feature networks: where they are, and what they enclose."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.configurable import Configurable
from models.faces.pose import CanonicalFace
from models.faces.reader import OVAL, FaceReader

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


class FaceOval(nn.Module):
    """A face parser of two segments: what the mesh's oval encloses, from the forehead to the chin, and all else.

    Where no face is found the whole picture is taken for one.

    Args:
        landmarks: finds the points; MediaPipe's by default.
    """

    segments = ("background", "face")

    def __init__(self, landmarks: FaceLandmarks | None = None) -> None:
        super().__init__()
        self.landmarks = landmarks or FaceLandmarks()

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> (B, 2, S, S) logits of 0 and 1, without a gradient."""
        found = [self.landmarks.find(picture.detach()[None].float()) for picture in image]
        side = image.shape[-1]
        masks = [image.new_ones(side, side) if p is None else inside(p[list(OVAL), :2], side).to(image) for p in found]
        face = torch.stack(masks)
        return torch.stack([1 - face, face], 1)


def inside(corners: Tensor, side: int) -> Tensor:
    """Which pixels' centres a polygon encloses: (side, side) of 0 and 1, on the CPU.

    Args:
        corners: (N, 2), x right and y down from 0 to 1.
    """
    from skimage.draw import polygon2mask  # here: slow to import

    places = corners.detach().double().cpu().flip(1) * side - 0.5  # rows and columns
    return torch.from_numpy(polygon2mask((side, side), places.numpy())).float()
