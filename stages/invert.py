"""Trains an encoder that inverts any generator in one forward pass (GRAMInverter, Sec. 3.2 and A.4; e4e)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.batches import PortraitBatch
from models.camera import Camera, Rig
from models.checks import check_not_negative, check_positive
from models.encoders.base import Encoder
from models.errors import UserError
from models.features.base import Frozen
from models.generators.base import Generator
from models.heads.directions import Directions
from models.heads.turning import turned_heads
from models.losses.inversion import delta_regulariser, latent_error, latent_pull
from stages.base.inversion import InversionStage, Renderer, check_fit, start_trunk
from stages.base.kinship import check_kin
from stages.base.stage import ArtifactRef, GeneratorRef


class InvertStage(InversionStage):
    """L = L_r + delta_weight L_d-reg + pull_weight L_w+, of a frozen generator (GRAMInverter, A.4).

    The generator may be of any kind, 2D ones included. An e4e encoder starts with equal codes and lets them differ one
    after the other. Beyond the paper: where the data know the codes behind their pictures, as the embedded world does,
    these may be asked for too; and an encoder with ``expressions`` tells those of an animatable generator.

    Args:
        prior: artifact and module of the generator; not needed with ``tested``.
        encoder: what to train, likewise; its codes must be the generator's.
        trunk: weights that the encoder's trunk starts from: an ArcFace file or artifact of the same sizes, as of
            :class:`models.features.identity.ArcFaceIdentity`; null starts from random ones.
        delta_weight, pull_weight: weights of L_d-reg and of L_w+.
        delta_from, delta_every: the first difference is trained from this step on, and one more every so many steps;
            ``delta_every`` 0 trains all of them from step ``delta_from`` on. The numbers are e4e's.
        rendered: pictures of a batch, drawn at random, that are rendered for L_r; all by default.
        joint: let the generator learn too. With an untrained one, the result of a single step of ``prior``, this is
            GRAMInverter without a prior (Table 3, "General, - pretrain").
        code_weight, expression_weight: of the mean squared errors of codes and expressions, where these are known.
        turning: artifact of the stage ``directions`` with ``yaw``, and ``pitch``, along which ``test`` turns heads of a
            2D generator: e4e with InterFaceGAN, beside methods that turn theirs in 3D. pose: a network that tells how
            far. rig: of the world's cameras.
        options: of :class:`InversionStage`.
    """

    name = "invert"

    def __init__(
        self,
        prior: GeneratorRef | None = None,
        encoder: Encoder | None = None,
        trunk: str | None = None,
        delta_weight: float = 1e-3,
        pull_weight: float = 1e-4,
        delta_from: int = 20_000,
        delta_every: int = 2_000,
        rendered: int | None = None,
        joint: bool = False,
        code_weight: float = 0.0,
        expression_weight: float = 0.0,
        turning: ArtifactRef | None = None,
        pose: nn.Module | None = None,
        rig: Rig | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.prior = prior
        if encoder is not None:
            self.encoder = encoder
        self.trunk = trunk
        self.delta_weight, self.pull_weight = delta_weight, pull_weight
        self.delta_from, self.delta_every = delta_from, delta_every
        self.rendered, self.joint = rendered, joint
        self.code_weight, self.expression_weight = code_weight, expression_weight
        weights = ("delta_weight", "pull_weight", "code_weight", "expression_weight")
        check_not_negative(self, *weights, "delta_from", "delta_every")
        check_positive(self, "rendered")
        self.turning, self._rig = turning, rig or Rig()
        self.pose = None if pose is None else Frozen(pose)
        if turning is not None and (pose is None or self.tested is None):
            raise UserError(
                "model.turning turns finished heads, told by a pose network: set --model.pose and --model.tested.path"
            )

    def build_model(self) -> None:
        super().build_model()
        if self.turning is None:
            return
        if self.generator.is_3d:
            raise UserError("model.turning is for a 2D generator; a 3D one is seen from other cameras")
        self.directions = self.take("turning", self.turning.path, "directions", Directions)
        if "yaw" not in self.directions.names:
            raise UserError(
                f"{self.turning.path} has no direction called yaw: fit it with --model.names '[yaw, pitch]'"
            )
        self.directions.check_size(self.generator.mean_latents)
        check_kin(self.inputs["turning"], self.inputs["tested"])

    @property
    def rig(self) -> Rig:
        return super().rig if self.turning is None else self._rig

    def pictures(self, batch: PortraitBatch) -> tuple[Tensor, Camera | None]:
        image, camera = super().pictures(batch)
        if self.turning is None:
            return image, camera
        if "label" not in batch:
            raise UserError("heads are turned from their pictures' cameras to others: give the labels, see --data")
        return image, Camera.from_label(batch["label"].flatten(0, 1))

    def reconstruct(self, image: Tensor, camera: Camera | None) -> Renderer:
        if self.turning is None or camera is None:
            return super().reconstruct(image, camera)
        assert self.pose is not None
        ws, _ = self.invert(image)
        show = turned_heads(self.generator, self.directions, self.pose.module, ws, camera)
        return lambda views: show(camera if views is None else views)

    def build_networks(self) -> None:
        if self.prior is None or not hasattr(self, "encoder"):
            raise UserError("invert trains --model.encoder for the generator --model.prior: give both")
        generator = self.take("prior", self.prior.path, self.prior.module, Generator)
        self.generator = generator.requires_grad_(self.joint)
        if self.trunk is not None:
            start_trunk(self.encoder, self.trunk)
        check_fit(self.encoder, generator)
        self.encoder.start(generator.mean_latents)
        self.encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on CPUs

    def on_train_batch_start(self, batch: PortraitBatch, batch_idx: int) -> int | None:
        self.encoder.set_progressive_stage(self.progress(self.global_step))
        return super().on_train_batch_start(batch, batch_idx)

    def progress(self, step: int) -> int | None:
        """How many codes may differ from the first at a step; None for all."""
        if step < self.delta_from:
            return 0
        return 1 + (step - self.delta_from) // self.delta_every if self.delta_every else None

    def losses(self, image: Tensor, camera: Camera | None, batch: PortraitBatch) -> dict[str, Tensor]:
        ws, expression = self.invert(image)
        order = torch.randperm(len(image) * self.world_size, generator=self.draws())
        place = order.argsort()[self.global_rows(len(image))]  # of each picture, among those of all ranks
        shown = place.argsort()[: self.rendered].to(image.device)
        seen = camera if camera is None else camera[shown]
        moves = expression if expression is None else expression[shown]
        found = self.generator.synthesis(ws[shown], seen, expression=moves).image
        terms = self.recover(found, image[shown])
        delta, pull = delta_regulariser(ws), latent_pull(ws, self.generator.mean_latents)
        loss = terms["reconstruction"].mean() + self.delta_weight * delta + self.pull_weight * pull
        terms |= {"delta": delta, "pull": pull}
        if self.code_weight and "z" in batch:
            if batch["z"].shape[1] != self.generator.z_dim:
                raise UserError(
                    f"the data know codes z of {batch['z'].shape[1]} numbers, the generator's have "
                    f"{self.generator.z_dim}: set --model.code_weight 0"
                )
            truth = self.generator.mapping(batch["z"]).repeat_interleave(len(image) // len(batch["z"]))
            terms["code"] = latent_error(ws, truth)
            loss = loss + self.code_weight * terms["code"]
        if self.expression_weight and expression is not None and "expression" in batch:
            error = expression.float() - batch["expression"].flatten(0, 1)
            terms["expression"] = error.square().mean(1)
            loss = loss + self.expression_weight * terms["expression"]
        return {**terms, "loss": loss}
