"""L_opt of offsets against loops written by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from models.errors import UserError
from models.features.embedded import EmbeddedIdentity, EmbeddedParser
from models.losses.offsets import OffsetLoss


class Recognition(nn.Module):
    dim = 2

    def forward(self, image):
        return torch.stack([image[:, 0].mean((1, 2)), image[:, 1].square().mean((1, 2))], 1)

    def early(self, image):
        return torch.cat([2 * image, image[:, :1] ** 2], 1)


class Parser(nn.Module):
    """Left half: hair; right half: what is bright is face, what is red too, as another segment."""

    segments = ("background", "skin", "lips", "hair")

    def forward(self, image):
        logits = torch.zeros(len(image), 4, *image.shape[2:])
        logits[:, 0] = 0.1
        logits[:, 1] = image.mean(1)
        logits[:, 2] = 2 * (image[:, 0] - 0.5)
        logits[:, 3, :, : image.shape[3] // 2] = 9.0
        return logits


def pictures(seed):
    return torch.rand(3, 3, 6, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def by_hand(image, before, low, face):
    """In NumPy, float64, picture by picture and pixel by pixel."""
    found = []
    for one, other in zip(image.double().numpy(), before.double().numpy(), strict=True):
        f = [np.array([x[0].mean(), (x[1] ** 2).mean()]) for x in (one, other)]
        distance = ((f[0] - f[1]) ** 2).sum()
        total = 0.0
        for i in range(6):
            for j in range(8):
                seen = []
                for x in (one, other):
                    values = [0.1, x[:, i, j].mean(), 2 * (x[0, i, j] - 0.5), 9.0 if j < 4 else 0.0]
                    seen.append(("background", "skin", "lips", "hair")[int(np.argmax(values))] in face)
                if any(seen):
                    a, b = (np.append(2 * x[:, i, j], x[0, i, j] ** 2) for x in (one, other))
                    total += ((a - b) ** 2).sum()
        found.append((distance, total / (4 * 6 * 8), distance - low * total / (4 * 6 * 8)))
    return np.array(found)


@pytest.mark.parametrize(("low", "face"), [(0.2, None), (0.7, ["lips"])])
def test_it_is_what_is_written_by_hand(low, face):
    image, before = pictures(0), pictures(1)
    found = OffsetLoss(low, face)(image, before, Recognition(), Parser())
    wanted = by_hand(image, before, low, face or ["skin", "lips"])
    np.testing.assert_allclose(torch.stack([found["id"], found["low"], found["loss"]], 1).numpy(), wanted, rtol=1e-5)


def test_nothing_changes():
    image = pictures(2)
    found = OffsetLoss()(image, image, Recognition(), Parser())
    assert all(not values.any() for values in found.values())


def test_where_the_gradient_goes():
    """To the edited picture; not to the unedited one, nor outside of the face by L_low, and none through the mask."""
    image, before = pictures(3).requires_grad_(), pictures(4).requires_grad_()
    OffsetLoss()(image, before, Recognition(), Parser())["low"].sum().backward()
    assert before.grad is None
    mask = OffsetLoss().mask(image, before, Parser())
    assert mask.unique().tolist() == [0, 1] and not mask.requires_grad
    assert not image.grad[:, :, :, :4].any() and not (image.grad * (1 - mask)).any() and bool((image.grad * mask).any())


def test_the_embedded_networks():
    image, before = (torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(2))
    found = OffsetLoss()(image, before, EmbeddedIdentity(), EmbeddedParser())
    assert all(values.shape == (2,) and bool(values.isfinite().all()) for values in found.values())
    early = EmbeddedIdentity().early(image)
    assert early.shape == (2, 48, 16, 16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"face": ["nose"]}, "offset_loss.face has 'nose': the parser knows background, skin, lips, hair"),
        ({"face": []}, r"offset_loss.face is \[\]"),
        ({"low": -1.0}, "offset_loss.low is -1.0"),
    ],
)
def test_mistakes(options, words):
    with pytest.raises(UserError, match=words):
        OffsetLoss(**options).rows(Parser())
