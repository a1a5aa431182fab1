"""Volume generator: tri-planes, a small decoder and two-pass volume rendering.

Source: EG3D (Chan et al., 2022) without its super-resolution, on a lighter backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.camera import Camera
from models.generators.painted import PaintedGenerator, Painting, over_chart
from models.generators.triplane import TriPlaneField
from models.latents import Latents
from models.rendering.compositing import (
    composite_layers,
    density_alpha,
    depth_normals,
    layer_weights,
    resample,
    sample_edges,
    stratified_depths,
    uniform,
    widen,
)
from models.rendering.output import Edit, FieldSample, Rendering


class TriPlaneVolumeGenerator(PaintedGenerator):
    """Style codes paint three planes; rays integrate the density decoded from them.

    Args:
        coarse: samples per ray of the first pass, stratified over the rig's depth range.
        fine: samples per ray of the second pass, where the first found something; 0 leaves it out.
        field: arguments of :class:`TriPlaneField`.
        options: arguments of :class:`PaintedGenerator`: z_dim, resolution, channels, expressions, rig ...
    """

    pivot: Tensor

    def __init__(
        self, *, coarse: int = 24, fine: int = 24, field: dict[str, Any] | None = None, **options: Any
    ) -> None:
        planes = TriPlaneField(**(field or {}))
        super().__init__(map_channels=planes.channels, **options)
        self.coarse, self.fine = coarse, fine
        self.planes = planes
        self.register_buffer("pivot", torch.tensor(self.rig.pivot), persistent=False)
        if self.expressions:
            self.ambient_out = nn.Linear(self.expression_field.ambient.out_channels, planes.features, bias=False)

    def features(self, ws: Latents, points: Tensor, expression: Tensor | None = None) -> Tensor:
        return self._at(self.paint(ws, self.check_expression(expression, len(ws))), points)

    def decode(self, features: Tensor, directions: Tensor | None = None) -> FieldSample:
        return self.planes.decode(features)

    def _at(self, painting: Painting, points: Tensor) -> Tensor:
        """Features (R, P, C) at world points (R, P, 3); R rows are the codes, or V expressions of each."""
        painted = painting.map.repeat_interleave(len(points) // len(painting.map), 0)
        if painting.shift is None or painting.ambient is None:
            return self.planes.at(painted, points - self.pivot)
        uv = self.chart(points)
        shift = over_chart(painting.shift, uv)
        # The difference of two displacements: where the chart ends a zero shift must still move nothing.
        moved = points + self.chart.displace(points, shift) - self.chart.displace(points, torch.zeros_like(shift))
        return self.planes.at(painted, moved - self.pivot) + self.ambient_out(over_chart(painting.ambient, uv))

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
        """As :meth:`Generator.synthesis`; ``randomness`` jitters the samples along each ray.

        Given as a tensor it holds uniform numbers (cameras, pixels, coarse + fine). ``edit`` is called once per
        pass, with the points of all views of a code in one row.
        """
        self.check_taps(taps)
        camera, rows = self.check_views(ws, camera, expression)
        size, cameras = resolution or self.resolution, len(camera)
        near, far = self.rig.near, self.rig.far
        painting = self.paint(ws, expression, randomness)
        origins, directions = camera.rays(size)
        length = directions.norm(dim=-1)[..., None, None]  # depths are camera-z: the ray is longer by this factor

        def sample(depth: Tensor) -> tuple[Tensor, Tensor]:
            points = origins[:, :, None] + depth[..., None] * directions[:, :, None]
            points = points.reshape(rows, -1, 3)
            features = self._at(painting, points)
            if edit is not None:
                features = edit(points, features)
            found = self.decode(features)
            assert found.density is not None
            shape = (*depth.shape, -1)
            return found.colour.reshape(shape), found.density.reshape(shape)

        def opacity(density: Tensor, edges: Tensor) -> Tensor:
            return density_alpha(density, edges.diff(dim=-1)[..., None] * length)

        jitter = uniform((cameras, size * size, self.coarse + self.fine), randomness, camera.device)
        depth = stratified_depths((cameras, size * size), self.coarse, near, far, jitter[..., : self.coarse])
        colour, density = sample(depth)
        if self.fine:
            edges = sample_edges(depth, near, far)
            weights = layer_weights(opacity(density.detach(), edges))[..., 0]
            finer = resample(edges, widen(weights), jitter[..., self.coarse :])
            depth, order = torch.cat([depth, finer], -1).sort(-1)
            both = [torch.cat(pair, 2) for pair in zip((colour, density), sample(finer), strict=True)]
            colour, density = (x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1])) for x in both)
        alpha = opacity(density, sample_edges(depth, near, far))

        maps = composite_layers(colour, alpha, depth[..., None])
        colour, alpha, depth = (x.mT.unflatten(2, (size, size)) for x in maps)
        backdrop = self.backdrop(ws, size).repeat_interleave(cameras // len(ws), 0)
        return Rendering(
            image=colour + (1 - alpha) * backdrop,
            depth=depth,
            alpha=alpha,
            normals=depth_normals(depth.detach(), alpha.detach(), camera),
            taps={name: painting.taps[name] for name in taps},
        )
