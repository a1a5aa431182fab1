"""Losses of inversion by an encoder, one value per item (GRAMInverter, Sec. 3.2 and A.4; e4e, Tov et al., 2021)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.camera import Camera
from models.checks import check_not_negative
from models.features.base import PerceptualDistance
from models.generators.base import Generator
from models.heads.tuning import TunedWeights
from models.latents import Latents
from models.losses.image import locality_codes, locality_loss, pixel_mse


@dataclass(frozen=True)
class ReconstructionLoss:
    """L_r = pixel |I - I'|^2 + perceptual LPIPS(I, I') + identity (1 - cos(ID(I), ID(I'))) (GRAMInverter, Eq. 6).

    The squared norm is a mean over pixels and channels: as a sum it would leave the other terms without a say.

    Attributes:
        pixel, perceptual, identity: weights; the defaults are the paper's.
    """

    pixel: float = 1e-2
    perceptual: float = 1.0
    identity: float = 4e-2

    def __post_init__(self) -> None:
        check_not_negative(self, "pixel", "perceptual", "identity", where="reconstruction.")

    def __call__(
        self,
        image: Tensor,
        target: Tensor,
        perceptual: PerceptualDistance,
        identity: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Compare images (B, 3, H, W) in [-1, 1].

        Args:
            perceptual, identity: frozen networks; without the latter its term is left out.

        Returns:
            the terms by name (B,), and their weighted sum as ``reconstruction``.
        """
        terms = {"pixel": pixel_mse(image, target), "perceptual": perceptual(image, target)}
        if identity is not None:
            terms["identity"] = 1 - torch.cosine_similarity(identity(image), identity(target), dim=1)
        total = sum((getattr(self, name) * value for name, value in terms.items()), image.new_zeros(len(image)))
        return {**terms, "reconstruction": total}


def delta_regulariser(latents: Latents) -> Tensor:
    """L_d-reg = sum_i ||w_i - w_0||_2, what the codes differ by from the first of their group (e4e, Sec. 4): (B,)."""
    return sum_over_groups(latents, lambda t: (t[:, 1:] - t[:, :1]).norm(dim=2).sum(1))


def latent_pull(latents: Latents, mean: Latents) -> Tensor:
    """L_w+ = ||w+ - mean w||^2 (GRAMInverter, A.4, Eq. 1): (B,)."""
    difference = latents - mean
    return sum_over_groups(difference, lambda t: t.square().sum((1, 2)))


def latent_error(latents: Latents, truth: Latents) -> Tensor:
    """Mean squared error of all numbers of the codes: (B,)."""
    numbers = sum(t[0].numel() for t in truth.groups.values())
    return latent_pull(latents, truth) / numbers


def sum_over_groups(latents: Latents, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum of ``function`` (B, n, w) -> (B,) over the groups."""
    return torch.stack([function(t) for t in latents.groups.values()]).sum(0)


def locality(
    tuned: TunedWeights | Generator,
    original: Generator,
    pivot: Latents,
    z: Tensor,
    camera: Camera | None,
    perceptual: PerceptualDistance,
    distance: float = 30.0,
    truncation: float = 1.0,
) -> Tensor:
    """L_R keeps a tuned generator like the original near the pivots, towards random codes (PTI, Eq. 4 and 5).

    Args:
        pivot: inverted codes, of one item or as many as z. z: (B, z_dim). camera: as many, None in 2D.
        perceptual: its first term. distance: of the codes compared from the pivot, Euclidean.
        truncation: of the random codes towards the mean; .5 in PTI's code.

    Returns:
        (B,).
    """
    sample = original.mapping(z, truncation=truncation)
    near = Latents({name: locality_codes(t, sample.groups[name], distance) for name, t in pivot.groups.items()})
    with torch.no_grad():
        target = original.synthesis(near, camera).image
    return locality_loss(tuned.synthesis(near, camera).image, target, perceptual)
