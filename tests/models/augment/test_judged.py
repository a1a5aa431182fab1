"""What a discriminator sees of a picture."""

import pytest
import torch
from torch.testing import assert_close

from models.augment.judged import JudgedAugmentation
from models.errors import UserError
from models.losses.gan import r1_penalty
from tests.models.generators.protocol import seeded

STILL = {"brightness": 0.0, "saturation": 0.0, "contrast": 0.0, "shift": 0.0, "cutout": 0.0}


def pictures(count=64, side=16):
    return torch.rand(count, 3, side, side, generator=seeded(1)) * 2 - 1


def test_nothing_is_changed_by_nothing():
    image = pictures()
    assert_close(JudgedAugmentation(**STILL)(image, seeded()), image)


def test_pictures_are_moved_by_whole_pixels():
    image = pictures()
    moved = JudgedAugmentation(**(STILL | {"shift": 0.125}))(image, seeded())
    padded, found = torch.nn.functional.pad(image, (2, 2, 2, 2)), set()
    for before, after in zip(padded, moved, strict=True):
        places = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if torch.allclose(before[:, y : y + 16, x : x + 16], after, atol=1e-5)
        ]
        assert len(places) == 1
        found |= set(places)
    assert len(found) > 12


def test_a_square_is_blank():
    image = pictures() + 3
    cut = JudgedAugmentation(**(STILL | {"cutout": 0.5}))(image, seeded())
    blank = (cut == 0).all(1)
    assert_close(cut.where(~blank[:, None], image), image)
    assert int(blank.sum((1, 2)).max()) == 64 and float(blank.float().mean()) > 0.1


@pytest.mark.parametrize("name", ["brightness", "saturation", "contrast"])
def test_colours_change(name):
    image = pictures()
    changed = JudgedAugmentation(**(STILL | {name: 0.5}))(image, seeded())
    grey = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    light, other = (image * grey).sum(1), (changed * grey).sum(1)
    difference = (other - light).flatten(1)
    if name == "saturation":
        assert float(difference.abs().max()) < 1e-5
    if name == "brightness":
        assert float(difference.std(1).max()) < 1e-5 and float(difference.mean(1).std()) > 0.2
    if name == "contrast":
        assert_close(changed.mean((1, 2, 3)), image.mean((1, 2, 3)), atol=1e-5, rtol=0)
    assert float((changed - image).abs().mean()) > 0.02


def test_it_can_be_differentiated_twice_and_draws_from_the_callers():
    image = pictures(4)
    augment = JudgedAugmentation()
    penalty, _ = r1_penalty(lambda x: (augment(x, seeded(5)) ** 2).mean((1, 2, 3)), image)
    assert penalty.requires_grad and bool((penalty > 0).all())
    assert torch.equal(augment(image, seeded(5)), augment(image, seeded(5)))
    assert not torch.equal(augment(image, seeded(5)), augment(image, seeded(6)))


def test_nonsense_is_refused():
    with pytest.raises(UserError, match=r"augment\.shift"):
        JudgedAugmentation(shift=-1)
