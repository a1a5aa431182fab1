"""Trains what inverts a generator on nothing but the generator's own samples, whose shapes are known (E3DGE).

The method has phases, one after the other, each a fit of its own. A phase is two methods, ``build_PHASE`` and
``losses_PHASE``. The discriminator of the adversarial term, too, takes samples for what is real, not photos.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from datamodules.samples import SampleDataModule, check_samples
from models.artifact import Export
from models.augment.perspective import random_corners
from models.batches import PortraitBatch, SampleBatch
from models.camera import Camera
from models.checks import check_not_negative, check_positive
from models.encoders.base import Encoder
from models.encoders.e3dge import AlignmentFusion, TextureFusion
from models.errors import UserError, one_line, shown
from models.generators.base import Discriminator, RadianceGenerator
from models.generators.geometry import form_of
from models.heads.index import Entry, pixel_aligned_entry
from models.heads.pixel_aligned import LocalNetworks, PixelAlignment, Query, Source
from models.heads.subjects import Details
from models.image import resized
from models.latents import Latents
from models.losses.alignment import distortion_loss, residual_loss
from models.losses.geometry import GeometryLoss
from models.losses.inversion import latent_error
from models.rendering.output import Rendering
from stages.base.critic import AdversarialTerm, Critic
from stages.base.edits import Editable
from stages.base.inversion import Renderer, check_fit, start_trunk
from stages.base.photos import PhotoStage
from stages.base.stage import ArtifactRef, GeneratorRef

PHASES = ("global", "align", "local", "hybrid")
CURRICULA = ("none", "scale_pose_sd", "scale_view_gap")


@dataclass(frozen=True)
class Curriculum:
    """How hard the poses of samples are, in steps of training: a staircase ("Curriculum Pose Sampling", B.1).

    Attributes:
        kind: what is scaled: "scale_pose_sd", the spread of all poses (the paper: at 0 every view is frontal);
            "scale_view_gap", how far a sample's other views lie from its first (ours: at 0 all are that one); "none",
            nothing.
        steps: of the optimiser, the first one 0, at which the factor becomes the next of ``values``.
        values: factors, from 0 to 1. The defaults are the released code's.
    """

    kind: Literal["none", "scale_pose_sd", "scale_view_gap"] = "none"
    steps: tuple[int, ...] = (0, 10_000, 14_000, 18_000, 22_000, 26_000)
    values: tuple[float, ...] = (0.0, 0.15, 0.25, 0.5, 0.75, 1.0)

    def __post_init__(self) -> None:
        if self.kind not in CURRICULA:
            raise UserError(f"curriculum.kind is {shown(self.kind)}: take one of {', '.join(CURRICULA)}")
        ascending = all(a < b for a, b in zip(self.steps, self.steps[1:], strict=False))
        if len(self.steps) != len(self.values) or not ascending or self.steps[:1] != (0,):
            raise UserError("curriculum.steps must rise from 0, one for each of curriculum.values")
        if not all(0 <= value <= 1 for value in self.values):
            raise UserError("curriculum.values must be from 0 to 1")

    def value(self, step: int) -> float:
        """The factor at a step."""
        return next(v for s, v in zip(reversed(self.steps), reversed(self.values), strict=True) if s <= step)

    def apply(self, data: SampleDataModule, step: int) -> None:
        """Set the poses of training samples for a step."""
        for kind in CURRICULA[1:]:
            setattr(data, kind, self.value(step) if kind == self.kind else 1.0)


@dataclass(frozen=True)
class AlignerTraining:
    """What E_ADA is taught beside the pictures that come of it.

    Attributes:
        residual: weight of L1 between the residual that it predicts for another view and the true one (B.3: .1; the
            released scripts: 1); it needs samples with views.
        distortion: weight of L1 to a residual whose perspective was changed, as HFGI teaches it.
        scale, probability: of that change, see :func:`models.augment.perspective.random_corners`.
        rate: its learning rate, relative to the schedule's; 0 leaves it as it is. null: 1, and 0 in phase "hybrid".
    """

    residual: float = 0.1
    distortion: float = 0.0
    scale: float = 0.15
    probability: float = 0.8
    rate: float | None = None

    def __post_init__(self) -> None:
        check_not_negative(self, "residual", "distortion", "rate", where="aligner.")
        for name in ("scale", "probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"aligner.{name} is {getattr(self, name)}: it must be from 0 to 1")

    def learns(self, phase: str, alignment: str) -> bool:
        """Whether it learns in a phase: where anything depends on it."""
        rate = (0.0 if phase == "hybrid" else 1.0) if self.rate is None else self.rate
        return rate > 0 and (bool(self.residual or self.distortion) or (phase != "align" and alignment != "3d"))


class SelftrainStage(PhotoStage):
    """Encoders of a frozen 3D generator, taught by its samples (E3DGE, Sec. 4); each phase goes on from another.

    - "global": E0, by L = L_geo + code_weight L_code + L_rec (Sec. 4.1), and L_adv with ``adversarial`` (B.3, Eq. 8).
    - "align": E_ADA alone, by ``aligner``: in place of HFGI's weights, which the paper starts from.
    - "local": E1 and the fusion of its details with the field (Sec. 4.2), by L_rec (B.3), and E_ADA where there is one;
      details are aligned as ``local.alignment`` says, in 3D or 2D. E0 is frozen. With ``adversarial`` there is also
      L_adv (B.3, Eq. 5-7).
    - "hybrid": as "local" with both alignments, whose fusion is learnt too; E_ADA is frozen by default (Sec. 4.3).

    The data are samples of the generator (:class:`datamodules.samples.SampleDataModule`); validate, test and predict
    take any pictures, and show heads with the details that there are. An encoder may tell some groups of the
    generator's codes only, as the released one does: the generator completes them. Beyond the paper: the generator may
    be of any kind that has a field; of what is no signed distance, opacities are compared.

    Args:
        prior: artifact and module of the generator, for phase "global"; not needed with ``tested``.
        encoder: what to train in phase "global", likewise; its codes must be the generator's.
        phase: what is trained, one of ``PHASES``.
        trunk: weights that the encoder's trunk starts from, as of ``invert``; null starts from random ones.
        geometry: L_geo.
        code_weight: of L_code, the mean squared error of all codes that the encoder tells (Eq. 8 of B.3 omits it,
            Sec. 4.1 and Table 4 have it).
        full_weight, thumb_weight: of L_rec of the pictures, and of what was rendered before super-resolution. In phase
            "global" B.3 has both, the released code the second only; in those with details it is the other way round:
            B.3 has the first only. Of a generator with one resolution this counts once.
        loss_side: of the pictures that L_rec compares, at most; null takes the generator's own.
        start: for the phases after "global": artifact of an earlier one. Networks of ``local`` that have been trained
            there go on from it; the others are those of this fit, and of its seed.
        local: the networks of the details, for the same phases.
        novel_views: in phases "local" and "hybrid", whether each view of a sample is reconstructed from its next one
            (B.1), or from itself.
        aligner: what E_ADA is taught.
        curriculum: of the poses of samples.
        adversarial: the term by which a discriminator, which learns beside, takes the full pictures for samples of the
            generator (B.3; the released scripts take photos as real). null leaves it out; phase "align" has none.
        silent: whether fusions begin by changing nothing, so that training begins at what came before; beyond the
            paper.
        realign: whether the details of heads that a test edits are moved to where the edited heads have them
            (Sec. 4.3), in both branches. Otherwise they stay where they are on the heads as they were: for comparison.
        options: of :class:`PhotoStage`.
    """

    name = "selftrain"
    shows_normals = True

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
        loss_side: int | None = None,
        start: ArtifactRef | None = None,
        local: LocalNetworks | None = None,
        novel_views: bool = True,
        aligner: AlignerTraining = AlignerTraining(),
        curriculum: Curriculum = Curriculum(),
        adversarial: AdversarialTerm | None = None,
        silent: bool = True,
        realign: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if phase not in PHASES:
            raise UserError(f"phase is {shown(phase)}: take one of {', '.join(PHASES)}")
        self.phase, self.prior, self.trunk, self.geometry = phase, prior, trunk, geometry
        self.start, self.local = start, local
        if encoder is not None:
            self.encoder = encoder
        self.code_weight, self.full_weight, self.thumb_weight = code_weight, full_weight, thumb_weight
        self.loss_side = loss_side
        check_not_negative(self, "code_weight", "full_weight", "thumb_weight")
        check_positive(self, "loss_side")
        self.novel_views, self.aligner, self.curriculum, self.silent = novel_views, aligner, curriculum, silent
        self.realign = realign
        self.adversarial, self.critic = adversarial, cast(Critic | None, None)
        self._trained_names: set[str] = set()  # of networks of ``local``
        if adversarial is not None and phase == "align":
            raise UserError(f"phase {phase!r} has no adversarial term: leave --model.adversarial out")
        if phase in ("local", "hybrid") and not (full_weight or thumb_weight):
            raise UserError(f"phase {phase!r} learns by its pictures: neither full_weight nor thumb_weight is above 0")

    def build_networks(self) -> None:
        getattr(self, f"build_{self.phase}")()

    def take_networks(self, role: str, path: str) -> None:
        """As of the base; details only where they are being trained, or are there."""
        super().take_networks(role, path)
        if not isinstance(self.generator, RadianceGenerator):
            raise UserError(f"{path} holds a {type(self.generator).__name__}, which has no radiance field")
        self.told = check_fit(self.encoder, self.generator)
        if role == "tested":
            there = "local" in self.inputs[role].manifest["modules"]
            self.local = self.take(role, path, "local", LocalNetworks).requires_grad_(False) if there else None
        if self.local is not None:
            try:
                self.local.check(self.generator)
            except ValueError as error:
                raise UserError(f"{error}: {path}") from error

    def train(self, mode: bool = True) -> SelftrainStage:
        super().train(mode)
        for network in () if self.local is None else self.local.children():
            if not any(parameter.requires_grad for parameter in network.parameters()):
                network.eval()
        return self

    def losses(self, image: Tensor, camera: Camera | None, batch: PortraitBatch) -> dict[str, Tensor]:
        assert camera is not None
        return getattr(self, f"losses_{self.phase}")(image, camera, cast(SampleBatch, batch))

    def recover(self, found: Tensor, image: Tensor) -> dict[str, Tensor]:
        side = self.loss_side or found.shape[-1]
        small = (resized(picture, min(side, picture.shape[-1])) for picture in (found, image))
        return super().recover(*small)

    # -- samples ------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Refuse data that are not samples of the generator, or have no views where these are asked for."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if "start" in self.inputs:
            check_samples(data, (self.inputs["start"], "generator"))
            if self.needs_views and data.views < 2:
                raise UserError(
                    f"phase {self.phase!r} learns from other views of a sample, the data have one each: give "
                    "--data.init_args.views=2, or --model.novel_views=false and --model.aligner.residual=0"
                )
        elif self.prior is not None and "prior" in self.inputs:
            check_samples(data, (self.inputs["prior"], self.prior.module))
        super().on_fit_start()

    def check_data(self, *splits: str) -> None:
        """As every inversion's; samples are of the generator that is measured with them."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, SampleDataModule) and "tested" in self.inputs:
            check_samples(data, (self.inputs["tested"], "generator"))
        super().check_data(*splits)

    @property
    def needs_views(self) -> bool:
        """Whether samples need more than one view."""
        other = self.novel_views and self.phase != "align"
        return other or bool(self.aligner_learns and self.aligner.residual)

    def on_train_start(self) -> None:
        super().on_train_start()
        self._set_poses()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._set_poses()  # of the next step: its pictures are made before it begins

    def _set_poses(self) -> None:
        self.curriculum.apply(self.trainer.datamodule, self.global_step)  # type: ignore[attr-defined]

    @staticmethod
    def next_views(batch: PortraitBatch) -> Tensor:
        """For each of B * V pictures the number of the next view of the same head, of the first one for the last."""
        rows, views = batch["image"].shape[:2]
        return torch.arange(rows * views, device=batch["image"].device).unflatten(0, (-1, views)).roll(-1, 1).flatten()

    def others(self, image: Tensor, camera: Camera, batch: PortraitBatch) -> tuple[Tensor, Camera]:
        """For each of B * V pictures the next view of the same head, and its camera."""
        order = self.next_views(batch)
        return image[order], camera[order]

    # -- what phases share ---------------------------------------------------------------------------------------------

    @staticmethod
    def small(batch: SampleBatch) -> Tensor | None:
        """What samples show before super-resolution, (B * V, 3, h, w); None of a generator with one resolution."""
        raw = batch.get("raw")
        return None if raw is None else raw.flatten(0, 1)

    def recoveries(self, found: Rendering, image: Tensor, raw: Tensor | None) -> dict[str, Tensor]:
        """L_rec at both resolutions: its terms, and the weighted sum as ``recovery``; (B * V,) each.

        Terms of what was rendered before super-resolution begin with ``thumb_``.

        Args:
            image: (B * V, 3, H, W) and raw: (B * V, 3, h, w), what there should be.
        """
        if found.raw is None or raw is None:
            terms = self.recover(found.image, image)
            return {**terms, "recovery": max(self.full_weight, self.thumb_weight) * terms["reconstruction"]}
        terms, total = {}, image.new_zeros(len(image))
        pairs = {
            "": (self.full_weight, found.image, image),
            "thumb_": (self.thumb_weight, found.raw, raw),
        }
        for prefix, (weight, ours, theirs) in pairs.items():
            if weight:
                own = self.recover(ours, theirs)
                total = total + weight * own["reconstruction"]
                terms |= {f"{prefix}{name}": value for name, value in own.items()}
        return {**terms, "recovery": total}

    def judged(
        self, terms: dict[str, Tensor], loss: Tensor, found: Tensor, truth: Tensor, camera: Camera
    ) -> dict[str, Tensor]:
        """The terms and their sum as ``loss``, with L_adv of the pictures where a discriminator is; (B * V,) each."""
        if self.critic is None:
            return {**terms, "loss": loss}
        adversarial = self.critic.term(found, truth, camera)
        return {**terms, "adversarial": adversarial, "loss": loss + self.critic.options.weight * adversarial}

    def build_critic(self) -> None:
        """The discriminator of ``adversarial``, where that is asked for and weighs something."""
        if (term := self.adversarial) is not None and term.weight:
            self.discriminator = term.discriminator(self.take("discriminator", term.path, term.module, Discriminator))
            self.critic = Critic(self.discriminator, term)

    # -- phase "global" -----------------------------------------------------------------------------------------------

    def build_global(self) -> None:
        """The generator, frozen, and E0 around its mean code."""
        if self.prior is None or not hasattr(self, "encoder"):
            raise UserError("selftrain trains --model.encoder for the generator --model.prior: give both")
        if self.local is not None:
            raise UserError("phase 'global' knows no details: --model.local is for the phases after it")
        generator = self.take("prior", self.prior.path, self.prior.module, RadianceGenerator)
        self.generator = generator.requires_grad_(False)
        if self.trunk is not None:
            start_trunk(self.encoder, self.trunk)
        self.told = check_fit(self.encoder, generator)
        if self.encoder.expressions:
            raise UserError("samples are neutral: an encoder with expressions learns these with galatea invert")
        # Not channels_last: in bf16 on CPUs, PyTorch's convolutions of single pixels then have arbitrary gradients.
        self.encoder.start(generator.mean_latents)
        self.build_critic()

    def losses_global(self, image: Tensor, camera: Camera, batch: SampleBatch) -> dict[str, Tensor]:
        """L = L_geo^O + L_geo^F + code_weight L_code + L_rec, and L_adv where there is a discriminator."""
        ws, _ = self.invert(image)
        terms = self.geometry(self.generator, ws, batch)
        terms["code"] = self.code_error(ws, batch)
        found = self.generator.synthesis(ws, camera)
        terms |= self.recoveries(found, image, self.small(batch))
        loss = terms["geometry"] + self.code_weight * terms["code"] + terms["recovery"]
        return self.judged(terms, loss, found.image, image, camera)

    def code_error(self, ws: Latents, batch: SampleBatch) -> Tensor:
        """L_code (B * V,), of the groups that the encoder tells; the true codes are those of w, as often as needed."""
        views = len(ws) // len(batch["image"])
        found, truth = ({name: groups[name] for name in self.told} for groups in (ws.groups, batch["ws"]))
        return latent_error(Latents(found), Latents(truth).repeat_interleave(views))

    # -- phases with details ------------------------------------------------------------------------------------------

    def build_align(self) -> None:
        """E_ADA learns; the rest of ``local`` is handed on as it is."""
        if self.aligner.learns("align", "3d"):
            self._build_details(("aligner",))
            return
        raise UserError("phase 'align' needs what E_ADA is taught: a weight in --model.aligner, and a rate")

    def build_local(self) -> None:
        """E1 and its fusion, and E_ADA where it is taught."""
        if self.local is not None and self.local.alignment == "hybrid":
            raise UserError("local.alignment is 'hybrid': phase 'local' takes '3d' or '2d', phase 'hybrid' goes on")
        self._build_details(("local_encoder", "texture_fusion"))

    def build_hybrid(self) -> None:
        """The fusion of both alignments, and what there was."""
        if self.local is not None and self.local.alignment != "hybrid":
            raise UserError(f"local.alignment is {self.local.alignment!r}: phase 'hybrid' takes 'hybrid'")
        self._build_details(("local_encoder", "texture_fusion", "alignment_fusion"))

    @property
    def aligner_learns(self) -> bool:
        """Whether E_ADA is there and learns in this phase."""
        local = self.local
        return local is not None and local.aligner is not None and self.aligner.learns(self.phase, local.alignment)

    def _build_details(self, learning: Collection[str]) -> None:
        """Generator and encoder, frozen, and the networks of ``local``, as far as they have been trained before.

        Args:
            learning: names of the networks that learn, beside E_ADA.
        """
        if self.start is None or self.local is None:
            raise UserError(
                f"phase {self.phase!r} trains --model.local for the result --model.start of an earlier phase: give both"
            )
        path, local = self.start.path, self.local
        if self.phase == "align" and local.aligner is None:
            raise UserError("phase 'align' trains local.aligner, which is not given")
        self.take_networks("start", path)
        earlier = self._trained(path)
        if self.phase == "hybrid" and "aligner" not in earlier:
            raise UserError(f"phase 'hybrid' goes on from details with an aligner, which {path} does not hold")
        for name, network in local.named_children():
            if name in earlier:
                try:
                    network.load_state_dict(earlier[name].state_dict())
                except RuntimeError as error:
                    raise UserError(f"local.{name} is not of the sizes of {path}: {one_line(error)[:200]}") from error
            elif self.silent and isinstance(network, TextureFusion | AlignmentFusion):
                network.silence()
            learns = name in learning or (name == "aligner" and self.aligner_learns)
            network.requires_grad_(learns)
            if learns or name in earlier:
                self._trained_names.add(name)
        self.build_critic()

    def _trained(self, path: str) -> dict[str, nn.Module]:
        """The networks of ``local`` that the result ``start`` has trained; of a foreign one all that there are."""
        start = self.inputs["start"]
        if "local" not in start.manifest["modules"]:
            return {}
        networks = dict(self.take("start", path, "local", LocalNetworks).named_children())
        return {name: networks[name] for name in start.extra.get("trained", networks) if name in networks}

    def parameter_groups(self, learning: list[nn.Parameter]) -> list[dict[str, Any]]:
        """E_ADA has a rate of its own."""
        aligner = None if self.local is None else self.local.aligner
        own = set() if aligner is None else {id(parameter) for parameter in aligner.parameters()}
        rest = [parameter for parameter in learning if id(parameter) not in own]
        found: list[dict[str, Any]] = [{"params": rest}] if rest else []
        if taught := [parameter for parameter in learning if id(parameter) in own]:
            found.append({"params": taught, "lr": 1.0 if self.aligner.rate is None else self.aligner.rate})
        return found

    def read(self, image: Tensor, camera: Camera) -> Source:
        """What B pictures and E0 say of their heads; the latter without gradient."""
        assert self.local is not None
        with torch.no_grad():
            ws, expression = self.invert(image)
        return self.local.source(self.generator, ws, image, camera, expression)

    def losses_align(self, image: Tensor, camera: Camera, batch: SampleBatch) -> dict[str, Tensor]:
        """What ``aligner`` says."""
        with torch.no_grad():
            source = self.read(image, camera)
        return self.lessons(source, None, image, camera, batch)

    def losses_local(self, image: Tensor, camera: Camera, batch: SampleBatch) -> dict[str, Tensor]:
        """L_rec of the full picture, of another view of the head or of the same; and what ``aligner`` says."""
        local = self.local
        assert local is not None
        truth, seen = self.others(image, camera, batch) if self.novel_views else (image, camera)
        source = self.read(image, camera)
        query = None if local.alignment == "3d" else local.query(self.generator, source, seen)
        found = PixelAlignment(local, source, query).synthesis(self.generator, seen)
        raw = self.small(batch)
        if raw is not None and self.novel_views:
            raw = raw[self.next_views(batch)]
        terms = self.recoveries(found, truth, raw)
        loss = terms["recovery"]
        if self.aligner_learns:
            taught = self.lessons(source, query if self.novel_views else None, image, camera, batch)
            loss = loss + taught.pop("loss")
            terms |= taught
        return self.judged(terms, loss, found.image, truth, seen)

    losses_hybrid = losses_local

    def on_after_backward(self) -> None:
        super().on_after_backward()
        if self.critic is not None:
            found = self.critic.learn(self.global_step)
            self.log_dict({f"{self.name}/{name}": value for name, value in found.items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.critic is not None:
            checkpoint["critic"] = self.critic.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.critic is not None and "critic" in checkpoint:
            self.critic.load_state_dict(checkpoint["critic"])

    def lessons(
        self, source: Source, query: Query | None, image: Tensor, camera: Camera, batch: SampleBatch
    ) -> dict[str, Tensor]:
        """The terms of E_ADA alone, and their weighted sum as ``loss``; (B * V,) each.

        Args:
            query: what it predicts for the other views, where that is known already.
        """
        local, weights = self.local, self.aligner
        assert local is not None and local.aligner is not None
        terms, loss = {}, image.new_zeros(len(image))
        if weights.residual:
            truth, seen = self.others(image, camera, batch)
            if query is None:
                query = local.query(self.generator, source, seen, encode=False)
            terms["aligned"] = residual_loss(query, truth)
            loss = loss + weights.residual * terms["aligned"]
        if weights.distortion:
            rows = self.global_rows(len(image), batch["image"].shape[1])
            count = len(rows) * self.world_size
            corners = random_corners(count, self.draws(), weights.scale, weights.probability)[rows].to(image.device)
            coarse = resized(image, local.resolution) - source.residual
            terms["undone"] = distortion_loss(local.aligner, source.residual, coarse, corners)
            loss = loss + weights.distortion * terms["undone"]
        return {**terms, "loss": loss}

    # -- what is shown, measured and handed on ------------------------------------------------------------------------

    def reconstruct(self, image: Tensor, camera: Camera | None) -> Renderer:
        """As of the base; with details where there are networks of them."""
        if self.local is None:
            return super().reconstruct(image, camera)
        assert camera is not None
        return partial(self.show, self.read(image, camera))

    def editable(self, image: Tensor, camera: Camera | None) -> Editable:
        """As of the base; with details where there are networks of them, which follow an edit as ``realign`` says."""
        if self.local is None:
            return super().editable(image, camera)
        assert camera is not None
        source, local = self.read(image, camera), self.local

        def moved(move: Callable[[Latents], Latents]) -> Renderer:
            ws = move(source.ws)
            if self.realign:
                return partial(self.show, local.edited(self.generator, source, ws, source.expression))
            return partial(self.show, source, ws=ws)

        return moved

    def show(self, source: Source, camera: Camera | None, ws: Latents | None = None) -> Rendering:
        """Heads with their details, seen by V cameras each; of codes ``ws`` with the details of ``source``'s own."""
        assert self.local is not None and camera is not None
        aligned = self.local.edit(self.generator, source, camera)
        if ws is not None:
            aligned = replace(aligned, source=replace(source, ws=ws))
        return aligned.synthesis(self.generator, camera)

    @torch.no_grad()
    def validation_step(self, batch: PortraitBatch, batch_idx: int) -> None:
        """As every inversion's; of samples also how far shape and codes are off, or the other views with details."""
        if batch_idx == 0:
            self._shown = batch
        image, camera = self.pictures(batch)
        assert camera is not None
        measure = self._measure_codes if self.local is None else self._measure_details
        self._scored.append(measure(image, camera, batch))

    def _measure_codes(self, image: Tensor, camera: Camera, batch: PortraitBatch) -> dict[str, Tensor]:
        """Of the pictures that codes make; of samples the terms of L_geo and L_code too."""
        ws, expression = self.invert(image)
        found = self.scores(self.generator.synthesis(ws, camera, expression=expression).image, image)
        if "ws" in batch:
            samples = cast(SampleBatch, batch)
            found |= self.geometry(cast(RadianceGenerator, self.generator), ws, samples)
            found["code"] = self.code_error(ws, samples)
        return found

    def _measure_details(self, image: Tensor, camera: Camera, batch: PortraitBatch) -> dict[str, Tensor]:
        """Of pictures with details; of samples with views also of each one's next, ``_nv``.

        ``aligned`` and ``unaligned`` are how far residuals are from that view's, as E_ADA moves them and as they are.
        """
        source, local = self.read(image, camera), self.local
        assert local is not None
        found = self.scores(self.show(source, camera).image, image)
        if "ws" not in batch or batch["image"].shape[1] < 2:
            return found
        other, seen = self.others(image, camera, batch)
        in_3d, query = local.alignment == "3d", None
        if local.aligner is not None:
            query = local.query(self.generator, source, seen, encode=not in_3d)
            still = replace(query, residual=source.residual)
            found |= {"aligned": residual_loss(query, other), "unaligned": residual_loss(still, other)}
        shown = PixelAlignment(local, source, None if in_3d else query).synthesis(self.generator, seen)
        return found | {f"{name}_nv": value for name, value in self.scores(shown.image, other).items()}

    def details(self) -> dict[str, Details]:
        return {} if self.local is None else {"local": self.local}

    def entry(self, identity: str, artwork: str) -> Entry:
        if self.local is None:
            return Entry(identity, artwork=artwork, caption="one pass")
        return pixel_aligned_entry(identity, artwork)

    def modules_out(self) -> dict[str, nn.Module]:
        critic = {} if self.critic is None else {"discriminator": self.discriminator}
        return {**super().modules_out(), **self.details(), **critic}

    def export(self) -> Export:
        found = super().export()
        if self._heads:
            return found
        extra = {**found.extra, "geometry": form_of(self.generator)}
        if self.local is not None:
            extra["trained"] = sorted(self._trained_names)
        return replace(found, extra=extra)
