"""Codes mixed by layer, and a picture's code in the axes of a generator's own layers.

Sources: Lu and Zhou, pseudo-paired facial stylization, Sec. 3.3; Kwong et al., unsupervised image-to-image translation
via StyleGAN (the space V); StyleGAN2 (Karras et al. 2020, Appendix D) for the optimisation of noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Adam

from models.checks import check_not_negative, check_positive
from models.errors import UserError
from models.generators.base import Generator
from models.generators.stylegan2 import SynthesisNetwork
from models.heads.projector import noise_correlation
from models.image import at_most
from models.latents import Latents
from models.schedule import projector_rate


def code_sides(generator: Generator) -> list[int]:
    """For each code of a StyleGAN2 the side of the block that it goes into, pixels.

    At 1024 px the paper's codes 3, 6, 9 and 12 of 18 go into blocks of 16, 32, 128 and 256 px.

    Raises:
        UserError: when the generator is none.
    """
    networks = [network for network in generator.modules() if isinstance(network, SynthesisNetwork)]
    if len(networks) != 1 or len(generator.mean_latents.groups) != 1:
        raise UserError(f"{type(generator).__name__} is not mixed by layer: a StyleGAN2 is")
    # Each block has two convolutions but the first, which has one; the last picture has a code of its own.
    counted = [side for k, side in enumerate(networks[0].sides) for _ in range(1 if k == 0 else 2)]
    return [*counted, counted[-1]][: generator.num_ws]


def layer_basis(generator: Generator) -> Tensor:
    """V: right singular vectors (w_dim, w_dim) of the layers' stacked modulation weights, a row each, largest first.

    In float64, each with its largest number positive.
    """
    _, _, rows = torch.linalg.svd(generator.affine_weights().double(), full_matrices=True)
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * largest.sign()


def code_axes(generator: Generator, draws: torch.Generator, count: int = 4096) -> Tensor:
    """The axes along which w varies, (w_dim, w_dim): a row each, as long as one standard deviation, the longest last.

    Where z has fewer numbers than w, most are almost 0: few directions lead to other codes, all others off them.

    Args:
        draws: of the ``count`` codes that they are told by, on the CPU.
    """
    z = generator.sample_z(count, draws).to(next(generator.parameters()))
    (codes,) = generator.mapping(z).groups.values()
    variances, columns = torch.linalg.eigh(torch.cov(codes[:, 0].T.double()))
    return (columns * variances.clamp_min(0).sqrt()).T


@dataclass(frozen=True)
class ReferenceSearch:
    """How a code is looked for that shows a reference. The defaults are the cited method's.

    Attributes:
        space: one code for all layers, "v" along the axes of :func:`layer_basis` from w = 0 on, "w" along those of
            :func:`code_axes` from the mean on; or one each, "w+" likewise, "z+" from drawn ones on, which the paper
            finds worse (Sec. 6.3). An official StyleGAN2's mean is near 0; where it is not, "v" starts from no face.
        steps, learning_rate: of Adam; the rate rises over the first 5 % and falls over the last 25 %, as StyleGAN2's.
        start: deviation of the drawn numbers that "v" starts from.
        resolution: side at which the distance sees larger pictures, pixels.
        noise: weight of the noise maps' correlations; null leaves the maps as they are stored.
    """

    space: Literal["v", "w", "w+", "z+"] = "v"
    steps: int = 1000
    learning_rate: float = 0.1
    start: float = 1e-3
    resolution: int = 256
    noise: float | None = 1e5

    def __post_init__(self) -> None:
        check_positive(self, "steps", "learning_rate", "resolution", where="search.")
        check_not_negative(self, "start", "noise", where="search.")

    def rate(self, step: int) -> float:
        """Of a step, relative to the full one."""
        return projector_rate((step + 1) / self.steps)

    def fit(
        self,
        generator: Generator,
        picture: Tensor,
        distance: Callable[[Tensor, Tensor], Tensor],
        draws: torch.Generator,
    ) -> Latents:
        """The code, a batch of one, of a picture (1, 3, R, R) by a 2D generator.

        Args:
            distance: of two pictures, (1,).
            draws: of the start and of the noise maps, on the CPU.
        """
        wanted = at_most(picture, self.resolution)
        mean = generator.mean_latents
        ((name, middle),) = mean.groups.items()
        count = middle.shape[1]
        origin = axes = None
        if self.space == "v":
            origin, axes = torch.zeros_like(middle), layer_basis(generator).to(middle)
            numbers = self.start * torch.randn(1, 1, len(axes), generator=draws).to(middle)
        elif self.space == "z+":
            numbers = generator.sample_z(count, draws)[None].to(middle)
        else:
            origin, axes = middle, code_axes(generator, draws).to(middle)
            numbers = torch.zeros_like(middle if self.space == "w+" else middle[:, :1])

        def codes() -> Latents:
            if origin is None or axes is None:
                return generator.mapping(numbers)
            return Latents({name: origin + numbers @ axes})

        numbers.requires_grad_()
        pixels = sum(side**2 for side in generator.noise_sides) if self.noise is not None else 0
        noise = torch.randn(1, pixels, generator=draws).to(middle).requires_grad_() if pixels else None
        optimizer = Adam([numbers] if noise is None else [numbers, noise], self.learning_rate)
        with torch.enable_grad():
            for step in range(self.steps):
                optimizer.param_groups[0]["lr"] = self.learning_rate * self.rate(step)
                found = at_most(generator.synthesis(codes(), randomness=noise).image, self.resolution)
                loss = distance(found, wanted).sum()
                if noise is not None:
                    loss = loss + (self.noise or 0.0) * noise_correlation(noise, generator.noise_sides).sum()
                optimizer.zero_grad()
                loss.backward(inputs=optimizer.param_groups[0]["params"])
                optimizer.step()
                if noise is not None:
                    with torch.no_grad():  # maps stay of mean 0 and variance 1
                        parts = noise.split([side**2 for side in generator.noise_sides], 1)
                        centred = [part - part.mean(1, keepdim=True) for part in parts]
                        noise.copy_(torch.cat([c * c.square().mean(1, keepdim=True).rsqrt() for c in centred], 1))
        return codes().map(lambda t: t.detach().contiguous())
