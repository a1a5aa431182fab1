"""Trains details on the surface manifolds, and turns photos into heads in one pass (GRAMInverter, Sec. 3.3 and 3.4)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.augment.marks import random_marks
from models.batches import PortraitBatch
from models.camera import Camera
from models.checks import check_not_negative, check_positive
from models.encoders.detail import DetailReconstructor, Details
from models.errors import UserError, one_line
from models.generators.manifold import ManifoldGenerator
from models.heads.index import Entry, detailed_entry
from models.heads.subjects import Details as DetailNetworks
from models.image import resized
from models.latents import Latents
from models.losses.detail import depth_loss, layer_normals, novel_view_loss, unseen
from models.rendering.output import Rendering
from models.rendering.visibility import seen_from
from stages.base.edits import Editable
from stages.base.inversion import RateSchedule, Renderer
from stages.base.photos import PhotoStage
from stages.base.stage import ArtifactRef

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Regularisation:
    """What holds details to the surface and away from what the photo does not show. The defaults are the paper's.

    Attributes:
        novel: weight of L_nv (Eq. 7); 0 leaves it out.
        mask: where a novel view must stay as it was: "facing", where the surface turns away from the photo's camera
            (Eq. 8); "visible", there and where something nearer hides it; "none", everywhere.
        normals: of that mask: "opacity", by the gradient of the layers' opacities (Eq. 9), or "depth", of the depth
            map, which cost nothing.
        tau: of Eq. 8.
        depth: weight of L_depth (Eq. 10); 0 leaves it out.
        spacings: epsilon of Eq. 10, in mean distances between manifolds along a ray.
        plane: whether the plane of a shared background is the last surface of Eq. 10, whose z_surf is nowhere farther.
    """

    novel: float = 4.0
    mask: Literal["facing", "visible", "none"] = "facing"
    normals: Literal["opacity", "depth"] = "opacity"
    tau: float = 0.1
    depth: float = 2e-4
    spacings: float = 1.5
    plane: bool = False

    def __post_init__(self) -> None:
        check_not_negative(self, "novel", "depth", where="regularisation.")
        check_positive(self, "tau", "spacings", where="regularisation.")


@dataclass(frozen=True)
class _Coarse:
    """A batch of B coarse heads, seen by the photos' cameras and by as many others, one after the other."""

    ws: Latents
    expression: Tensor | None
    camera: Camera
    """2 B."""
    seen: Rendering
    features: Tensor
    """(B, 2, R, N, C) where R rays meet N manifolds."""


class DetailStage(PhotoStage):
    """L = L_r + 4 L_nv + 2e-4 L_depth (Sec. 3.4): encoder and generator are frozen, the reconstructor learns.

    ``predict`` takes photos to heads in one pass, to be shown by :class:`models.heads.detailed.DetailedGenerator`.

    Args:
        inverter: artifact of ``tune``: generator, of surface manifolds, and encoder; not needed with ``tested``.
        detail: what to train, likewise.
        start: artifact of this stage whose reconstructor, of the same sizes, training starts from.
        regularisation: weights and kinds of the two terms beside L_r.
        marks: share of the training photos on which a random mark is painted
            (:func:`models.augment.marks.random_marks`), so that what is painted on a photo is carried over too; beyond
            the paper.
        options: of :class:`PhotoStage`. The paper's learning rate is constant.
    """

    name = "detail"
    generator: ManifoldGenerator
    detail: DetailReconstructor

    def __init__(
        self,
        inverter: ArtifactRef | None = None,
        detail: DetailReconstructor | None = None,
        start: ArtifactRef | None = None,
        regularisation: Regularisation = Regularisation(),
        marks: float = 0.0,
        schedule: RateSchedule = RateSchedule(3e-4, 3e-4),  # noqa: B008 - frozen
        **options: Any,
    ) -> None:
        super().__init__(schedule=schedule, **options)
        self.inverter, self.start = inverter, start
        if detail is not None:
            self.detail = detail
        self.regularisation, self.marks = regularisation, marks
        if not 0 <= marks <= 1:
            raise UserError(f"marks is {marks}: it is a share of the photos, from 0 to 1")

    def build_networks(self) -> None:
        if self.inverter is None or not hasattr(self, "detail"):
            raise UserError("detail trains --model.detail for the result --model.inverter of galatea tune: give both")
        self.take_networks("inverter", self.inverter.path)
        if self.start is not None:
            trained = self.take("start", self.start.path, "detail", DetailReconstructor)
            try:
                self.detail.load_state_dict(trained.state_dict())
            except RuntimeError as error:
                raise UserError(f"model.detail is not of the sizes of {self.start.path}: {one_line(error)}") from error

    def take_networks(self, role: str, path: str) -> None:
        super().take_networks(role, path)
        if not isinstance(self.generator, ManifoldGenerator):
            raise UserError(f"{path} holds a {type(self.generator).__name__}: details need one of surface manifolds")
        if role == "tested":
            self.detail = self.take(role, path, "detail", DetailReconstructor).requires_grad_(False)
        try:
            self.detail.check(self.generator)
        except ValueError as error:
            raise UserError(f"{error}: {path}") from error
        if self.regularisation.plane and not self.generator.has_plane:
            raise UserError(f"regularisation.plane: the generator of {path} has no plane behind the head")

    def modules_out(self) -> dict[str, nn.Module]:
        return {**super().modules_out(), "detail": self.detail}

    # -- training ---------------------------------------------------------------------------------

    def losses(self, image: Tensor, camera: Camera | None, batch: PortraitBatch) -> dict[str, Tensor]:
        assert camera is not None
        options, generator = self.regularisation, self.generator
        draws = self.draws()
        rows, count = self.global_rows(len(image), batch["image"].shape[1]), len(image) * self.world_size
        others = generator.rig.random(count, draws)[rows].to(image.device)
        if self.marks:
            marks = random_marks(count, self.marks, draws)
            image = torch.stack([marks[row](photo) for row, photo in zip(rows.tolist(), image, strict=True)])
        coarse = self._coarse(image, camera, others)
        shown, turned = coarse.seen[::2], coarse.seen[1::2]
        details = self.detail(resized(image, self.detail.resolution), shown.image.detach(), camera, generator)
        added: list[Tensor] = []

        def edit(points: Tensor, features: Tensor) -> Tensor:
            added.append(details(points))
            return features + added[0].to(features.dtype)

        edits = details.edits | {"edit": edit}
        final = generator.synthesis(coarse.ws, coarse.camera, expression=coarse.expression, **edits)
        terms = self.recover(final.image[::2], image)
        loss = terms["reconstruction"]
        if options.novel:
            terms["novel"] = novel_view_loss(final.image[1::2], turned.image, self._mask(coarse), self.perceptual)
            loss = loss + options.novel * terms["novel"]
        if options.depth:
            with torch.no_grad():
                hits = generator.crossings(coarse.camera, generator.resolution)
                alpha = generator.decode(coarse.features[:, 0].flatten(1, 2)).occupancy
            assert alpha is not None
            there = added[0].unflatten(1, coarse.features.shape[1:4])[:, 0]  # f_hr on the photo's own rays
            opacity = alpha.float().unflatten(1, there.shape[1:3])
            depth, valid, behind = hits.depth[::2], hits.valid[::2], self._behind(camera, hits.pixel[::2], details)
            terms["depth"] = depth_loss(there, opacity, depth, valid, options.spacings, *behind)
            loss = loss + options.depth * terms["depth"]
        return {**terms, "depth_change": depth_change(final[::2], shown), "loss": loss}

    def _behind(self, camera: Camera, pixel: Tensor, details: Details) -> tuple[Tensor, Tensor | None] | tuple[()]:
        """Where rays of the photos meet the plane of Eq. 10 (B, R), and its details there (B, R, C)."""
        if not self.regularisation.plane:
            return ()
        depth, points = self.generator.behind(camera, self.generator.resolution)
        pixel = pixel.clamp_max(depth.shape[1] - 1)  # padding looks anywhere
        there = points.gather(1, pixel[..., None].expand(-1, -1, 3))
        return depth.gather(1, pixel), None if details.behind is None else details.behind(there)

    @torch.no_grad()
    def _coarse(self, image: Tensor, camera: Camera, others: Camera) -> _Coarse:
        """The coarse heads of photos, from their cameras and from as many others."""
        ws, expression = self.invert(image)
        order = torch.arange(2 * len(image)).unflatten(0, (2, -1)).T.flatten()  # each head's two views side by side
        cameras = Camera.cat([camera, others])[order]
        kept: list[Tensor] = []

        def note(points: Tensor, features: Tensor) -> Tensor:
            kept.append(features)
            return features

        seen = self.generator.synthesis(ws, cameras, expression=expression, edit=note)
        layers = self.generator.crossings(cameras, self.generator.resolution).depth.shape[1:]
        features = torch.cat(kept, 1)  # a field may be asked in chunks
        return _Coarse(ws, expression, cameras, seen, features.unflatten(1, (2, *layers)))

    @torch.no_grad()
    def _mask(self, coarse: _Coarse) -> Tensor:
        """M of Eq. 7: (B, 1, H, W)."""
        options, (shown, turned) = self.regularisation, (coarse.seen[::2], coarse.seen[1::2])
        photo, novel = coarse.camera[::2], coarse.camera[1::2]
        if options.mask == "none":
            return torch.ones_like(turned.image[:, :1])
        normals = turned.normals if options.normals == "depth" else None
        if normals is None:
            normals = self._opacity_normals(coarse, novel)
        mask = unseen(normals, photo, options.tau)
        if options.mask == "visible":
            assert turned.depth is not None and turned.alpha is not None
            assert shown.depth is not None and shown.alpha is not None
            visible = seen_from(novel, turned.depth, turned.alpha, photo, shown.depth, shown.alpha)
            mask = torch.maximum(mask, (~visible).to(mask.dtype))
        return mask

    def _opacity_normals(self, coarse: _Coarse, camera: Camera) -> Tensor:
        """Normals (B, 3, H, W) of the coarse heads by Eq. 9."""
        generator, side = self.generator, self.generator.resolution
        hits = generator.crossings(camera, side)

        def opacity(points: Tensor) -> Tensor:
            alpha = generator.decode(generator.features(coarse.ws, points, coarse.expression)).occupancy
            assert alpha is not None
            return alpha

        normals = layer_normals(opacity, hits.points(camera, side), hits.valid)
        return hits.scatter(normals, side * side).mT.unflatten(2, (side, side))

    # -- from photos to heads ---------------------------------------------------------------------

    def reconstruct(self, image: Tensor, camera: Camera | None) -> Renderer:
        return self.editable(image, camera)(lambda ws: ws)

    def editable(self, image: Tensor, camera: Camera | None) -> Editable:
        """As of the base; details stay on the surfaces that they were found on."""
        assert camera is not None
        ws, expression = self.invert(image)
        coarse = self.generator.synthesis(ws, camera, expression=expression).image
        edits = self.detail(resized(image, self.detail.resolution), coarse, camera, self.generator).edits
        return lambda move: partial(self.generator.synthesis, move(ws), expression=expression, **edits)

    def details(self) -> dict[str, DetailNetworks]:
        return {"detail": self.detail}

    def entry(self, identity: str, artwork: str) -> Entry:
        return detailed_entry(identity, artwork)


def depth_change(final: Rendering, coarse: Rendering) -> Tensor:
    """Mean distance (B,) by which details have moved the surface that is solid in both, world units."""
    assert final.depth is not None and final.alpha is not None and coarse.depth is not None and coarse.alpha is not None
    both = (final.alpha > 0.5) & (coarse.alpha > 0.5)
    change = ((final.depth - coarse.depth).abs() * both).detach()
    return change.flatten(1).sum(1) / both.flatten(1).sum(1).clamp_min(1)
