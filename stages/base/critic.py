"""A discriminator that learns beside a stage whose own optimisation is automatic: an adversarial term among others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.camera import Camera
from models.checks import check_not_negative, check_positive
from models.errors import UserError
from models.generators.base import Discriminator
from models.image import resized
from models.losses.gan import discriminator_nonsaturating, r1_penalty
from stages.base.ranks import average_gradients


@dataclass(frozen=True)
class AdversarialTerm:
    """The non-saturating adversarial term with R1 on real pictures (E3DGE, B.3).

    Attributes:
        path, module: artifact and name of the discriminator that training starts from: the generator's own.
        weight: of the term, lambda_adv.
        discriminator_weight: of the discriminator's own loss beside R1, lambda_D: Adam is indifferent to the scale of
            both, not to their ratio.
        r1_weight: gamma / 2 of R1 (Mescheder et al. 2018).
        r1_every: steps between R1 steps (lazy regularisation).
        learning_rate: of the discriminator.
        side: at which it judges, where that is less than its own: its layers from there on, behind a new first one.
    """

    path: str
    module: str = "discriminator"
    weight: float = 0.01
    discriminator_weight: float = 0.01
    r1_weight: float = 5.0
    r1_every: int = 16
    learning_rate: float = 5e-5
    side: int | None = None

    def __post_init__(self) -> None:
        check_not_negative(self, "weight", "r1_weight", where="adversarial.")
        check_positive(self, "discriminator_weight", "r1_every", "learning_rate", "side", where="adversarial.")

    def discriminator(self, found: Discriminator) -> Discriminator:
        """The one that training starts from, of the one that was found.

        Raises:
            UserError: when it has no layers for ``side``.
        """
        if self.side is None or self.side == found.resolution:
            return found
        try:
            return found.narrowed(self.side)
        except ValueError as error:
            raise UserError(f"{self.path}: {error}: see adversarial.side") from error


class Critic:
    """Judges pictures, and learns from those that it has judged, in float32.

    To everything else the discriminator is frozen: no other optimiser sees it.

    Args:
        network: the discriminator. options: of its training.
    """

    def __init__(self, network: Discriminator, options: AdversarialTerm) -> None:
        self.network, self.options = network.requires_grad_(False), options
        self._optimizer: torch.optim.Optimizer | None = None
        self._restored: dict[str, Any] | None = None
        self._seen: tuple[Tensor, Tensor, Camera | None] | None = None

    def term(self, fake: Tensor, real: Tensor, camera: Camera | None) -> Tensor:
        """-log D(x) of generated pictures (B, 3, H, W): (B,). Keeps them for the next :meth:`learn`.

        Args:
            real: as many. camera: of both.
        """
        self._seen = fake.detach(), real.detach(), camera
        with torch.autocast(fake.device.type, enabled=False):
            return F.softplus(-self._logits(fake.float(), camera)).flatten(1).mean(1)

    def _logits(self, image: Tensor, camera: Camera | None) -> Tensor:
        network = self.network
        if network.camera_conditioned and camera is None:
            raise UserError("the discriminator judges pictures with their cameras, and these have none")
        return network(resized(image, network.resolution), camera if network.camera_conditioned else None).logits

    def learn(self, step: int) -> dict[str, Tensor]:
        """One step of the discriminator on the pictures judged last, by all ranks; scalars to log.

        Args:
            step: of the stage's training, for lazy regularisation.
        """
        if self._seen is None:
            return {}
        (fake, real, camera), options, self._seen = self._seen, self.options, None
        optimizer = self._adam()
        self.network.requires_grad_(True)
        with torch.autocast(fake.device.type, enabled=False), torch.enable_grad():
            loss = discriminator_nonsaturating(self._logits(real.float(), camera), self._logits(fake.float(), camera))
            losses, loss = {"discriminator": loss.detach()}, options.discriminator_weight * loss
            if options.r1_weight and step % options.r1_every == 0:
                penalty, _ = r1_penalty(lambda image: self._logits(image, camera), real)
                losses["r1"] = penalty.mean().detach()
                loss = loss + options.r1_weight * options.r1_every * penalty.mean()
            loss.backward()
        average_gradients(self.network)
        optimizer.step()
        optimizer.zero_grad()
        self.network.requires_grad_(False)
        return losses

    def _adam(self) -> torch.optim.Optimizer:
        """Made where the network is by now, and then restored."""
        if self._optimizer is None:
            every = self.options.r1_every
            ratio = every / (every + 1) if every > 1 else 1.0  # Adam's memory, as of AdversarialStage
            betas = (0.0, 0.99**ratio)
            self._optimizer = torch.optim.Adam(self.network.parameters(), self.options.learning_rate * ratio, betas)
        if self._restored is not None:
            self._optimizer.load_state_dict(self._restored)
            self._restored = None
        return self._optimizer

    def state_dict(self) -> dict[str, Any]:
        """Of the optimiser; the network is the stage's."""
        return self._adam().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self._restored = state
