"""Latent codes of given images by plain optimisation: the yardstick of what a generator can express."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.camera import Camera
from models.generators.base import Generator, Latents


def fit_latents(
    generator: Generator,
    image: Tensor,
    camera: Camera,
    *,
    candidates: int = 96,
    seed: int = 0,
    z_steps: int = 80,
    ws_steps: int = 160,
    z_lr: float = 0.08,
    ws_lr: float = 0.02,
    prior_weight: float = 1e-3,
    pull_weight: float = 0.1,
) -> Latents:
    """Fit codes to images seen by known cameras, all images side by side.

    First z from the nearest of some random samples, under its Gaussian prior; then every layer's code by itself,
    held near the first answer.

    Args:
        generator: frozen; its parameters get no gradient.
        image: (B, 3, H, W) in [-1, 1].
        camera: B cameras.
        candidates: random samples that each image is compared with; seed: of their draw.
        z_lr, ws_lr: Adam's learning rates, falling by a cosine to zero.
        prior_weight: of mean z^2. pull_weight: of the mean squared distance from the first answer; far from what
            mapping(z) gives, codes answer worse to expressions.

    Returns:
        detached codes (B, num_ws, w_dim).
    """
    frozen = {p: p.requires_grad for p in generator.parameters()}
    generator.requires_grad_(False)
    try:
        z = _nearest_samples(generator, image, camera, candidates, seed).requires_grad_()

        def error(latents: Latents) -> Tensor:
            found = generator.synthesis(latents, camera, resolution=image.shape[-1]).image
            # Summed over images: one image's fit does not depend on its neighbours.
            return (F.mse_loss(found, image) * 4 + F.l1_loss(found, image)) * len(image)

        def minimise(code: Tensor, lr: float, steps: int, loss: object) -> None:
            optimizer = torch.optim.Adam([code], lr=lr, betas=(0.9, 0.99))
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
            for _ in range(steps):
                optimizer.zero_grad()
                loss().backward()  # type: ignore[operator]
                optimizer.step()
                schedule.step()

        with torch.enable_grad():
            minimise(z, z_lr, z_steps, lambda: error(generator.mapping(z)) + prior_weight * z.square().mean(1).sum())
            start = generator.mapping(z).detach().ws.clone()
            ws = start.clone().requires_grad_()
            scale = start.var().clamp_min(1e-6)

            def refined() -> Tensor:
                pull = ((ws - start).square().mean((1, 2)) / scale).sum()
                return error(Latents({"ws": ws})) + pull_weight * pull

            minimise(ws, ws_lr, ws_steps, refined)
        return Latents({"ws": ws.detach()})
    finally:
        for parameter, requires_grad in frozen.items():
            parameter.requires_grad_(requires_grad)


@torch.no_grad()
def _nearest_samples(generator: Generator, image: Tensor, camera: Camera, candidates: int, seed: int) -> Tensor:
    """For each image, the random z (B, z_dim), at three quarters of its length, whose rendering is nearest.

    The origin is the mean of everything; from a sample of the right kind (hair, glasses) the search has less to undo.
    """
    draws = 0.75 * generator.sample_z(candidates, torch.Generator().manual_seed(seed)).to(image.device)
    best = torch.zeros(len(image), generator.z_dim, device=image.device)
    if not candidates:
        return best
    for i in range(len(image)):
        errors = [
            (
                generator.synthesis(
                    generator.mapping(z), camera[i].repeat_interleave(len(z)), resolution=image.shape[-1]
                ).image
                - image[i]
            )
            .square()
            .flatten(1)
            .mean(1)
            for z in draws.split(16)
        ]
        best[i] = draws[torch.cat(errors).argmin()]
    return best
