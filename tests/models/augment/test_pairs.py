"""The pair augmentation: the same for both images, seeded, differentiable."""

import pytest
import torch
from kornia.geometry.transform import warp_perspective

from models.augment.pairs import PairAugmentation


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_both_images_get_the_same_change():
    image = torch.rand(2, 3, 16, 16)
    a, b = PairAugmentation(count=3)(image, image.clone(), generator())
    assert a.shape == (6, 3, 16, 16)
    assert torch.equal(a, b)
    assert not torch.equal(a[0], a[1])  # copies of a pair differ


def test_draws_come_from_the_generator_only():
    image = torch.rand(2, 3, 16, 16)
    state = torch.get_rng_state()
    first = PairAugmentation()(image, image, generator(4))[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, PairAugmentation()(image, image, generator(4))[0])
    assert not torch.equal(first, PairAugmentation()(image, image, generator(5))[0])


def test_switched_off():
    image, other = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    assert PairAugmentation(count=0)(image, other, generator())[0] is image
    still = PairAugmentation(crop=1.0, perspective=0.0, flip=0.0)
    torch.testing.assert_close(still(image, other, generator())[1], other)
    mirrored = PairAugmentation(crop=1.0, perspective=0.0, flip=1.0)
    torch.testing.assert_close(mirrored(image, other, generator())[0], image.flip(3))


def test_crop_and_size():
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    out = PairAugmentation(crop=0.5, perspective=0.0, flip=0.0, size=32)(ramp, ramp, generator(1))[0]
    assert out.shape[-2:] == (32, 32)
    slope = float(out[0, 0, 0, -1] - out[0, 0, 0, 0]) / 31 * 32 / 2
    assert 0.5 <= slope <= 1.0


def test_perspective_is_a_homography():
    # kornia warps with the matrix that maps input positions to output positions.
    augmentation = PairAugmentation(crop=0.8, perspective=0.3, flip=0.0)
    image = torch.rand(1, 3, 24, 24, dtype=torch.double)
    scale, dx, dy, px, py, _ = torch.rand(6, 1, 1, 1, generator=generator(2)).double().flatten()
    side = 0.8 + 0.2 * scale
    a, b = 0.3 * (px - 0.5), 0.3 * (py - 0.5)
    tx, ty = (1 - side) * (2 * dx - 1), (1 - side) * (2 * dy - 1)
    to_input = torch.stack(
        [
            torch.stack([side + tx * a, tx * b, tx]),
            torch.stack([ty * a, side + ty * b, ty]),
            torch.stack([a, b, torch.ones_like(a)]),
        ]
    )
    half = 12.0  # pixel = (unit + 1) * 12 - 0.5
    pixel = torch.tensor([[half, 0, half - 0.5], [0, half, half - 0.5], [0, 0, 1]], dtype=torch.double)
    matrix = pixel @ to_input @ pixel.inverse()
    wanted = warp_perspective(image, matrix.inverse()[None], (24, 24), padding_mode="reflection", align_corners=True)
    got = augmentation(image, image, generator(2))[0]
    inner = (..., slice(4, -4), slice(4, -4))
    torch.testing.assert_close(got[inner], wanted[inner], rtol=1e-4, atol=2e-4)


def test_gradient_reaches_the_images():
    image = torch.rand(1, 3, 8, 8, requires_grad=True)
    PairAugmentation(count=2)(image, image.detach(), generator())[0].sum().backward()
    assert torch.isfinite(image.grad).all() and image.grad.abs().sum() > 0


def test_refuses_nonsense():
    with pytest.raises(ValueError, match="out of range"):
        PairAugmentation(crop=0.0)
    with pytest.raises(ValueError, match="differ in shape"):
        PairAugmentation()(torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 4, 4), generator())
