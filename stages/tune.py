"""Tunes a generator to all pictures that its encoder inverts (GRAMInverter, A.4; PTI, Roich et al., 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.batches import PortraitBatch
from models.camera import Camera
from models.checks import check_not_negative, check_positive
from models.errors import UserError
from models.features.base import Frozen
from models.generators.base import Generator
from models.heads.tuning import select_parameters
from models.losses.inversion import locality
from stages.base.inversion import InversionStage
from stages.base.stage import ArtifactRef


class TuneStage(InversionStage):
    """L = L_r + locality_weight L_R: pivots are what the frozen encoder answers, the generator learns.

    Args:
        inverter: artifact of ``invert`` (or of this stage): generator and encoder; not needed with ``tested``.
        train, freeze: which parameters of the generator move, see :func:`models.heads.tuning.select_parameters`; the
            manifold predictor stays (A.4).
        locality_weight: of L_R, which keeps the generator like the original near the pivots.
        locality_samples: pictures of a batch whose pivots it looks at.
        locality_distance: from the pivots, Euclidean over all of a code's numbers.
        locality_truncation: of the random codes that they lie towards; 1 does not truncate.
        options: of :class:`InversionStage`.
    """

    name = "tune"

    def __init__(
        self,
        inverter: ArtifactRef | None = None,
        train: str = "synthesis",
        freeze: str = "predictor",
        locality_weight: float = 0.5,
        locality_samples: int = 1,
        locality_distance: float = 30.0,
        locality_truncation: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.inverter = inverter
        self.tuned, self.kept = train, freeze
        self.locality_weight, self.locality_samples = locality_weight, locality_samples
        self.locality_distance, self.locality_truncation = locality_distance, locality_truncation
        check_not_negative(self, "locality_weight")
        check_positive(self, "locality_samples", "locality_distance", "locality_truncation")

    def build_networks(self) -> None:
        if self.inverter is None:
            raise UserError("tune needs the generator and encoder of galatea invert: --model.inverter.path")
        self.take_networks("inverter", self.inverter.path)
        chosen = set(select_parameters(self.generator, self.tuned, self.kept))
        for name, parameter in self.generator.named_parameters():
            parameter.requires_grad_(name in chosen)
        self.original = Frozen(self.take("inverter", self.inverter.path, "generator", Generator))

    def losses(self, image: Tensor, camera: Camera | None, batch: PortraitBatch) -> dict[str, Tensor]:
        with torch.no_grad():
            ws, expression = self.invert(image)
        terms = self.recover(self.generator.synthesis(ws, camera, expression=expression).image, image)
        loss = terms["reconstruction"]
        if self.locality_weight:
            original, near = self.original.module, slice(self.locality_samples)
            rows = self.global_rows(len(image[near]))
            z = original.sample_z(len(rows) * self.world_size, self.draws())[rows].to(image.device)
            view = camera and camera[near]
            where = self.locality_distance, self.locality_truncation
            terms["locality"] = locality(self.generator, original, ws[near], z, view, self.perceptual, *where)
            loss = loss + self.locality_weight * terms["locality"].mean()
        return {**terms, "loss": loss}
