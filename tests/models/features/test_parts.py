"""Which of a parser's segments are the face."""

import pytest
import torch
from torch import nn

from models.errors import UserError
from models.features.parts import face_mask, face_rows


class Halves(nn.Module):
    segments = ("background", "skin", "hair", "lips")

    def forward(self, image):
        logits = torch.zeros(len(image), 4, *image.shape[2:])
        logits[:, 1, :, :2] = 1.0
        logits[:, 2, :, 2:] = 1.0
        return logits


def test_rows_and_mask():
    assert face_rows(Halves(), None, "it") == [1, 3]
    assert face_rows(Halves(), ["hair"], "it") == [2]
    mask = face_mask(torch.zeros(1, 3, 4, 4), Halves(), [1, 3])
    assert mask.shape == (1, 1, 4, 4) and mask[0, 0].tolist() == [[1, 1, 0, 0]] * 4


def test_names_that_are_none():
    with pytest.raises(UserError, match="it has 'nose': the parser knows background, skin, hair, lips"):
        face_rows(Halves(), ["nose"], "it")
