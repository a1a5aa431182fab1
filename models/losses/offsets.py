"""What an edit may change of a face: not who it is, but what it looks like in detail.

Source: 3D cartoon faces (Wang et al.), Sec. III-C, Eq. 7 to 9.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.checks import check_not_negative
from models.errors import UserError
from models.features.base import FaceParser, FaceRecognition
from models.features.parts import face_mask, face_rows


@dataclass(frozen=True)
class OffsetLoss:
    """L_opt = L_id - low L_low (Eq. 9), of pictures before and after an edit.

    L_id is the squared distance of a face recognition network's embeddings (Eq. 7). L_low is the mean squared
    difference of the same network's early features (Eq. 8) of the faces alone: of both pictures all is made grey that
    is no face in either of them. It has no lower bound: what holds it are few steps and a trust region.

    Attributes:
        low: lambda_low.
        face: names of the parser's segments that are the face; all but hair, cloth and what is behind when null.
    """

    low: float = 0.2
    face: list[str] | None = None

    def __post_init__(self) -> None:
        check_not_negative(self, "low", where="offset_loss.")
        if self.face is not None and not self.face:
            raise UserError("offset_loss.face is []: name the parser's segments that are the face, or all by null")

    def __call__(
        self, image: Tensor, before: Tensor, recognition: FaceRecognition, parser: FaceParser
    ) -> dict[str, Tensor]:
        """Compare pictures (B, 3, H, W) in [-1, 1] with the unedited ones; no gradient reaches these, nor the masks.

        Returns:
            ``id`` and ``low``, and the whole as ``loss``: (B,) each.
        """
        before = before.detach()
        distance = (recognition(image) - recognition(before)).square().sum(1)
        mask = self.mask(image, before, parser)
        early = (recognition.early(mask * image) - recognition.early(mask * before)).square().flatten(1).mean(1)
        return {"id": distance, "low": early, "loss": distance - self.low * early}

    def mask(self, image: Tensor, before: Tensor, parser: FaceParser) -> Tensor:
        """(B, 1, H, W) of 0 and 1: where there is a face in either picture, as segments differ before and after."""
        rows = self.rows(parser)
        return torch.maximum(*(face_mask(picture, parser, rows) for picture in (image, before)))

    def rows(self, parser: FaceParser) -> list[int]:
        """Numbers of the parser's segments that are the face, see :func:`models.features.parts.face_rows`."""
        return face_rows(parser, self.face, "offset_loss.face")
