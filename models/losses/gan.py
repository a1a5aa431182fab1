"""Adversarial losses and their regularisers, as pure functions.

Penalties are computed in float32 whatever autocast says: squared gradients do not fit half precision.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from models.latents import Latents


def generator_nonsaturating(fake: Tensor) -> Tensor:
    """Mean of -log D(G(z)) (Goodfellow et al. 2014, Sec. 3), D = sigmoid of ``fake`` logits of any shape."""
    return F.softplus(-fake.float()).mean()


def discriminator_nonsaturating(real: Tensor, fake: Tensor) -> Tensor:
    """Mean of -log D(x) plus mean of -log(1 - D(G(z))), from logits (Goodfellow et al. 2014, Eq. 1)."""
    return F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()


def differentiable_twice() -> AbstractContextManager[None]:
    """What torch.compile has made can be differentiated once only: in here it runs as it was."""
    compiling = "torch._dynamo" in sys.modules  # importing it takes seconds
    return torch.compiler.set_stance("force_eager") if compiling else nullcontext()


def r1_penalty(logits_of: Callable[[Tensor], Tensor], real: Tensor) -> tuple[Tensor, Tensor]:
    """R1 gradient penalty on real images (Mescheder et al. 2018, Eq. 9), without the factor gamma / 2.

    Args:
        logits_of: the discriminator, (B, 3, H, W) -> logits; run in float32.
        real: (B, 3, H, W).

    Returns:
        (B,) squared norms of the logit's gradient with respect to each image, differentiable in the
        discriminator's weights; and the logits.
    """
    with torch.autocast(real.device.type, enabled=False), torch.enable_grad(), differentiable_twice():
        image = real.detach().float().requires_grad_()
        logits = logits_of(image)
        (gradient,) = torch.autograd.grad(logits.sum(), image, create_graph=True)
        return gradient.square().flatten(1).sum(1), logits  # |grad_x D(x)|^2


def path_length_penalty(
    image: Tensor, ws: Latents, mean: Tensor, noise: Tensor, decay: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Path length regularisation (Karras et al. 2020, Eq. 4).

    Args:
        image: (B, 3, H, W), a function of ``ws``, in float32 or better, that can be differentiated twice.
        ws: B codes that require grad.
        mean: scalar, the running mean length a.
        noise: like ``image``, standard normal.
        decay: share of the new lengths in the mean.

    Returns:
        (B,) squared deviations from the updated mean, and that mean, detached.
    """
    with torch.autocast(image.device.type, enabled=False):
        scaled = noise / (image.shape[2] * image.shape[3]) ** 0.5
        image = image.to(torch.promote_types(image.dtype, torch.float32))
        gradients = torch.autograd.grad((image * scaled).sum(), list(ws.groups.values()), create_graph=True)
        # |J_w^T y|: a root mean square over the codes of all groups, as the authors' code has it.
        length = torch.cat([gradient.square().sum(2) for gradient in gradients], 1).mean(1).sqrt()
        mean = mean + decay * (length.detach().mean() - mean)
        return (length - mean).square(), mean
