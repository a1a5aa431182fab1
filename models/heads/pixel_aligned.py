"""A photo's details at the pixels that points of the field project to, for its own codes and for others.

Details are what the photo has beyond its reconstruction. A point finds them in two ways: where it projects to in the
photo (3D alignment), and where it projects to in the picture that is being made, after a network has moved them there
(2D alignment); or in both (hybrid).

Source: E3DGE (Lan et al., 2023), Sec. 4.2 and 4.3.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from models.camera import Camera
from models.configurable import Configurable
from models.encoders.alignment import ResidualAligner
from models.encoders.e3dge import AlignmentFusion, LocalEncoder, TextureFusion, pixel_features, within
from models.errors import UserError, shown
from models.generators.baked import BakedHead
from models.generators.base import RadianceGenerator
from models.heads.photos import PhotoSet
from models.heads.wrapped import PhotoGenerator
from models.image import resized
from models.latents import Latents
from models.rendering.output import Edit, Rendering

ALIGNMENTS = ("3d", "2d", "hybrid")
HIDDEN = 0.06  # a point is hidden when it lies this much behind what the photo shows there, in units of the rig


@dataclass(frozen=True)
class Source:
    """What B photos say about heads.

    Attributes:
        camera: B cameras, of the photos.
        ws, expression: B codes, and (B, E), with E = 0 where nothing moves: of the heads that are shown.
        residual: Delta (B, 3, S, S), photos less their reconstructions from the photos' own codes; without gradient.
        depth: (B, 1, h, w) of the heads shown, seen by ``camera``: camera-z, world units, the background at the far
            end.
        limit: (B, 1, h, w) depth up to which points count as seen there.
        details: F_L (B, C, S / 4, S / 4) (Eq. 7); None where details are aligned in 2D alone.
    """

    camera: Camera
    ws: Latents
    expression: Tensor
    residual: Tensor
    depth: Tensor
    limit: Tensor
    details: Tensor | None

    def __len__(self) -> int:
        return len(self.residual)

    def repeat_interleave(self, repeats: int) -> Source:
        """Every photo ``repeats`` times, in place."""
        if repeats == 1:
            return self
        tensors = ("expression", "residual", "depth", "limit")
        return Source(
            camera=self.camera.repeat_interleave(repeats),
            ws=self.ws.repeat_interleave(repeats),
            details=None if self.details is None else self.details.repeat_interleave(repeats, 0),
            **{name: getattr(self, name).repeat_interleave(repeats, 0) for name in tensors},
        )


@dataclass(frozen=True)
class Query:
    """The details of photos, moved to pictures of their heads from elsewhere.

    Attributes:
        camera: C cameras, V for each photo.
        coarse: (C, 3, S, S) the heads as the generator alone shows them there.
        depth: (C, 1, h, w) of these, as :attr:`Source.depth`.
        residual: Delta' (C, 3, S, S), which E_ADA has moved there.
        details: F_ADA (C, C', S / 4, S / 4); None where these were not asked for.
    """

    camera: Camera
    coarse: Tensor
    depth: Tensor
    residual: Tensor
    details: Tensor | None


@dataclass(frozen=True)
class PixelAlignment:
    """Fuses a field's features with the details of photos: an ``edit`` of ``generator.synthesis``.

    Points come in as many rows as there are photos, those of all V cameras of one then one camera after the other; or
    in as many rows as there are cameras, then any number.

    Attributes:
        networks: that fuse.
        source, query: where points find their details; the latter is None for 3D alignment.
    """

    networks: LocalNetworks
    source: Source
    query: Query | None

    def __call__(self, points: Tensor, features: Tensor) -> Tensor:
        """Features (R, P, C) of a field at world points (R, P, 3), with details.

        Raises:
            ValueError: when the rows are neither photos nor cameras, or cameras have different numbers of points.
        """
        rows, photos = len(points), len(self.source)
        cameras = rows if self.query is None else len(self.query.camera)
        if rows % photos or cameras % rows or (cameras > rows > photos) or rows * points.shape[1] % cameras:
            raise ValueError(
                f"{rows} rows of {points.shape[1]} points are not those of {photos} photos, or of {cameras} cameras"
            )
        local = self.networks.local(points, self.source.repeat_interleave(rows // photos), self.query)
        fusion = self.networks.texture_fusion
        return fusion(features, fusion.local(local, points).to(features.dtype))

    def synthesis(
        self,
        generator: RadianceGenerator,
        camera: Camera,
        *,
        edit: Edit | None = None,
        randomness: torch.Generator | Tensor | None = None,
        taps: Sequence[str] = (),
        resolution: int | None = None,
    ) -> Rendering:
        """The heads with their details, by any generator, whatever portions it asks for points in.

        Args:
            camera: the query's, or any V for each photo with 3D alignment.
            edit: of the features, after the details. Other arguments: as of ``generator.synthesis``.
        """
        rows = len(self.source)
        views = 1 if self.query is None else len(camera) // rows  # what is aligned to a camera gets a row of its own

        def fused(points: Tensor, features: Tensor) -> Tensor:
            found = self(points, features)
            if edit is None:
                return found
            together = (t.reshape(rows, -1, t.shape[-1]) for t in (points, found))
            return edit(*together).reshape(found.shape)

        expression = self.source.expression.repeat_interleave(views, 0)
        return generator.synthesis(
            self.source.ws.repeat_interleave(views),
            camera,
            expression=expression if generator.expressions else None,
            edit=fused,
            randomness=randomness,
            taps=taps,
            resolution=resolution,
        )


class LocalNetworks(Configurable):
    """The networks between a photo and the details of its head, and how these are aligned.

    Args:
        local_encoder: E1, of the source and of the query branch alike.
        texture_fusion: modulates the field's features with the details.
        aligner: E_ADA; for 3D alignment it may be left out, then other codes than the photo's own move the head
            below its details.
        alignment_fusion: fuses the details of both branches, for hybrid alignment alone.
        alignment: "3d", "2d" or "hybrid".
        occlusion: whether a point that the head hides from the photo's camera counts as not seen: it has no details
            with 3D alignment, and hybrid alignment is told. Otherwise all points within the picture count as seen.
        resolution: S, side of the pictures that E1 and E_ADA see, pixels.

    Raises:
        ValueError: for an unknown alignment, or networks that do not fit it or each other.
    """

    def __init__(
        self,
        local_encoder: LocalEncoder,
        texture_fusion: TextureFusion,
        aligner: ResidualAligner | None = None,
        alignment_fusion: AlignmentFusion | None = None,
        alignment: str = "3d",
        occlusion: bool = False,
        resolution: int = 256,
    ) -> None:
        super().__init__()
        if alignment not in ALIGNMENTS:
            raise UserError(f"local.alignment is {shown(alignment)}: take one of {', '.join(ALIGNMENTS)}")
        if alignment != "3d" and aligner is None:
            raise UserError(f"local.alignment {alignment} needs an aligner: give local.aligner, or 3d")
        if (alignment == "hybrid") != (alignment_fusion is not None):
            raise UserError("local.alignment hybrid, and no other, needs local.alignment_fusion")
        for name, network in (("texture_fusion", texture_fusion), ("alignment_fusion", alignment_fusion)):
            if network is not None and (width := network.init_args["channels"]) != local_encoder.features:
                raise UserError(
                    f"local.{name} takes {width} local features, local.local_encoder makes {local_encoder.features}"
                )
        step = 4 << local_encoder.init_args["depth"]
        if resolution < 1 or resolution % step:
            raise UserError(f"local.resolution is {resolution}: it must be a multiple of {step}")
        self.local_encoder, self.texture_fusion = local_encoder, texture_fusion
        self.aligner, self.alignment_fusion = aligner, alignment_fusion
        self.alignment, self.occlusion, self.resolution = alignment, occlusion, resolution

    def check(self, generator: RadianceGenerator) -> None:
        """Refuse a generator that the networks do not fit.

        Raises:
            ValueError: saying which setting to change.
        """
        mean = generator.mean_latents
        point = torch.zeros(1, 1, 3, device=next(iter(mean.groups.values())).device)
        with torch.no_grad():
            width = generator.features(mean, point).shape[2]
        if self.texture_fusion.width > width:
            raise ValueError(
                f"texture_fusion.width is {self.texture_fusion.width}, the generator's field has {width} features"
            )

    # -- where details are ---------------------------------------------------------------------------------------------

    def source(
        self,
        generator: RadianceGenerator,
        ws: Latents,
        image: Tensor,
        camera: Camera,
        expression: Tensor | None = None,
    ) -> Source:
        """What photos have beyond their reconstructions.

        Args:
            ws, expression: B codes, and (B, E) or None for neutral: the photos' own.
            image: (B, 3, H, W) in [-1, 1]. camera: B cameras.
        """
        expression = _full(generator, expression, image)
        coarse, depth, limit = self._coarse(generator, ws, camera, expression)
        residual = (resized(image, self.resolution) - coarse).detach()
        details = None if self.alignment == "2d" else self._encode(residual, depth)  # Eq. 7
        return Source(camera, ws, expression, residual, depth, limit, details)

    def edited(
        self, generator: RadianceGenerator, source: Source, ws: Latents, expression: Tensor | None = None
    ) -> Source:
        """The same photos for other codes: details are moved to where the heads shown would have them in the photos.

        Photos whose codes are their own keep what they have.

        Args:
            source: of B photos and their own codes.
            ws, expression: B codes, and (B, E) or None for neutral: of the heads that are shown.
        """
        expression = _full(generator, expression, source.residual)
        other = differ(source, ws, expression)
        if not other.any():
            return replace(source, ws=ws, expression=expression)
        coarse, depth, limit = self._coarse(generator, ws, source.camera, expression)

        def chosen(new: Tensor, own: Tensor) -> Tensor:
            return torch.where(other[:, None, None, None], new, own)

        depth, limit, details = chosen(depth, source.depth), chosen(limit, source.limit), source.details
        if self.aligner is not None and details is not None:
            aligned = self.aligner(source.residual, coarse)  # Delta_edit
            details = chosen(self._encode(aligned, depth), details)
        return replace(source, ws=ws, expression=expression, depth=depth, limit=limit, details=details)

    def query(self, generator: RadianceGenerator, source: Source, camera: Camera, *, encode: bool = True) -> Query:
        """The details of B photos, moved to the pictures that V cameras each would take of the heads shown.

        Args:
            source: says which these are: as :meth:`source` gives it, or :meth:`edited`.
            camera: B * V cameras, V for each photo.
            encode: whether E1 is asked for the details of the moved residuals.

        Raises:
            ValueError: without an aligner, or when the number of cameras is no multiple of B.
        """
        if self.aligner is None:
            raise ValueError("details cannot be aligned to other pictures without an aligner")
        if len(camera) % len(source):
            raise ValueError(f"{len(camera)} cameras for {len(source)} photos: their number must be a multiple")
        views = len(camera) // len(source)
        expression = source.expression.repeat_interleave(views, 0)
        coarse, depth, _ = self._coarse(generator, source.ws.repeat_interleave(views), camera, expression)
        residual = self.aligner(source.residual.repeat_interleave(views, 0), coarse)  # Delta'_edit
        return Query(camera, coarse, depth, residual, self._encode(residual, depth) if encode else None)

    def edit(self, generator: RadianceGenerator, source: Source, camera: Camera | None = None) -> PixelAlignment:
        """What shows heads with their details: :meth:`PixelAlignment.synthesis`, or as an ``edit``.

        As the latter, with details that are aligned to several cameras for each photo, it is for generators that ask
        for all points of these at once, as StyleSDF does.

        Args:
            source, camera: as of :meth:`query`; None are the photos' own.
        """
        if self.alignment == "3d":
            return PixelAlignment(self, source, None)
        return PixelAlignment(self, source, self.query(generator, source, source.camera if camera is None else camera))

    def _coarse(
        self, generator: RadianceGenerator, ws: Latents, camera: Camera, expression: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The pictures (B, 3, S, S) before any super-resolution, and depth and limit as of :class:`Source`.

        Without gradient: generator and codes stand still while details are learnt.

        Raises:
            ValueError: when the generator gives no depth.
        """
        with torch.no_grad():
            seen = generator.synthesis(ws, camera, expression=expression if generator.expressions else None)
            if seen.depth is None or seen.alpha is None:
                raise ValueError(f"{type(generator).__name__} gives no depth, which details are read with")
            far = torch.full_like(seen.depth, generator.rig.far)
            depth = torch.lerp(far, seen.depth, seen.alpha)
            # The farthest of the neighbours: at the border of a nearer part a point still counts as seen.
            limit = F.max_pool2d(torch.where(seen.alpha > 0.5, seen.depth, far), 3, 1, 1)
            picture = sized(seen.image if seen.raw is None else seen.raw, self.resolution)
            return picture, depth, limit + HIDDEN * generator.rig.scale

    def _encode(self, residual: Tensor, depth: Tensor) -> Tensor:
        """E1 with depth (B, 1, h, w) at any size: (B, C, S / 4, S / 4)."""
        return self.local_encoder(residual, sized(depth, self.resolution))

    # -- what a point finds --------------------------------------------------------------------------------------------

    def local(self, points: Tensor, source: Source, query: Query | None) -> Tensor:
        """f_L, f_ADA or both fused, without positional encoding: (R, P, C) at world points (R, P, 3).

        Args:
            source: of R photos. query: with R cameras, or V times as many.
        """

        def found_in(details: Tensor | None, camera: Camera, points: Tensor) -> Tensor:
            assert details is not None
            return pixel_features(details.to(points.dtype), camera, points)

        if query is None:
            found = found_in(source.details, source.camera, points)  # F_L(pi(x)) of Eq. 8
            return found.where(visible(points, source), 0.0) if self.occlusion else found
        rows = points.reshape(len(query.camera), -1, 3)
        aligned = found_in(query.details, query.camera, rows).reshape(*points.shape[:2], -1)
        if self.alignment_fusion is None:
            return aligned
        if self.alignment_fusion.init_args["visibility"]:
            surface = surface_points(rows, query).reshape(points.shape)
            seen = visible(surface, source) if self.occlusion else within(surface, source.camera)
            aligned = torch.cat([aligned, seen.to(aligned.dtype)], -1)
        return self.alignment_fusion(found_in(source.details, source.camera, points), aligned)  # Eq. 9


class PixelAlignedGenerator(PhotoGenerator):
    """Renders as ``coarse`` does, with the details of one photo.

    What is read from pictures is read without gradient, and from the photo once; its details move with other codes and
    expressions where there is an aligner. Points that are asked for without a camera, by ``features`` and ``bake``,
    find what is aligned to the photo's own.

    Args:
        coarse: the generator that the photo was inverted with.
        local: finds and aligns the details.
        photo: the photo, with its codes and camera; exactly one.

    Raises:
        ValueError: for another number of photos, or networks that do not fit.
    """

    def __init__(self, coarse: RadianceGenerator, local: LocalNetworks, photo: PhotoSet) -> None:
        super().__init__(coarse, photo)
        local.check(coarse)
        self.local = local
        self._source: tuple[Hashable, Source] | None = None
        self._shown: tuple[Source, Source] | None = None

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.local.eval()  # one photo says nothing about the statistics of a batch
        return self

    @property
    def source(self) -> Source:
        """What the photo has beyond its reconstruction; read again whenever a weight has changed."""
        tensors = chain(self.parameters(), self.buffers())
        key = tuple((t.data_ptr(), t._version, t.device) for t in tensors)
        if self._source is None or self._source[0] != key:
            own = self.photo[self.photo.ids[0]]
            assert own.camera is not None
            expression = own.expression if self.expressions else None
            with torch.no_grad():
                found = self.local.source(self.coarse, own.latents, self.photo.image, own.camera, expression)
            self._source = key, found
        return self._source[1]

    def _aligned(self, ws: Latents, camera: Camera | None, expression: Tensor | None, rows: int) -> PixelAlignment:
        """For heads of ``rows`` codes; ``camera`` as of :meth:`LocalNetworks.edit`."""
        source = self.source
        own, codes = source.repeat_interleave(rows), ws.repeat_interleave(rows // len(ws))
        expression = _full(self, expression, own.residual)
        held = self._shown  # of a turning head the next picture asks for the same again
        with torch.no_grad():
            if (
                held is None
                or held[0] is not source
                or len(held[1]) != rows
                or differ(held[1], codes, expression).any()
            ):
                still = codes.map(lambda t: t.detach().clone()), expression.detach().clone()
                held = self._shown = source, self.local.edited(self.coarse, own, *still)
            aligned = self.local.edit(self.coarse, held[1], camera)
        return replace(aligned, source=replace(held[1], ws=codes, expression=expression))

    def features(self, ws: Latents, points: Tensor, expression: Tensor | None = None) -> Tensor:
        found = self.coarse.features(ws, points, expression)
        return self._aligned(ws, None, expression, len(ws))(points, found)

    def bake(
        self,
        ws: Latents,
        size: int,
        *,
        expression: Tensor | None = None,
        edit: Edit | None = None,
        stride: int = 4,
    ) -> BakedHead | None:
        aligned = self._aligned(ws, None, expression, len(ws))

        def fused(points: Tensor, features: Tensor) -> Tensor:
            found = aligned(points, features)
            return found if edit is None else edit(points, found)

        return self.coarse.bake(ws, size, expression=expression, edit=fused, stride=stride)

    def synthesis(
        self,
        ws: Latents,
        camera: Camera | None = None,
        *,
        expression: Tensor | None = None,
        edit: Edit | None = None,
        randomness: torch.Generator | Tensor | None = None,
        taps: Sequence[str] = (),
        resolution: int | None = None,
    ) -> Rendering:
        self.check_taps(taps)
        camera, rows = self.check_views(ws, camera, expression)
        aligned = self._aligned(ws, camera, expression, rows)
        return aligned.synthesis(
            self.coarse, camera, edit=edit, randomness=randomness, taps=taps, resolution=resolution
        )


def sized(rendering: Tensor, side: int) -> Tensor:
    """Renderings (B, C, H, W) as (B, C, side, side), as the released networks see them: enlarged pixel by pixel.

    Larger ones, and photos of any size, are :func:`models.image.resized`.
    """
    if max(rendering.shape[-2:]) < side:
        return F.interpolate(rendering, (side, side), mode="nearest")
    return resized(rendering, side)


def visible(points: Tensor, source: Source) -> Tensor:
    """Whether world points (B, P, 3) are within their photo and not behind what it shows there: (B, P, 1)."""
    uv, depth = source.camera.project(points)
    return within(points, source.camera) & (depth[..., None] < _nearest(source.limit, uv))


def surface_points(points: Tensor, query: Query) -> Tensor:
    """The surface that cameras see on their rays through world points (C, P, 3), one row a camera: (C, P, 3)."""
    uv, _ = query.camera.project(points)
    origins, directions = query.camera.rays_at(uv)
    return origins + _nearest(query.depth, uv) * directions


def _nearest(image: Tensor, uv: Tensor) -> Tensor:
    """The pixel of (B, C, H, W) at each of (B, P, 2) in [0, 1], of the border outside: (B, P, C)."""
    grid = (2 * uv - 1)[:, :, None].to(image.dtype)
    return F.grid_sample(image, grid, mode="nearest", padding_mode="border", align_corners=False)[..., 0].mT


def differ(source: Source, ws: Latents, expression: Tensor) -> Tensor:
    """Which of B heads have other codes, or another expression, than those that ``source`` shows: (B,)."""
    pairs = [(expression, source.expression)]
    pairs += [(codes, source.ws.groups[name]) for name, codes in ws.groups.items()]
    found = torch.zeros(len(source), dtype=torch.bool, device=source.residual.device)
    for one, other in pairs:
        if one is not other:
            found = found | (one != other).flatten(1).any(1)
    return found


def _full(generator: RadianceGenerator, expression: Tensor | None, like: Tensor) -> Tensor:
    """(B, E), zeros where none is given: neutral."""
    return like.new_zeros(len(like), len(generator.expressions)) if expression is None else expression
