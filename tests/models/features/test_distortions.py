"""Damages and measurements with which the embedded networks are trained and judged."""

import numpy as np
import pytest
import torch
from kornia.filters import gaussian_blur2d
from scipy.stats import spearmanr
from sklearn.metrics import jaccard_score
from sklearn.neighbors import NearestCentroid

from models.features.distortions import DISTORTIONS, affine_grid, appearance, distort, gaussian_blur, photometric
from models.features.evaluation import (
    centroid_accuracy,
    mean_iou,
    mean_pairwise_cosine,
    perceptual_order,
    retrieval_top1,
    spearman,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def image():
    return torch.nn.functional.interpolate(torch.rand(4, 3, 8, 8, generator=generator()) * 2 - 1, 32, mode="bilinear")


def test_blur_against_kornia(image):
    wanted = gaussian_blur2d(image, (11, 11), (1.3, 1.3), border_type="replicate")
    torch.testing.assert_close(gaussian_blur(image, torch.full((4,), 1.3)), wanted)


@pytest.mark.parametrize("kind", DISTORTIONS)
def test_damage_grows_with_its_strength(kind, image):
    errors = []
    for strength in (0.0, 0.2, 0.5, 1.0):
        damaged = distort(image, kind, torch.full((4,), strength), generator(1))
        assert damaged.shape == image.shape and damaged.abs().max() <= 1.0001
        errors.append((damaged - image).square().mean())
    assert errors[0] < 1e-6 and errors[0] < errors[1] < errors[2] < errors[3]


def test_unknown_damage(image):
    with pytest.raises(ValueError, match="unknown distortion 'fog'; choose from blur"):
        distort(image, "fog", torch.zeros(4), generator())


def test_photometric_groups_share_a_draw(image):
    same = image[:1].expand(4, -1, -1, -1)
    changed = photometric(same, generator(3), group=2, strength=1.0)
    assert changed.min() >= -1 and changed.max() <= 1
    assert (changed[0] - changed[1]).abs().mean() < 0.1  # equal but for the noise
    assert (changed[0] - changed[2]).abs().mean() > (changed[0] - changed[1]).abs().mean()
    with pytest.raises(ValueError, match="groups of 3"):
        photometric(same, generator(), group=3)
    assert torch.equal(photometric(image, generator(5)), photometric(image, generator(5)))


def test_affine_grid_without_strength_is_the_identity(image):
    grid = affine_grid(4, 32, generator(), strength=0.0)
    torch.testing.assert_close(torch.nn.functional.grid_sample(image, grid, align_corners=False), image)


def test_appearance():
    image = torch.zeros(1, 3, 10, 10)
    image[0, 0, :5] = 1.0
    segmentation = torch.zeros(1, 10, 10, dtype=torch.uint8)
    segmentation[0, :5] = 2
    value, mask = appearance(image, segmentation, ((0,), (1, 2), (7,)))
    assert value.shape == mask.shape == (1, 12)
    torch.testing.assert_close(value[0, :6], torch.tensor([0.0, 0, 0, 1, 0, 0]))
    assert mask[0].tolist() == [1] * 6 + [0] * 3 + [1] * 3


def test_spearman_against_scipy():
    values = torch.rand(5, 7, generator=generator())
    wanted = [spearmanr(row.numpy(), np.arange(7)).statistic for row in values]
    np.testing.assert_allclose(spearman(values).numpy(), wanted, atol=1e-12)


def test_mean_iou_against_scikit_learn():
    truth, guess = torch.randint(0, 4, (2, 3, 8, 8), generator=generator())
    wanted = jaccard_score(truth.flatten(), guess.flatten(), average="macro")
    assert mean_iou(guess, truth, 6) == pytest.approx(wanted)  # classes that never occur do not count


def test_centroids_against_scikit_learn():
    points, label = torch.randn(40, 3, generator=generator()), torch.arange(40) % 3
    points += label[:, None]
    fit = torch.arange(40) < 20
    model = NearestCentroid().fit(points[fit].numpy(), label[fit].numpy())
    right = torch.from_numpy(model.predict(points[~fit].numpy())) == label[~fit]
    assert torch.equal(centroid_accuracy(points, label, fit), right)


def test_retrieval_and_cosines():
    gallery = torch.eye(6)
    assert retrieval_top1(gallery, gallery + 0.1, size=3) == 1.0
    assert retrieval_top1(gallery, gallery.roll(1, 0), size=6) == 0.0
    delta = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert mean_pairwise_cosine(delta) == pytest.approx(1 / 3)
    assert mean_pairwise_cosine(delta[:2], delta[2:]) == pytest.approx(0)


def test_perceptual_order_of_the_squared_error_is_perfect(image):
    order = perceptual_order(lambda a, b: (a - b).square().flatten(1).mean(1), image)
    assert set(order) == set(DISTORTIONS) and min(order.values()) > 0.95
