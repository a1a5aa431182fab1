"""How well feature networks work where the truth is known: one small function per question.

Shape suffixes: N pictures, D embedding size, S segments, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from models.features.base import FaceParser, IdentityEmbedding, ImageEmbedding, PerceptualDistance, PoseEstimator
from models.features.distortions import DISTORTIONS, distort

HELD_OUT = 3
"""Index of the embedded world's held-out style among its styles, plain first."""


def centroid_accuracy(embedding: Tensor, label: Tensor, fit: Tensor) -> Tensor:
    """Nearest-centroid classification: centroids from the ``fit`` items, asked about the others.

    Args:
        embedding: (N, D). label: (N,) integers. fit: (N,) bool.

    Returns:
        (N - fit,) bool, whether each remaining item was told right, in order.
    """
    classes = label.unique()
    centroids = torch.stack([embedding[fit & (label == c)].mean(0) for c in classes])
    guess = classes[torch.cdist(embedding[~fit], centroids).argmin(1)]
    return guess == label[~fit]


def mean_pairwise_cosine(delta: Tensor, other: Tensor | None = None) -> float:
    """Mean cosine over all pairs of different rows of ``delta`` (P, D), or of all rows with those of ``other``."""
    unit = F.normalize(delta, dim=1)
    if other is not None:
        return float((unit @ F.normalize(other, dim=1).T).mean())
    count = len(unit)
    return float(((unit @ unit.T).sum() - count) / (count * (count - 1)))


def retrieval_top1(gallery: Tensor, probes: Tensor, size: int = 50) -> float:
    """Share of probes (N, D) whose own row of the gallery (N, D) is the nearest by cosine, in galleries of ``size``.

    Rows that do not fill a last gallery are left out.
    """
    gallery, probes = F.normalize(gallery, dim=1), F.normalize(probes, dim=1)
    size = min(size, len(gallery))
    found = []
    for start in range(0, len(gallery) - size + 1, size):
        block = slice(start, start + size)
        guess = (probes[block] @ gallery[block].T).argmax(1)
        found.append(guess == torch.arange(size, device=guess.device))
    return float(torch.cat(found).float().mean())


def mean_iou(prediction: Tensor, truth: Tensor, classes: int) -> float:
    """Mean intersection over union of the classes that occur, over all pixels of (N, H, W) integer maps together."""
    joint = torch.bincount((truth.long() * classes + prediction.long()).flatten(), minlength=classes**2)
    confusion = joint.reshape(classes, classes).double()
    inside = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - inside
    occurs = confusion.sum(1) > 0
    return float((inside / union.clamp(min=1))[occurs].mean())


def spearman(values: Tensor) -> Tensor:
    """Rank correlation of each row of (N, L) with 0, 1, ..., L - 1 (ties in order of appearance): (N,)."""
    rank = values.argsort(dim=1, stable=True).argsort(dim=1).double()
    order = torch.arange(values.shape[1], dtype=torch.double, device=values.device).expand_as(rank)
    centre = (values.shape[1] - 1) / 2
    return ((rank - centre) * (order - centre)).sum(1) / (order - centre).square().sum(1)


@torch.no_grad()
def perceptual_order(
    distance: Callable[[Tensor, Tensor], Tensor],
    image: Tensor,
    strengths: Sequence[float] = (0.1, 0.25, 0.4, 0.6, 0.8, 1.0),
    seed: int = 0,
) -> dict[str, float]:
    """Rank correlation of a distance with the strength of each kind of damage.

    Args:
        distance: two (B, 3, H, W) in [-1, 1] -> (B,).
        image: (N, 3, H, W).
        strengths: growing, in [0, 1].
        seed: of the damages; one image has the same damage at all strengths.
    """
    result = {}
    for number, kind in enumerate(DISTORTIONS):
        rows = []
        for strength in strengths:
            generator = Generator().manual_seed(seed * 1000 + number)
            damaged = distort(image, kind, torch.full((len(image),), strength), generator)
            rows.append(distance(image, damaged))
        result[kind] = float(spearman(torch.stack(rows, 1)).mean())
    return result


@torch.no_grad()
def measure_features(
    batch: dict[str, Tensor],
    *,
    style: ImageEmbedding,
    identity: IdentityEmbedding,
    pose: PoseEstimator,
    parser: FaceParser,
    perceptual: PerceptualDistance,
    held_out: int = HELD_OUT,
) -> dict[str, float]:
    """Everything at once on matched pictures (see ``datamodules.feature_pairs``, evaluation plan).

    Args:
        batch: ``image`` (N, 6, 3, H, W) uint8, ``segmentation`` (N, 6, H, W), ``style`` (N, 6), ``yaw`` and
            ``pitch`` (N, 6) radians; pictures 0, 2, 4 are plain (style 0), each next one is the same in an art style.
        held_out: index of the style that was kept out of training.

    Returns:
        metric -> value. Centroids are fitted on the first half of the subjects and asked about the second.
    """
    subjects, views = batch["image"].shape[:2]
    image = batch["image"].flatten(0, 1).float() / 127.5 - 1
    kind = batch["style"].flatten().long()
    chunks = image.split(96)
    embedding = torch.cat([style(x) for x in chunks])
    who = torch.cat([identity(x) for x in chunks]).reshape(subjects, views, -1)
    angles = torch.cat([pose(x) for x in chunks])
    labels = torch.cat([parser(x).argmax(1) for x in chunks])
    half = torch.arange(subjects, device=image.device) < subjects // 2
    fit, known = half.repeat_interleave(views), kind != held_out
    groups = {"plain": kind == 0, "art": (kind > 0) & known, "held_out": kind == held_out}
    result: dict[str, float] = {}

    right = centroid_accuracy(embedding, kind, fit)
    result["style_accuracy"] = float(centroid_accuracy(embedding[known], kind[known], fit[known]).float().mean())
    result["style_accuracy_with_held_out"] = float(right.float().mean())
    result["style_recall_held_out"] = float(right[kind[~fit] == held_out].float().mean())

    pairs = embedding.reshape(subjects, views, -1)
    delta = (pairs[:, 1::2] - pairs[:, ::2]).flatten(0, 1)
    target = kind.reshape(subjects, views)[:, 1::2].flatten()
    trained = [int(c) for c in target.unique() if c != held_out]
    result["direction_cosine"] = sum(mean_pairwise_cosine(delta[target == c]) for c in trained) / len(trained)
    result["direction_cosine_held_out"] = mean_pairwise_cosine(delta[target == held_out])
    between = [mean_pairwise_cosine(delta[target == a], delta[target == b]) for a in trained for b in trained if a < b]
    result["direction_cosine_between_styles"] = sum(between) / len(between)
    result["direction_cosine_held_out_to_others"] = sum(
        mean_pairwise_cosine(delta[target == held_out], delta[target == c]) for c in trained
    ) / len(trained)

    result["identity_top1_plain"] = retrieval_top1(who[:, 0], who[:, 2])
    result["identity_top1_art"] = retrieval_top1(who[:, 0], who[:, 3])

    truth = torch.stack([batch["yaw"].flatten(), batch["pitch"].flatten()], 1)
    error = (angles - truth).abs().rad2deg()
    for name, members in groups.items():
        result[f"yaw_error_deg_{name}"], result[f"pitch_error_deg_{name}"] = error[members].mean(0).tolist()
        classes = len(parser.segments)
        segmentation = batch["segmentation"].flatten(0, 1)[members]
        result[f"parsing_miou_{name}"] = mean_iou(labels[members], segmentation, classes)

    sample = image[:: max(1, len(image) // 32)]
    for damage, value in perceptual_order(perceptual, sample).items():
        result[f"perceptual_rank_{damage}"] = value
    moved = F.pad(sample, (1, 0, 0, 0), mode="replicate")[..., :-1]
    other = perceptual(sample, sample.roll(1, 0)).mean()
    result["perceptual_other_head"] = float(other)
    result["perceptual_one_pixel_shift"] = float(perceptual(sample, moved).mean())
    return result
