"""Metrics between images, one value per image. Images are (B, 3, H, W) in [-1, 1], masks (B, 1, H, W) in [0, 1].

A mask weighs pixels; an image whose mask is empty has the value NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

from models.features.base import AttributeScorer, PerceptualDistance


def masked_mean(value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of (B, C, H, W) over channels and pixels, weighted by ``mask``: (B,); NaN where the mask is empty."""
    if mask is None:
        return value.flatten(1).mean(1)
    weight = mask.to(value).expand_as(value)
    return (value * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)


def psnr(image: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB: (B,); infinite for equal images. The peak is the range of [-1, 1]."""
    return 10 * torch.log10(4 / masked_mean((image - truth).square(), mask))


def ssim(image: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Structural similarity (Wang et al. 2004; Gaussian window of deviation 1.5) on [0, 1], masked after windowing.

    Returns:
        (B,).
    """
    pair = ((image + 1) / 2, (truth + 1) / 2)
    _, full = structural_similarity_index_measure(*pair, data_range=1.0, reduction="none", return_full_image=True)
    return masked_mean(full, mask)


def high_pass(image: Tensor, sigma: float = 1.0) -> Tensor:
    """What a Gaussian blur takes away: (B, 3, H, W); ``sigma`` in pixels."""
    side = 2 * math.ceil(3 * sigma) + 1
    from kornia.filters import gaussian_blur2d  # here: slow to import

    return image - gaussian_blur2d(image, (side, side), (sigma, sigma))


def high_frequency(image: Tensor, sigma: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Root mean square of what a Gaussian blur takes away: (B,); ``sigma`` in pixels. Masked after blurring."""
    return masked_mean(high_pass(image, sigma).square(), mask).sqrt()


def masked_distance(network: PerceptualDistance, image: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Perceptual distance (B,); with a mask, ``image`` is replaced by ``truth`` outside of it first."""
    if mask is not None:
        image = truth + mask.to(image) * (image - truth)
    return network(image, truth)


def crop_to_mask(mask: Tensor, *images: Tensor, size: int, margin: float = 0.1) -> tuple[Tensor, ...]:
    """Cut the square around each mask's pixels out of the images, at one common size.

    Args:
        mask: (B, 1, H, W); pixels above 0.5 count. An empty mask keeps the whole image.
        images: (B, C, H, W) each.
        size: side of the crops in pixels.
        margin: added on each side, as a share of the square.

    Returns:
        (B, C, size, size) each, sampled bilinearly.
    """
    height, width = mask.shape[-2:]
    boxes = []
    for one in mask[:, 0] > 0.5:
        ys, xs = one.nonzero(as_tuple=True)
        if len(ys) == 0:
            boxes.append((0.0, 0.0, width / 2, height / 2))
            continue
        top, bottom, left, right = int(ys.min()), int(ys.max()) + 1, int(xs.min()), int(xs.max()) + 1
        half = (0.5 + margin) * max(bottom - top, right - left)
        boxes.append(((left + right - width) / 2, (top + bottom - height) / 2, half, half))
    x, y, half_x, half_y = torch.tensor(boxes, device=mask.device).unbind(1)
    zero = torch.zeros_like(x)
    theta = torch.stack(
        [
            torch.stack([2 * half_x / width, zero, 2 * x / width], 1),
            torch.stack([zero, 2 * half_y / height, 2 * y / height], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [len(mask), 1, size, size], align_corners=False)
    return tuple(F.grid_sample(i, grid.to(i), padding_mode="border", align_corners=False) for i in images)


def identity_similarity(network: Callable[[Tensor], Tensor], image: Tensor, truth: Tensor) -> Tensor:
    """Cosine of the identity embeddings: (B,) in [-1, 1]."""
    return F.cosine_similarity(network(image), network(truth), dim=1)


def likeness(
    image: Tensor,
    truth: Tensor,
    perceptual: PerceptualDistance | None = None,
    identity: Callable[[Tensor], Tensor] | None = None,
    attributes: Sequence[AttributeScorer] = (),
) -> dict[str, Tensor]:
    """How like their truth pictures are, (B,) each.

    ``psnr``; ``lpips`` and ``id`` where there are networks; ``NAME_error`` of each attribute, a difference of scores.
    """
    scores = {"psnr": psnr(image, truth)}
    if perceptual is not None:
        scores["lpips"] = perceptual(image, truth)
    if identity is not None:
        scores["id"] = identity_similarity(identity, image, truth)
    for scorer in attributes:
        errors = (scorer(image) - scorer(truth)).abs()
        scores |= {f"{name}_error": values for name, values in zip(scorer.names, errors.T, strict=True)}
    return scores


def random_pairs(count: int, pairs: int, seed: int = 0) -> Tensor:
    """(P, 2) different pairs i < j out of ``count`` items; all of them when there are no more than ``pairs``."""
    every = torch.combinations(torch.arange(count), 2)
    if len(every) <= pairs:
        return every
    return every[torch.randperm(len(every), generator=Generator().manual_seed(seed))[:pairs].sort().values]


@torch.no_grad()
def diversity(network: PerceptualDistance, images: Tensor, pairs: int = 2000, seed: int = 0, batch: int = 32) -> Tensor:
    """Mean perceptual distance over pairs of ``images`` (N, 3, H, W), sub-sampled with a fixed seed: scalar.

    Measure before and after stylisation with the same latents, views, ``pairs`` and ``seed`` (3DArtmator, Sec. 4.4).
    """
    return _apart(network, images, random_pairs(len(images), pairs, seed).to(images.device), batch).mean()


@torch.no_grad()
def diversity_of_each(
    network: PerceptualDistance, images: Tensor, pairs: int = 2000, seed: int = 0, batch: int = 32
) -> Tensor:
    """What each of N >= 3 pictures adds to their :func:`diversity`, (N,): its jackknife pseudo-values.

    Their mean is the diversity, to rounding where all pairs are taken, and they spread as independent values do, which
    distances of pairs that share a picture do not: an interval over them is one over pictures.
    """
    chosen = random_pairs(len(images), pairs, seed).to(images.device)
    values, count = _apart(network, images, chosen, batch), len(images)
    both = chosen.flatten()
    own = values.new_zeros(count).index_add_(0, both, values.repeat_interleave(2))
    without = (values.sum() - own) / (len(chosen) - both.bincount(minlength=count))
    return count * values.mean() - (count - 1) * without


def _apart(network: PerceptualDistance, images: Tensor, pairs: Tensor, batch: int) -> Tensor:
    """(P,) distances of pairs (P, 2) of pictures."""
    return torch.cat([network(images[part[:, 0]], images[part[:, 1]]) for part in pairs.split(batch)])


def change_correlation(
    before: Tensor, after: Tensor, truth_before: Tensor, truth_after: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Correlation of an image's change with the true change, over channels and pixels: (B,).

    Pearson's coefficient of after - before and truth_after - truth_before, weighted by ``mask``; NaN where either
    does not change at all.
    """
    change, wanted = after - before, truth_after - truth_before

    def centred(value: Tensor) -> Tensor:
        return value - masked_mean(value, mask).view(-1, 1, 1, 1)

    change, wanted = centred(change), centred(wanted)
    covariance = masked_mean(change * wanted, mask)
    return covariance / (masked_mean(change.square(), mask) * masked_mean(wanted.square(), mask)).sqrt()
