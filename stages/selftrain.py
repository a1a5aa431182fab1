"""Trains what inverts a generator on nothing but the generator's own samples, whose shapes are known (E3DGE).

The method has phases, one after the other, each a fit of its own. A phase is two methods, ``build_PHASE`` and
``losses_PHASE``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from datamodules.samples import check_samples
from models.artifact import Export
from models.batches import PortraitBatch, SampleBatch
from models.camera import Camera
from models.checks import check_not_negative
from models.encoders.base import Encoder
from models.errors import UserError, shown
from models.generators.base import RadianceGenerator
from models.generators.geometry import form_of
from models.latents import Latents
from models.losses.geometry import GeometryLoss
from models.losses.inversion import latent_error
from stages.base.inversion import InversionStage, check_fit, start_trunk
from stages.base.stage import GeneratorRef

PHASES = ("global", "local", "hybrid")


class SelftrainStage(InversionStage):
    """E0, phase "global": L = L_geo + code_weight L_code + L_rec, of a frozen 3D generator (E3DGE, Sec. 4.1).

    The data are samples of the generator (:class:`datamodules.samples.SampleDataModule`); validate, test and predict
    take any pictures. An encoder may tell some groups of the generator's codes only, as the released one does: the
    generator completes them. Beyond the paper: the generator may be of any kind that has a field; of what is no signed
    distance, opacities are compared.

    Args:
        prior: artifact and module of the generator; not needed with ``tested``.
        encoder: what to train in phase "global", likewise; its codes must be the generator's.
        phase: what is trained, one of ``PHASES``.
        trunk: weights that the encoder's trunk starts from, as of ``invert``; null starts from random ones.
        geometry: L_geo.
        code_weight: of L_code, the mean squared error of all codes that the encoder tells (Eq. 8 leaves it out,
            Sec. 4.1 and Table 4 have it).
        full_weight, thumb_weight: of L_rec of the pictures, and of what was rendered before super-resolution (B.3 has
            both, the released code the second only). Of a generator with one resolution this counts once.
        options: of :class:`InversionStage`.
    """

    name = "selftrain"
    generator: RadianceGenerator

    def __init__(
        self,
        prior: GeneratorRef | None = None,
        encoder: Encoder | None = None,
        phase: str = "global",
        trunk: str | None = None,
        geometry: GeometryLoss = GeometryLoss(),  # noqa: B008 - frozen
        code_weight: float = 1.0,
        full_weight: float = 1.0,
        thumb_weight: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if phase not in PHASES:
            raise UserError(f"phase is {shown(phase)}: take one of {', '.join(PHASES)}")
        if not hasattr(self, f"build_{phase}"):
            raise UserError(f"phase {phase!r} is not there yet: selftrain has phase 'global'")
        self.phase, self.prior, self.trunk, self.geometry = phase, prior, trunk, geometry
        if encoder is not None:
            self.encoder = encoder
        self.code_weight, self.full_weight, self.thumb_weight = code_weight, full_weight, thumb_weight
        check_not_negative(self, "code_weight", "full_weight", "thumb_weight")

    def build_networks(self) -> None:
        getattr(self, f"build_{self.phase}")()

    def losses(self, image: Tensor, camera: Camera | None, batch: PortraitBatch) -> dict[str, Tensor]:
        assert camera is not None
        return getattr(self, f"losses_{self.phase}")(image, camera, cast(SampleBatch, batch))

    def on_fit_start(self) -> None:
        """Refuse data that are not samples of the generator."""
        if self.prior is not None and "prior" in self.inputs:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            check_samples(data, (self.inputs["prior"], self.prior.module))
        super().on_fit_start()

    # -- phase "global" -----------------------------------------------------------------------------------------------

    def build_global(self) -> None:
        """The generator, frozen, and E0 around its mean code."""
        if self.prior is None or not hasattr(self, "encoder"):
            raise UserError("selftrain trains --model.encoder for the generator --model.prior: give both")
        generator = self.take("prior", self.prior.path, self.prior.module, RadianceGenerator)
        self.generator = generator.requires_grad_(False)
        if self.trunk is not None:
            start_trunk(self.encoder, self.trunk)
        self.told = check_fit(self.encoder, generator)
        if self.encoder.expressions:
            raise UserError("samples are neutral: an encoder with expressions learns these with galatea invert")
        # Not channels_last: in bf16 on CPUs, PyTorch's convolutions of single pixels then have arbitrary gradients.
        self.encoder.start(generator.mean_latents)

    def losses_global(self, image: Tensor, camera: Camera, batch: SampleBatch) -> dict[str, Tensor]:
        """L = L_geo^O + L_geo^F + code_weight L_code + L_rec."""
        ws, _ = self.invert(image)
        terms = self.geometry(self.generator, ws, batch)
        terms["code"] = self.code_error(ws, batch)
        loss = terms["geometry"] + self.code_weight * terms["code"]
        terms |= self.recoveries(ws, camera, image, batch)
        return {**terms, "loss": loss + terms["recovery"]}

    def code_error(self, ws: Latents, batch: SampleBatch) -> Tensor:
        """L_code (B * V,), of the groups that the encoder tells; the true codes are those of w, as often as needed."""
        views = len(ws) // len(batch["image"])
        found, truth = ({name: groups[name] for name in self.told} for groups in (ws.groups, batch["ws"]))
        return latent_error(Latents(found), Latents(truth).repeat_interleave(views))

    def recoveries(self, ws: Latents, camera: Camera, image: Tensor, batch: SampleBatch) -> dict[str, Tensor]:
        """L_rec at both resolutions: its terms, and the weighted sum as ``recovery``; (B * V,) each.

        Terms of what was rendered before super-resolution begin with ``thumb_``.
        """
        found = self.generator.synthesis(ws, camera)
        raw = batch.get("raw")
        if found.raw is None or raw is None:
            terms = self.recover(found.image, image)
            return {**terms, "recovery": max(self.full_weight, self.thumb_weight) * terms["reconstruction"]}
        terms, total = {}, image.new_zeros(len(image))
        pairs = {
            "": (self.full_weight, found.image, image),
            "thumb_": (self.thumb_weight, found.raw, raw.flatten(0, 1)),
        }
        for prefix, (weight, ours, theirs) in pairs.items():
            if weight:
                own = self.recover(ours, theirs)
                total = total + weight * own["reconstruction"]
                terms |= {f"{prefix}{name}": value for name, value in own.items()}
        return {**terms, "recovery": total}

    # -- what is measured and handed on --------------------------------------------------------------------------------

    def validation_step(self, batch: PortraitBatch, batch_idx: int) -> None:
        """As every inversion's; of samples also how far shape and codes are off."""
        super().validation_step(batch, batch_idx)
        if "ws" in batch:
            samples = cast(SampleBatch, batch)
            ws, _ = self.invert(self.pictures(batch)[0])
            with torch.no_grad():
                terms = self.geometry(self.generator, ws, samples)
            truth = Latents(samples["ws"]).repeat_interleave(len(ws) // len(samples["image"]))
            self._scored[-1] |= {name: value.detach() for name, value in terms.items()}
            self._scored[-1]["code"] = latent_error(ws, truth)

    def export(self) -> Export:
        found = super().export()
        return found if self._heads else replace(found, extra={**found.extra, "geometry": form_of(self.generator)})
