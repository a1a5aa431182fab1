"""Radiance-manifold generator: efficient GRAM.

Source: GRAMInverter (Deng et al., 2023), Sec. 3.1 and A.3; GRAM (Deng et al., 2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models.camera import Camera
from models.generators.backbone import StyleBackbone
from models.generators.baked import BakedHead, grow
from models.generators.base import ParameterGroup
from models.generators.fields import FrontalChart, HeadChart, TextureStack
from models.generators.painted import PaintedGenerator, Painting, over_chart
from models.generators.triplane import TriPlaneField
from models.latents import Latents
from models.rendering.atlas import Atlas, Chart, flatten, texel_centres
from models.rendering.compositing import composite_layers, density_alpha, depth_normals
from models.rendering.manifolds import (
    CrossingCache,
    Crossings,
    ManifoldPredictor,
    first_crossings,
    upsample_crossings,
)
from models.rendering.output import Edit, FieldSample, Rendering
from models.rendering.pointwise import in_chunks

BAKED_POINTS = 2**19  # of the field, asked at once: bounds memory
FIELDS = ("textures", "triplane")
FLATTENINGS = ("head", "frontal")


class ManifoldGenerator(PaintedGenerator):
    """Rays composite the radiance at their first crossings of the level sets of a manifold predictor.

    ``field="triplane"`` is the paper's: a painted tri-plane, decoded at the crossings. ``field="textures"`` paints
    one chart texture per manifold instead, which needs neither the three lookups nor a decoder per point.

    Args:
        z_dim: size of z.
        field: one of ``FIELDS``.
        levels: level values of the predictor, from the outermost (largest) to the innermost.
        thickness: optical thickness of one manifold: opacity = 1 - exp(-density * thickness).
        predictor: arguments of :class:`ManifoldPredictor`.
        triplane: arguments of :class:`TriPlaneField`. The cube is around the middle of the rig's cameras.
        background: as of :class:`PaintedGenerator`, or "shared" (Sec. C): an opaque plane with the tri-plane's own
            radiance, which closes the back of its cube and hides what lies behind.
        intersection_stride: crossings are found on an image this many times smaller, then upsampled (4 in A.3);
            upsampling loses crossings along silhouettes, the fewer the larger the image.
        samples: samples per ray in the crossing search.
        bake_predictor: search on a baked grid; the predictor then gets no gradient from rendering.
        flattening: how :meth:`atlas` lays out the manifolds: "head" (on the chart) or "frontal" (on a square that
            covers what the rig's cameras frame, for manifolds that do not close around a head).
        options: of :class:`PaintedGenerator`.

    Raises:
        ValueError: when ``levels`` do not decrease, ``field`` or ``flattening`` is unknown, or textures are asked for a
            shared background or another than the light backbone.
    """

    levels: Tensor
    middle: Tensor

    def __init__(
        self,
        z_dim: int,
        field: str = "textures",
        levels: Sequence[float] = (0.2, 0.1, 0.0, -0.1),
        thickness: float = 1.0,
        predictor: dict[str, Any] | None = None,
        triplane: dict[str, Any] | None = None,
        chart: dict[str, Any] | None = None,
        background: str = "separate",
        intersection_stride: int = 1,
        samples: int = 48,
        bake_predictor: bool = True,
        flattening: str = "head",
        **options: Any,
    ) -> None:
        if list(levels) != sorted(levels, reverse=True) or len(levels) < 2:
            raise ValueError("levels must decrease: the outermost manifold comes first")
        if field not in FIELDS:
            raise ValueError(f"field must be one of {FIELDS}, got {field!r}")
        if flattening not in FLATTENINGS:
            raise ValueError(f"flattening must be one of {FLATTENINGS}, got {flattening!r}")
        shared = background == "shared"
        if field == "textures" and (shared or options.get("backbone", "light") != "light"):
            raise ValueError("field='textures' has no shared background, and is painted by the light backbone")
        planes = TriPlaneField(**(triplane or {})) if field == "triplane" else None
        stack = TextureStack(len(levels), thickness)
        background = "none" if shared else background
        super().__init__((planes or stack).channels, z_dim, chart=chart, background=background, **options)
        self.planes, self.stack, self.thickness, self.shared = planes, stack, thickness, shared
        self.chart = HeadChart(**(chart or {}))
        self.predictor = ManifoldPredictor(**(predictor or {}))
        self.register_buffer("levels", torch.tensor([float(v) for v in levels]))
        self.intersection_stride, self.samples, self.bake_predictor = intersection_stride, samples, bake_predictor
        self._cache: CrossingCache[Crossings] = CrossingCache()
        self._atlases: CrossingCache[Atlas] = CrossingCache()
        self.layout: Chart = self.chart
        if flattening == "frontal":
            self.layout = FrontalChart(self.rig.pivot, self.rig.frame * self.rig.far / self.rig.radius / 2)
        middle = self.rig.pivot if self.rig.centre is None else self.rig.centre
        self.register_buffer("middle", torch.tensor(middle), persistent=False)
        if isinstance(self.backbone, StyleBackbone) and planes is None:
            # A clean and faint start: one shared colour, and every manifold lets most light through, so that all
            # of them receive gradient.
            with torch.no_grad():
                for out in self.backbone.outs:
                    out.weight[TextureStack.SHARED :] = 0  # type: ignore[index, operator]
                self.backbone.out_bias[TextureStack.SHARED + 3 :: TextureStack.CHANNELS] = -2.0
        if self.expressions:
            width = planes.features if planes else stack.channels
            self.ambient_out = nn.Linear(self.expression_field.ambient.out_channels, width, bias=False)

    def parameter_groups(self) -> dict[str, ParameterGroup]:
        """As :meth:`PaintedGenerator.parameter_groups`, and "predictor" unless it is baked (rates of A.4)."""
        groups = super().parameter_groups()
        manifolds = list(self.predictor.parameters())
        apart = {id(p) for p in manifolds}
        groups["main"] = ParameterGroup([p for p in groups["main"].parameters if id(p) not in apart])
        return groups if self.bake_predictor else {**groups, "predictor": ParameterGroup(manifolds, 2e-5 / 2.5e-3)}

    # -- the field -----------------------------------------------------------------------------------------------

    def paint(
        self, ws: Latents, expression: Tensor | None = None, randomness: torch.Generator | Tensor | None = None
    ) -> Painting:
        painting = super().paint(ws, expression, randomness)
        if self.planes is not None:
            return painting
        painted = painting.map
        if painting.ambient is not None:
            # Textures live on the chart as the ambient channels do: they are added once, before any lookup.
            ambient = painting.ambient
            added = (self.ambient_out.weight.to(ambient.dtype) @ ambient.flatten(2)).unflatten(2, ambient.shape[2:])
            painted = painted.repeat_interleave(len(added) // len(painted), 0) + added
        return painting._replace(map=self.stack.unfold(painted), ambient=None)

    def layer_index(self, points: Tensor) -> Tensor:
        """Fractional manifold index (...) of world points (..., 3), clamped to the outermost and innermost."""
        return self._layer_index(self.predictor(points))

    def _layer_index(self, scalar: Tensor) -> Tensor:
        after = torch.searchsorted(-self.levels, -scalar.detach().contiguous()).clamp(1, len(self.levels) - 1)
        low, high = self.levels[after - 1], self.levels[after]
        return (after - 1 + (low - scalar) / (low - high)).clamp(0, len(self.levels) - 1)

    def features(self, ws: Latents, points: Tensor, expression: Tensor | None = None) -> Tensor:
        painting = self.paint(ws, self.check_expression(expression, len(ws)))
        if self.planes is not None:
            return self._on_planes(self.planes, painting, points, self.chart(points))
        uv = self.chart(points)
        if painting.shift is not None:
            uv = uv + over_chart(painting.shift, uv)
        return self.stack.at(painting.map, uv, self.layer_index(points))

    def _on_planes(self, planes: TriPlaneField, painting: Painting, points: Tensor, uv: Tensor) -> Tensor:
        """Tri-plane features (B, P, C) at world points (B, P, 3) with chart coordinates (B, P, 2)."""
        painted = painting.map
        if len(points) > len(painted):
            painted = painted.repeat_interleave(len(points) // len(painted), 0)
        if painting.shift is None or painting.ambient is None:
            return planes.at(painted, points - self.middle)
        shift = over_chart(painting.shift, uv)
        # The difference of two displacements: where the chart ends a zero shift must still move nothing.
        moved = points + self.chart.displace(points, shift) - self.chart.displace(points, torch.zeros_like(shift))
        return planes.at(painted, moved - self.middle) + self.ambient_out(over_chart(painting.ambient, uv))

    def decode(self, features: Tensor, directions: Tensor | None = None) -> FieldSample:
        if self.planes is None:
            return self.stack.decode(features)
        found = self.planes.decode(features)
        assert found.density is not None
        return FieldSample(
            colour=found.colour,
            density=found.density,
            occupancy=density_alpha(found.density, found.density.new_tensor(self.thickness)),
        )

    # -- the manifolds, flattened ----------------------------------------------------------------------------------

    def atlas(self, size: int) -> Atlas:
        """Points of a ``size`` x ``size`` grid on each manifold; without gradient, cached unless the predictor learns.

        The grid is that of :meth:`on_atlas`.
        """
        state = (self.predictor.version, self.levels._version, self.levels.data_ptr(), size)
        make = lambda: flatten(self.predictor.baked(), self.levels, self.layout, size, extent=self.predictor.extent)  # noqa: E731
        return self._atlases.get(state, make)

    def on_atlas(self, points: Tensor) -> Tensor:
        """World points (..., 3) to coordinates (u, v, manifold) (..., 3) in [-1, 1] of a volume (B, C, N, H, W).

        For ``grid_sample(align_corners=False)``. The manifold is looked up on the baked predictor, without gradient.
        """
        index = self._layer_index(self.predictor.baked()(points.detach()))
        return torch.cat([self.layout(points), ((2 * index + 1) / len(self.levels) - 1)[..., None]], -1)

    # -- the plane of a shared background ------------------------------------------------------------------------

    @property
    def has_plane(self) -> bool:
        """Whether there is one."""
        return self.planes is not None and self.shared

    def _square(self, planes: TriPlaneField) -> list[float]:
        """Its middle, x, y and z, and half its side, world units: the back of the tri-plane's cube."""
        x, y, z = self.middle.tolist()
        return [x, y, z - planes.extent, planes.extent]

    def plane_grid(self, size: int) -> Tensor:
        """World points (size, size, 3) of a regular grid on it."""
        assert self.planes is not None
        x, y, z, reach = self._square(self.planes)
        u, v = (reach * texel_centres(size, size, self.levels.device)).unbind(-1)
        return torch.stack([x + u, y - v, torch.full_like(u, z)], -1)

    def on_plane(self, points: Tensor) -> Tensor:
        """World points (..., 3) to coordinates (u, v, 0) (..., 3), those of the grid in [-1, 1]."""
        assert self.planes is not None
        x, y, _, reach = self._square(self.planes)
        u, v = (points[..., 0] - x) / reach, (y - points[..., 1]) / reach
        return torch.stack([u, v, torch.zeros_like(u)], -1)

    def behind(self, camera: Camera, resolution: int) -> tuple[Tensor, Tensor]:
        """Where the pixels' rays meet it: camera-z (C, P), far where they never do, and world points (C, P, 3); beyond
        the cube its border goes on.
        """
        assert self.planes is not None
        origins, directions = camera.rays(resolution)
        depth, extent = self._plane_depth(self.planes, origins, directions), self.planes.extent
        points = origins + depth[..., None] * directions
        return depth, self.middle + (points - self.middle).clamp(-extent, extent)

    @torch.no_grad()
    def bake(
        self,
        ws: Latents,
        size: int,
        *,
        expression: Tensor | None = None,
        edit: Edit | None = None,
        background_edit: Edit | None = None,
        stride: int = 4,
    ) -> BakedHead:
        if len(ws) != 1:
            raise ValueError(f"one head at a time is baked, got {len(ws)} codes")
        atlas = self.atlas(size)
        radiance = []
        for points in atlas.points[atlas.valid].split(BAKED_POINTS):
            features = self.features(ws, points[None], expression)
            sample = self.decode(features if edit is None else edit(points[None], features))
            assert sample.occupancy is not None
            radiance.append(torch.cat([sample.colour, sample.occupancy], -1)[0].float())
        plane = None
        if self.planes is not None and self.shared:  # the background is the back of the planes' cube
            plane = self._square(self.planes)
        head = BakedHead(
            self.predictor, self.layout, self.levels.tolist(), size, self.rig, self.resolution, stride, self.samples,
            plane,
        )  # fmt: skip
        textures = head.textures.to(atlas.points.device).movedim(1, -1)
        textures[atlas.valid] = torch.cat(radiance)
        head.textures = grow(textures.movedim(-1, 1), atlas.valid[:, None].float())
        if plane is None:
            head.backdrop = self.backdrop(ws, size).float()
        else:
            points = self.plane_grid(size).reshape(1, -1, 3)
            features = self.features(ws, points, expression)
            colour = self.decode(features if background_edit is None else background_edit(points, features)).colour
            head.backdrop = colour.float().mT.reshape(1, 3, size, size)
        return head.to(atlas.points.device).eval()

    # -- rendering -----------------------------------------------------------------------------------------------

    def crossings(self, camera: Camera, resolution: int) -> Crossings:
        """Where the pixels' rays first meet each manifold; fp32, cached unless the predictor learns."""
        pixels = resolution * resolution
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.predictor.parameters())
        if learns and not self.bake_predictor:
            return Crossings.stack([self._search(camera[i], resolution) for i in range(len(camera))], pixels)
        state = (self.predictor.version, self.levels._version, self.levels.data_ptr(), resolution)
        keys = [bytes(label) for label in camera.label().detach().float().cpu().numpy()]
        with torch.no_grad():
            found = [
                self._cache.get((key, state), lambda i=i: self._search(camera[i], resolution))
                for i, key in enumerate(keys)
            ]
        return Crossings.stack(found, pixels)

    def _search(self, camera: Camera, resolution: int) -> Crossings:
        """Crossings of one camera, without the rays that meet nothing."""
        scalar = self.predictor.baked() if self.bake_predictor else self.predictor
        side = math.ceil(resolution / self.intersection_stride)
        origins, directions = camera.rays(side)
        depth, valid = first_crossings(
            scalar, origins, directions, self.levels, near=self.rig.near, far=self.rig.far, samples=self.samples
        )
        depth, valid = upsample_crossings(depth, valid, side, resolution)
        if self.planes is not None and self.shared:
            valid = valid & (depth < self._plane_depth(self.planes, *camera.rays(resolution))[..., None])
        pixel = valid[0].any(-1).nonzero()[:, 0]
        found = Crossings(pixel[None], depth[:, pixel], valid[:, pixel])
        if self.planes is not None and not self.expressions:
            return found
        return replace(found, uv=self.chart(found.points(camera, resolution)))

    def _plane_depth(self, planes: TriPlaneField, origins: Tensor, directions: Tensor) -> Tensor:
        """Camera-z (C, P) at which rays meet the back of the planes' cube; far away where they never do."""
        behind = origins[..., 2] - (self.middle[2] - planes.extent)
        return behind / (-directions[..., 2]).clamp_min(1e-3)

    def _plane(self, planes: TriPlaneField, painting: Painting, camera: Camera, side: int, edit: Edit | None) -> Tensor:
        """The image (C, 3, side, side) of the shared background."""

        def seen(points: Tensor) -> Tensor:
            features = planes.at(painting.map, points - self.middle)
            return planes.decode(features if edit is None else edit(points, features)).colour

        points = self.behind(camera, side)[1].reshape(len(painting.map), -1, 3)
        colour = in_chunks(seen, points, planes.width)
        return colour.reshape(len(camera), side, side, 3).permute(0, 3, 1, 2)

    def _radiance(
        self, painting: Painting, hits: Crossings, camera: Camera, side: int, rows: int, edit: Edit | None
    ) -> Tensor:
        """Colour and opacity (rows, P, 4) at the crossings of all views of each row; fp32."""
        uv = None if hits.uv is None else hits.uv.reshape(rows, -1, 2)
        points = None
        if self.planes is not None or edit is not None:
            points = hits.points(camera, side).reshape(rows, -1, 3)

        def decoded(features: Tensor, points: Tensor | None) -> Tensor:
            if edit is not None and points is not None:
                features = edit(points, features)
            sample = self.decode(features)
            assert sample.occupancy is not None
            return torch.cat([sample.colour.float(), sample.occupancy], -1)

        if self.planes is None or points is None:
            assert uv is not None
            if painting.shift is not None:
                uv = uv + over_chart(painting.shift, uv)
            grid = uv.reshape(rows, -1, hits.depth.shape[-1], 2)
            return decoded(self.stack.on_manifolds(painting.map, grid).flatten(1, 2), points)
        planes = self.planes

        def at(places: Tensor) -> Tensor:
            points, uv = places[..., :3], places[..., 3:]
            return decoded(self._on_planes(planes, painting, points, uv), points)

        places = points if uv is None else torch.cat([points, uv], -1)
        # A graph would hold all chunks together anyway.
        return at(places) if torch.is_grad_enabled() else in_chunks(at, places, planes.width)

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
        background_edit: Edit | None = None,
    ) -> Rendering:
        """As :meth:`Generator.synthesis`; ``background_edit`` is ``edit`` for the plane of a shared background."""
        self.check_taps(taps)
        camera, rows = self.check_views(ws, camera, expression)
        size, cameras = resolution or self.resolution, len(camera)
        painting = self.paint(ws, expression, randomness)
        with torch.autocast(camera.device.type, enabled=False):
            hits = self.crossings(camera, size)
        layers = hits.depth.shape[1:]
        found = self._radiance(painting, hits, camera, size, rows, edit).reshape(cameras, *layers, 4)
        colour, alpha = found[..., :3], found[..., 3:] * hits.valid[..., None]
        # A ray from outside meets larger levels first: crossings come in order and need no sorting (Eq. 2).
        depth = hits.depth[..., None] - self.rig.radius  # centred, for the precision of the squares
        blended, alpha, depth = composite_layers(torch.cat([colour, depth.square()], -1), alpha, depth)
        rays = torch.cat([blended, alpha, depth], -1)
        maps = hits.scatter(rays, size * size).mT.unflatten(2, (size, size))
        colour, square, alpha, depth = maps.split((3, 1, 1, 1), 1)
        seen = (alpha > 0).to(alpha.dtype)
        spread = (square / alpha.clamp_min(1e-6) - depth.square()).clamp_min(0) * seen
        depth = (depth + self.rig.radius) * seen
        if self.planes is not None and self.shared:
            backdrop = self._plane(self.planes, painting, camera, size, background_edit)
        else:
            backdrop = self.backdrop(ws, size).repeat_interleave(cameras // len(ws), 0)
        return Rendering(
            image=colour + (1 - alpha) * backdrop,
            depth=depth,
            alpha=alpha,
            spread=spread,
            normals=depth_normals(depth.detach(), alpha.detach(), camera),
            taps={name: painting.taps[name] for name in taps},
        )
