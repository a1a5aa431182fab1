"""Pivotal tuning: the weights of a generator are fitted to one picture around its code (PTI, Roich et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Adam

from models.camera import Camera
from models.checks import check_not_negative, check_positive
from models.errors import UserError
from models.generators.base import Generator
from models.heads.tuning import TunedWeights, select_parameters
from models.latents import Latents

Loss = Callable[[Tensor], Mapping[str, Tensor]]
"""A picture (1, 3, R, R) -> terms (1,); ``loss`` is minimised."""


@dataclass(frozen=True)
class PivotalTuning:
    """How the weights are fitted: L_pt = LPIPS(x, x') + lambda_L2 |x - x'|^2 (PTI, Eq. 3), by Adam.

    Without the locality regularisation, which the released configuration has switched off, and without its early end
    at an LPIPS of .06: the number of steps is what is compared.

    Attributes:
        steps, learning_rate: E3DGE's (supplement C); PTI's own are 350 and 3e-4.
        perceptual, pixel: weights of the two terms, 1 in PTI's code.
        train, freeze: which weights move, see :func:`models.heads.tuning.select_parameters`.
    """

    steps: int = 100
    learning_rate: float = 5e-5
    perceptual: float = 1.0
    pixel: float = 1.0
    train: str = "synthesis"
    freeze: str = ""

    def __post_init__(self) -> None:
        check_positive(self, "steps", "learning_rate", where="tuning.")
        check_not_negative(self, "perceptual", "pixel", where="tuning.")
        if not self.perceptual and not self.pixel:
            raise UserError("tuning: neither perceptual nor pixel has a weight")

    def names(self, generator: Generator) -> list[str]:
        """Of the parameters that move.

        Raises:
            UserError: when there are none.
        """
        try:
            return select_parameters(generator, self.train, self.freeze)
        except UserError as error:
            raise UserError(f"tuning.train, tuning.freeze: {error}") from error

    def fit(
        self,
        generator: Generator,
        names: list[str],
        pivot: Latents,
        camera: Camera | None,
        loss: Loss,
        expression: Tensor | None = None,
    ) -> TunedWeights:
        """Weights of the named parameters for one picture; the generator itself is not changed.

        Args:
            pivot: the picture's code, a batch of one, which is held. camera: its view; None in 2D.
            expression: (1, E).
        """
        tuned = TunedWeights(generator, names)
        parameters = list(tuned.parameters())
        optimizer = Adam(parameters, self.learning_rate)
        pivot = pivot.detach()
        with torch.enable_grad():
            for _ in range(self.steps):
                image = tuned.synthesis(pivot, camera, expression=expression).image
                optimizer.zero_grad(set_to_none=True)
                loss(image)["loss"].sum().backward(inputs=parameters)
                optimizer.step()
        return tuned.requires_grad_(False)
