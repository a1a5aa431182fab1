"""Image metrics against scikit-image and plain loops."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import peak_signal_noise_ratio as torchmetrics_psnr

from models.metrics.image import (
    change_correlation,
    crop_to_mask,
    diversity,
    diversity_of_each,
    high_frequency,
    identity_similarity,
    masked_distance,
    psnr,
    random_pairs,
    ssim,
)


@pytest.fixture
def pair():
    g = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.interpolate(torch.rand(2, 3, 6, 6, generator=g), 40, mode="bicubic").clamp(0, 1) * 2 - 1
    return (truth + 0.2 * torch.randn(truth.shape, generator=g)).clamp(-1, 1), truth


def as_numpy(image: torch.Tensor) -> np.ndarray:
    return ((image + 1) / 2).permute(1, 2, 0).double().numpy()


def test_psnr(pair):
    image, truth = pair
    for i in range(2):
        wanted = peak_signal_noise_ratio(as_numpy(truth[i]), as_numpy(image[i]), data_range=1.0)
        assert float(psnr(image, truth)[i]) == pytest.approx(wanted, rel=1e-5)
    wanted = torchmetrics_psnr(image, truth, data_range=2.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(psnr(image, truth), wanted)
    assert psnr(truth, truth).isinf().all()


def test_ssim(pair):
    image, truth = pair
    for i in range(2):
        _, full = structural_similarity(
            as_numpy(truth[i]),
            as_numpy(image[i]),
            data_range=1.0,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        inner = torch.zeros(1, 1, 40, 40)
        inner[..., 6:-6, 6:-6] = 1  # the two treat borders differently
        got = ssim(image[i : i + 1], truth[i : i + 1], inner)
        assert float(got) == pytest.approx(full[6:-6, 6:-6].mean(), rel=1e-4)
    torch.testing.assert_close(ssim(truth, truth), torch.ones(2))


def test_masks_weigh_pixels(pair):
    image, truth = pair
    mask = torch.zeros(2, 1, 40, 40)
    mask[0, :, :20] = 1
    got = psnr(image, truth, mask)
    torch.testing.assert_close(got[0], psnr(image[:1, :, :20], truth[:1, :, :20])[0])
    assert math.isnan(got[1])  # an empty mask has no value
    outside = torch.where(mask[:1] > 0, truth[:1], image[:1])
    distance = masked_distance(lambda a, b: (a - b).abs().flatten(1).sum(1), outside, truth[:1], mask[:1])
    assert float(distance) == 0


def test_high_frequency(pair):
    image, _ = pair
    blurred = gaussian_filter(image.double().numpy(), (0, 0, 1, 1), truncate=3.0, mode="mirror")
    wanted = ((image.double().numpy() - blurred) ** 2).mean((1, 2, 3)) ** 0.5
    assert high_frequency(image).tolist() == pytest.approx(wanted.tolist(), rel=1e-4)
    assert high_frequency(torch.ones(1, 3, 9, 9)).item() == pytest.approx(0, abs=1e-6)


def test_crop_to_mask():
    image = torch.arange(400.0).view(1, 1, 20, 20)
    mask = torch.zeros(1, 1, 20, 20)
    mask[0, 0, 4:12, 6:14] = 1
    (crop,) = crop_to_mask(mask, image, size=8, margin=0.0)
    torch.testing.assert_close(crop, image[..., 4:12, 6:14])
    (whole,) = crop_to_mask(torch.zeros_like(mask), image, size=20)
    torch.testing.assert_close(whole, image)


def test_identity_similarity():
    got = identity_similarity(
        lambda x: x.flatten(1), torch.tensor([[[[1.0]], [[0.0]]]]), torch.tensor([[[[1.0]], [[1.0]]]])
    )
    assert float(got) == pytest.approx(1 / math.sqrt(2))


def test_diversity_is_the_mean_over_pairs():
    images = torch.rand(6, 3, 2, 2)

    def distance(a, b):
        return (a - b).abs().flatten(1).mean(1)

    wanted = np.mean([float((images[i] - images[j]).abs().mean()) for i in range(6) for j in range(i)])
    assert float(diversity(distance, images)) == pytest.approx(wanted, rel=1e-5)
    assert float(diversity(distance, images, pairs=4, seed=1)) == float(diversity(distance, images, pairs=4, seed=1))
    each = diversity_of_each(distance, images)
    assert float(each.mean()) == pytest.approx(wanted, rel=1e-5)
    rest = diversity(distance, images[1:])  # leave the first out
    assert float(each[0]) == pytest.approx(6 * wanted - 5 * float(rest), rel=1e-4)
    chosen = random_pairs(40, 100, seed=3)
    assert chosen.shape == (100, 2) and (chosen[:, 0] < chosen[:, 1]).all() and len(chosen.unique(dim=0)) == 100


def test_change_correlation_against_numpy():
    g = torch.Generator().manual_seed(0)
    before, after, true_before, true_after = torch.rand(4, 2, 3, 5, 5, generator=g)
    mask = torch.zeros(2, 1, 5, 5)
    mask[:, :, 1:4] = 1
    got = change_correlation(before, after, true_before, true_after, mask)
    for i in range(2):
        a, b = (after - before)[i, :, 1:4].numpy().ravel(), (true_after - true_before)[i, :, 1:4].numpy().ravel()
        assert float(got[i]) == pytest.approx(np.corrcoef(a, b)[0, 1], rel=1e-4)
    torch.testing.assert_close(change_correlation(before, after, before, after), torch.ones(2))
    assert change_correlation(before, before, before, after).isnan().all()
