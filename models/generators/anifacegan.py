"""AniFaceGAN: GRAM's template of a face, deformed by identity and expression.

Source: AniFaceGAN (Wu et al., 2022).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.camera import Camera
from models.generators.gram import (
    BOX,
    PLANE,
    Affine,
    FiLMStack,
    GRAMGenerator,
    StyleNetwork,
    Surfaces,
    siren_init,
    unit_rays,
)
from models.latents import Latents
from models.rendering.manifolds import Brackets, first_brackets
from models.rendering.pointwise import affine, in_chunks

BEYOND = 10.0  # distance of surfaces that are not there: behind all others
ROUNDING = 1e-5  # world units: points so near the background plane are its own, which is not deformed


class CoefficientVAE(nn.Module):
    """Variational autoencoder of face-model coefficients: what random identities and expressions are drawn from.

    Args:
        size: number of coefficients. latent: size of the code.
        width, layers: of the hidden layers of the encoder, and of the decoder.
    """

    def __init__(self, size: int, latent: int, width: int, layers: int) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise([size, *[width] * layers]))
        self.mean, self.log_variance = nn.Linear(width, latent), nn.Linear(width, latent)
        self.first = nn.Linear(latent, width)
        self.decoder = nn.ModuleList(nn.Linear(width, width) for _ in range(layers + 1))
        self.last = nn.Linear(width, size)

    def encode(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """(..., size) to mean and log variance (..., latent) of the code."""
        for layer in self.encoder:
            coefficients = F.leaky_relu(layer(coefficients))
        return self.mean(coefficients), self.log_variance(coefficients)

    def decode(self, code: Tensor) -> Tensor:
        """(..., latent) to (..., size)."""
        x = self.first(code)
        for layer in self.decoder:
            x = F.leaky_relu(layer(x))
        return self.last(x)


class Deformation(nn.Module):
    """FiLM SIREN from a point of the face to its shift into the template's space; starts without any.

    Args:
        coefficients: identity and expression together.
        channels: numbers in and out. The first 3 are the point and its shift; released networks have 7, without use.
        width, layers: of the FiLM layers. mapping_width, mapping_layers: hidden ones of the mapping.
    """

    def __init__(
        self, coefficients: int, channels: int, width: int, layers: int, mapping_width: int, mapping_layers: int
    ) -> None:
        super().__init__()
        self.layers = FiLMStack([channels, *[width] * layers])
        self.last = nn.Linear(width, channels)
        self.style = StyleNetwork(coefficients, mapping_width, mapping_layers, layers, width)
        siren_init(list(self.layers))  # type: ignore[arg-type]
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, coefficients: Tensor, points: Tensor) -> Tensor:
        """Shifts (B, P, 3) of world points (B, P, 3) under coefficients (B, coefficients)."""
        first, *others = self.layers.modulated(self.style(coefficients))
        layers: list[Affine] = [(first[0][..., :3] * (2 / BOX), first[1]), *others]
        weight, bias = self.last.weight[:3], self.last.bias[:3]

        def shift(x: Tensor) -> Tensor:
            for layer in layers:
                x = affine(x, *layer).sin()
            return F.linear(x, weight, bias)

        return in_chunks(shift, points, self.last.in_features, self)


class AniFaceGANGenerator(GRAMGenerator):
    """A :class:`GRAMGenerator` seen through a deformation.

    z is a random code of the identity VAE, then noise for everything else (hair, skin, light). The codes are "ws" as
    GRAM's, and "identity", the (B, 1, identity) coefficients, which also steer the deformation. Released videos pull
    "ws" alone to the mean: ``mapping(z, truncation=0.7, cutoff=generator.num_ws - 1)``.

    An expression is the face model's expression coefficients, zero for a neutral face; draw random ones with
    :meth:`sample_expression`.

    Args:
        identity, expression: number of coefficients of the face model. noise: size of the noise.
        latent, vae_width, vae_layers: of both :class:`CoefficientVAE`. They are not trained with the rest.
        deform_channels, deform_width, deform_layers, deform_mapping_width, deform_mapping_layers: of
            :class:`Deformation`.
        options: of :class:`GRAMGenerator`.
    """

    mean_identity: Tensor

    def __init__(
        self,
        identity: int = 80,
        expression: int = 64,
        noise: int = 80,
        latent: int = 256,
        vae_width: int = 512,
        vae_layers: int = 5,
        deform_channels: int = 7,
        deform_width: int = 128,
        deform_layers: int = 3,
        deform_mapping_width: int = 128,
        deform_mapping_layers: int = 3,
        **options: Any,
    ) -> None:
        super().__init__(z_dim=identity + noise, **options)
        self.latent, self.z_dim, self.num_ws = latent, latent + noise, self.num_ws + 1
        self.expressions = tuple(f"exp{i}" for i in range(expression))
        self.identity_vae = CoefficientVAE(identity, latent, vae_width, vae_layers).requires_grad_(False)
        self.expression_vae = CoefficientVAE(expression, latent, vae_width, vae_layers).requires_grad_(False)
        self.deformation = Deformation(
            identity + expression, deform_channels, deform_width, deform_layers,
            deform_mapping_width, deform_mapping_layers,
        )  # fmt: skip
        self.register_buffer("mean_identity", torch.zeros(1, identity))

    # -- codes -------------------------------------------------------------------------------------------------------

    def codes(self, z: Tensor) -> Latents:
        identity = self.identity_vae.decode(z[..., : self.latent])
        styles = self.style(torch.cat([identity, z[..., self.latent :]], -1))
        if z.ndim == 2:
            return Latents({"ws": styles, "identity": identity[:, None]})
        return Latents({"ws": styles[:, :-1].diagonal(dim1=1, dim2=2).mT, "identity": identity[:, -1:]})

    @property
    def mean_latents(self) -> Latents:
        return Latents({"ws": self.mean[None], "identity": self.mean_identity[None]})

    @torch.no_grad()
    def update_mean(self, count: int = 10_000, seed: int = 0) -> None:
        z = self.sample_z(count, torch.Generator().manual_seed(seed)).to(self.mean.device)
        mean = self.codes(z).mean()
        self.mean.copy_(mean.groups["ws"][0])
        self.mean_identity.copy_(mean.groups["identity"][0])

    @torch.no_grad()
    def sample_expression(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """(count, E) coefficients of random expressions, drawn on the CPU."""
        latent = torch.randn(count, self.latent, generator=generator)
        return self.expression_vae.decode(latent.to(self.mean.device))

    # -- the deformation -----------------------------------------------------------------------------------------------

    def shift(self, ws: Latents, points: Tensor, expression: Tensor | None) -> Tensor:
        """From world points (B, P, 3) to where they are in the template, (B, P, 3) world units."""
        identity = ws.groups["identity"][:, 0]
        if expression is None:
            expression = identity.new_zeros(len(identity), len(self.expressions))
        return self.deformation(torch.cat([identity, expression.to(identity.dtype)], -1), points)

    def canonical(self, ws: Latents, points: Tensor, expression: Tensor | None) -> Tensor:
        shift = self.shift(ws, points, self.check_expression(expression, len(ws)))
        return points + shift * ((points[..., 2:] - PLANE).abs() > ROUNDING) if self.background else points + shift

    def deformed_scalar(self, points: Tensor, shift: Tensor) -> Tensor:
        """The scalar field (...) at shifted world points (..., 3), scaled twice as released networks do."""
        return self.predictor(points * (2 / BOX) + shift)

    def search(
        self, ws: Latents, origins: Tensor, directions: Tensor, expression: Tensor | None
    ) -> tuple[Brackets, Tensor, Tensor]:
        """Crossings of the deformed manifolds.

        Returns:
            the crossings, and what lies along the rays: distances (C, P, S, 1) and shifts (C, P, S, 3).
        """
        steps = torch.linspace(self.near, self.far, self.samples, device=origins.device, dtype=origins.dtype)[:, None]
        points = origins[:, :, None] + steps * directions[:, :, None]
        shift = self.shift(ws, points.reshape(len(ws), -1, 3), expression).reshape(points.shape)
        found = first_brackets(self.deformed_scalar(points, shift), self.levels, both_ways=True)
        return found, steps.expand(*points.shape[:-1], 1), shift

    def crossings(
        self, ws: Latents, origins: Tensor, directions: Tensor, expression: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        found, distances, shifts = self.search(ws, origins, directions, expression)
        seen = found.at(distances)[..., 0]
        distance = torch.where(found.valid, seen, BEYOND)
        return distance, found.valid, found.at(shifts) + (seen - distance)[..., None] * directions[:, :, None]

    def _surfaces(self, ws: Latents, camera: Camera, side: int, expression: Tensor | None) -> Surfaces:
        return self.surfaces(ws, *unit_rays(camera, side)[:2], expression)
