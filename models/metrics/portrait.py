"""Scores of a stylised head against the truth from several views (3DArtmator, Sec. 4.3.4, where truth is known)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from models.camera import Camera
from models.features.base import PerceptualDistance
from models.generators.base import Generator
from models.latents import Latents
from models.metrics.geometry import shape_errors
from models.metrics.image import (
    change_correlation,
    crop_to_mask,
    identity_similarity,
    masked_distance,
    masked_mean,
    psnr,
    ssim,
)
from models.rendering.output import Rendering
from models.rendering.visibility import seen_from
from models.segments import SEGMENTS

FACE = tuple(SEGMENTS.index(name) for name in ("skin", "eye_white", "iris", "lips", "mouth", "brow", "beard"))


class ViewTruth(Protocol):
    """Pictures and what they show: (B, 3, H, W), (B, 1, H, W) twice, (B, 3, H, W), (B, H, W), and the cameras."""

    image: Tensor
    depth: Tensor
    mask: Tensor
    normals: Tensor
    segmentation: Tensor
    camera: Camera


class HeadTruth(Protocol):
    """A head at the artwork's own view, from other views, and with every expression, neutral first; and whose it is."""

    input: ViewTruth
    views: ViewTruth
    faces: ExpressionTruth
    subject: str

    def to(self, device: torch.device) -> HeadTruth:
        """On another device."""
        ...


class ExpressionTruth(ViewTruth, Protocol):
    """Pictures (1 + E, 3, H, W) with expression codes (1 + E, E)."""

    expression: Tensor


@dataclass(frozen=True)
class Score:
    """One value.

    Attributes:
        view: "yaw=DEGREES", "input", or "" for a value of the whole head.
        metric: name; "@face" is measured on the face's crop, "@far" on pixels that the artwork does not show in
            views from the other side.
        network: whether a feature network measures it.
        value: may be NaN.
    """

    view: str
    metric: str
    network: bool
    value: float


def compare_views(
    found: Rendering,
    truth: ViewTruth,
    source: ViewTruth,
    perceptual: PerceptualDistance,
    identity: Callable[[Tensor], Tensor] | None = None,
) -> list[Score]:
    """Score each of B views.

    Args:
        found: from the truth's cameras. truth: of B views. source: of the artwork's own view, a batch of one.
        perceptual, identity: the measuring networks.
    """
    image, solid = found.image.float().clamp(-1, 1), truth.mask > 0.5
    names = [f"yaw={round(math.degrees(float(yaw))):+d}" for yaw in truth.camera.yaw]
    scores: list[Score] = []

    def add(metric: str, values: Tensor, network: bool = False, only: Tensor | None = None) -> None:
        for row, value in enumerate(values.tolist()):
            if only is None or bool(only[row]):
                scores.append(Score(names[row], metric, network, value))

    add("psnr", psnr(image, truth.image))
    add("ssim", ssim(image, truth.image))
    add("lpips", perceptual(image, truth.image), network=True)
    face = torch.isin(truth.segmentation.long(), torch.tensor(FACE, device=image.device))[:, None].float()
    crops = crop_to_mask(face, image, truth.image, size=image.shape[-1])
    add("psnr@face", psnr(*crops))
    add("ssim@face", ssim(*crops))
    add("lpips@face", perceptual(*crops), network=True)
    if identity is not None:
        add("identity", identity_similarity(identity, image, truth.image), network=True)
        add("identity@face", identity_similarity(identity, *crops), network=True)

    shown = seen_from(truth.camera, truth.depth, truth.mask, source.camera, source.depth, source.mask)
    hidden = (solid & ~shown).float()
    across = truth.camera.yaw * source.camera.yaw < 0
    far = across & (hidden.flatten(1).sum(1) >= 8)  # fewer pixels say nothing
    add("psnr@far", psnr(image, truth.image, hidden), only=far)
    add("ssim@far", ssim(image, truth.image, hidden), only=far)
    add("lpips@far", masked_distance(perceptual, image, truth.image, hidden), network=True, only=far)

    for metric, values in shape_errors(found, truth).items():
        add(metric, values)
    if found.alpha is not None:
        mask = F.interpolate(truth.mask, found.alpha.shape[-2:], mode="area")
        add("alpha_mae", masked_mean((found.alpha - mask).abs()))
    return scores


def compare_input(found: Rendering, artwork: Tensor, perceptual: PerceptualDistance) -> list[Score]:
    """Scores at the artwork's own view, a batch of one; ``artwork`` (1, 3, H, W) in [-1, 1]."""
    image = found.image.float().clamp(-1, 1)
    values = {"psnr": psnr(image, artwork), "ssim": ssim(image, artwork), "lpips": perceptual(image, artwork)}
    return [Score("input", metric, metric == "lpips", float(value)) for metric, value in values.items()]


def compare_expressions(found: Tensor, truth: Tensor, names: Sequence[str]) -> list[Score]:
    """How far the picture changes as the truth does: ``found`` and ``truth`` are (1 + E, 3, H, W), neutral first."""
    count = len(names)
    changes = change_correlation(
        found[:1].expand(count, -1, -1, -1), found[1:], truth[:1].expand_as(truth[1:]), truth[1:]
    )
    return [Score("", f"expression:{name}", False, value) for name, value in zip(names, changes.tolist(), strict=True)]


def score_head(
    generator: Generator,
    ws: Latents,
    expression: Tensor | None,
    truth: HeadTruth,
    perceptual: PerceptualDistance,
    identity: Callable[[Tensor], Tensor] | None = None,
    expressions: Sequence[str] = (),
) -> tuple[list[Score], Tensor]:
    """All scores of one head, and truth and rendering as rows of one picture (3, H', W').

    Args:
        generator: shows codes ``ws`` of one item, with the resting ``expression`` (1, E) or None.
        expressions: names of the coefficients; compared when the truth has as many.
    """
    found = generator.synthesis(ws, truth.views.camera, expression=expression)
    scores = compare_views(found, truth.views, truth.input, perceptual, identity)
    own = generator.synthesis(ws, truth.input.camera, expression=expression)
    scores += compare_input(own, truth.input.image, perceptual)
    pictures = [truth.views.image, found.image]
    if expressions and len(expressions) == truth.faces.expression.shape[1]:
        codes = truth.faces.expression + (0 if expression is None else expression)
        faces = generator.synthesis(ws, truth.faces.camera, expression=codes).image
        scores += compare_expressions(faces, truth.faces.image, expressions)
        pictures += [truth.faces.image, faces]
    return scores, strip(*pictures)


def strip(truth: Tensor, *rows: Tensor) -> Tensor:
    """Rows of pictures (B, 3, H, W), below each other: (3, rows * H, W'); black where one is shorter."""
    lines = [torch.cat(list(row), 2) for row in (truth, *rows)]
    width = max(line.shape[2] for line in lines)
    return torch.cat([F.pad(line, (0, width - line.shape[2]), value=-1.0) for line in lines], 1).clamp(-1, 1)
