"""What a shape's renderings must be like (Wang et al., Sec. III-D): one value for each picture.

Images are (B, 3, S, S) in [-1, 1], masks (B, 1, S, S) in [0, 1].
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from models.features.base import IdentityEmbedding, PerceptualDistance
from models.generators.base import Discriminator


def mean_within(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, C, S, S) over channels and the pixels of a mask: (B,); 0 where it is empty."""
    weight = mask.to(values).expand_as(values)
    return (values * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp_min(1)


def reconstruction_loss(
    image: Tensor, target: Tensor, mask: Tensor, perceptual: PerceptualDistance | None, weight: float = 0.5
) -> Tensor:
    """L_recon = |I^ - I| + lambda_perc |F(I^) - F(I)|^2 (Eq. 11) where the mask holds: (B,).

    L_sym (Eq. 12) is the same of the mirrored face's rendering. The first term is the mean over pixels and colours, as
    in GAN2Shape; of what is no part of the mask, both pictures are grey for the network.
    """
    loss = mean_within((image - target).abs(), mask)
    if perceptual is None or not weight:
        return loss
    return loss + weight * perceptual(image * mask, target * mask)


def feature_loss(discriminator: Discriminator, image: Tensor, target: Tensor, mask: Tensor, levels: int = 4) -> Tensor:
    """L_dis of Eq. 16: mean absolute difference of a discriminator's first features, summed over levels: (B,).

    No gradient reaches the target's.
    """
    found = discriminator(image).features[:levels]
    wanted = discriminator(target.detach()).features[:levels]
    each = [
        mean_within((a - b.detach()).abs(), F.adaptive_avg_pool2d(mask, a.shape[-2:]))
        for a, b in zip(found, wanted, strict=True)
    ]
    return sum(each[1:], each[0])


def identity_loss(image: Tensor, target: Tensor, identity: IdentityEmbedding) -> Tensor:
    """L_id: the squared distance of a face recognition network's embeddings, as in Eq. 7: (B,)."""
    return (identity(image) - identity(target)).square().sum(1)
