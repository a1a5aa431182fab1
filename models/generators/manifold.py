"""Radiance-manifold generator: efficient GRAM, with one chart texture per manifold.

Source: GRAMInverter (Deng et al., 2023), Sec. 3.1 and A.3; GRAM (Deng et al., 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.camera import Camera, Rig
from models.generators.backbone import StyleBackbone
from models.generators.base import Edit, FieldSample, Latents, RadianceGenerator, Rendering
from models.generators.deformation import ExpressionField
from models.generators.fields import HeadChart, TextureStack
from models.generators.layers import EqualLinear, MappingNetwork
from models.rendering.compositing import composite_layers, depth_normals
from models.rendering.manifolds import CrossingCache, Crossings, ManifoldPredictor, first_crossings, upsample_crossings


class ManifoldGenerator(RadianceGenerator):
    """Style codes paint one texture per level set of a manifold predictor; rays composite the first crossings.

    The paper paints a tri-plane and decodes it at the crossings; painting the textures themselves needs neither
    the three lookups nor the decoder per point.

    Args:
        z_dim: size of z. num_expressions names come from ``expressions``.
        levels: level values of the predictor, from the outermost (largest) to the innermost.
        channels: backbone channels from the smallest block to the largest.
        start: side of the smallest block.
        mapping_layers, mapping_hidden: of the mapping network.
        normalize_z: as StyleGAN; off where the length of z carries meaning.
        lr_multiplier: of mapping network and affines.
        predictor: arguments of :class:`ManifoldPredictor`. chart: of :class:`HeadChart`. rig: of :class:`Rig`.
        expression_tap: backbone block whose features steer the expression field.
        background: "separate" (a small painted image behind the head) or "none" (white).
        intersection_stride: crossings are found on an image this many times smaller, then upsampled.
        samples: samples per ray in the crossing search.
        bake_predictor: search on a baked grid; the predictor then gets no gradient from rendering.
    """

    def __init__(
        self,
        z_dim: int,
        resolution: int = 64,
        w_dim: int = 128,
        levels: Sequence[float] = (0.2, 0.1, 0.0, -0.1),
        channels: Sequence[int] = (128, 96, 64, 32),
        start: int = 12,
        mapping_layers: int = 3,
        mapping_hidden: int = 192,
        normalize_z: bool = True,
        lr_multiplier: float = 1.0,
        thickness: float = 1.0,
        expressions: Sequence[str] = (),
        expression_tap: str | None = None,
        ambient: int = 24,
        background: str = "separate",
        background_channels: Sequence[int] = (32, 32, 24, 16),
        predictor: dict[str, Any] | None = None,
        chart: dict[str, Any] | None = None,
        rig: dict[str, Any] | None = None,
        intersection_stride: int = 1,
        samples: int = 48,
        bake_predictor: bool = True,
    ) -> None:
        super().__init__()
        if list(levels) != sorted(levels, reverse=True):
            raise ValueError("levels must decrease: the outermost manifold comes first")
        if background not in ("separate", "none"):
            raise ValueError(f"background must be separate or none, got {background!r}")
        self.z_dim, self.resolution, self.w_dim = z_dim, resolution, w_dim
        self.expressions = tuple(expressions)
        self.rig = Rig(**(rig or {}))
        self.chart = HeadChart(**(chart or {}))
        self.stack = TextureStack(len(levels), thickness)
        self.predictor = ManifoldPredictor(**(predictor or {}))
        self.register_buffer("levels", torch.tensor([float(v) for v in levels]))
        self.intersection_stride, self.samples, self.bake_predictor = intersection_stride, samples, bake_predictor
        self._cache = CrossingCache()

        self.map_network = MappingNetwork(
            z_dim, w_dim, layers=mapping_layers, hidden=mapping_hidden, normalize=normalize_z, lr_multiplier=lr_multiplier
        )
        self.backbone = StyleBackbone(w_dim, channels, self.stack.channels, start=start, lr_multiplier=lr_multiplier)
        # A faint start: every manifold lets most light through, so that all of them receive gradient.
        with torch.no_grad():
            self.backbone.out_bias[TextureStack.CHANNELS - 1 :: TextureStack.CHANNELS] = -2.0
        self.side = self.backbone.sides[-1]
        self.background = None
        self.num_ws = self.backbone.num_ws
        if background == "separate":
            self.background = StyleBackbone(w_dim, background_channels, 3, start=4, lr_multiplier=lr_multiplier)
            self.num_ws += 1  # one code paints the background
        if self.expressions:
            self.expression_tap = expression_tap or self.backbone.tap_names[-2]
            width = channels[self.backbone.tap_names.index(self.expression_tap)]
            self.expression_field = ExpressionField(len(self.expressions), width, ambient=ambient)
            self.ambient_out = nn.Conv2d(ambient, self.stack.channels, 1, bias=False)
        self.register_buffer("w_mean", torch.zeros(w_dim))

    # -- codes ---------------------------------------------------------------------------------------------------

    @property
    def mean_latents(self) -> Latents:
        return Latents({"ws": self.w_mean.expand(1, self.num_ws, -1)})

    @torch.no_grad()
    def update_mean(self, count: int = 10_000, seed: int = 0) -> None:
        """Set the mean code from ``count`` random z."""
        z = self.sample_z(count, torch.Generator().manual_seed(seed)).to(self.w_mean.device)
        self.w_mean.copy_(self.map_network(z).mean(0))

    def mapping(
        self, z: Tensor, *, camera: Camera | None = None, truncation: float = 1.0, cutoff: int | None = None
    ) -> Latents:
        w = self.map_network(z)
        latents = Latents({"ws": w if w.ndim == 3 else w[:, None].expand(-1, self.num_ws, -1)})
        return latents if truncation == 1 else latents.truncate(self.mean_latents, truncation, cutoff)

    @property
    def tap_names(self) -> tuple[str, ...]:
        return self.backbone.tap_names

    def affine_weights(self, layers: Sequence[int] | None = None) -> Tensor:
        affines = self.backbone.affines()
        chosen = affines if layers is None else [affines[i] for i in layers]
        return torch.cat([a.weight * a.scale for a in chosen if isinstance(a, EqualLinear)])

    # -- painting ------------------------------------------------------------------------------------------------

    def paint(self, ws: Latents, expression: Tensor | None = None) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Textures (B * V, levels * 4, S, S), chart shift (B * V, 2, S, S) or None, and the backbone's taps.

        Args:
            expression: (B * V, E), V codes per item; None paints neutral faces, once per item.
        """
        painted, taps = self.backbone(ws.groups["ws"][:, : self.backbone.num_ws])
        if expression is None:
            return painted, None, taps
        shift, ambient = self.expression_field(taps[self.expression_tap], expression, self.side)
        views = len(expression) // len(painted)
        return painted.repeat_interleave(views, 0) + self.ambient_out(ambient), shift, taps

    def _shifted(self, uv: Tensor, shift: Tensor | None) -> Tensor:
        """Chart coordinates (B, P, 2) after the expression's shift."""
        if shift is None:
            return uv
        moved = F.grid_sample(shift.float(), uv[:, :, None], align_corners=False, padding_mode="border")
        return uv + moved[..., 0].mT

    def layer_index(self, points: Tensor) -> Tensor:
        """Fractional manifold index (..., ) of world points; clamped to the outermost and innermost."""
        scalar = self.predictor(points)
        after = torch.searchsorted(-self.levels, -scalar.detach().contiguous()).clamp(1, len(self.levels) - 1)
        low, high = self.levels[after - 1], self.levels[after]
        return (after - 1 + (low - scalar) / (low - high)).clamp(0, len(self.levels) - 1)

    def features(self, ws: Latents, points: Tensor, expression: Tensor | None = None) -> Tensor:
        painted, shift, _ = self.paint(ws, self.check_expression(expression, len(ws)))
        return self.stack.at(painted, self._shifted(self.chart(points), shift), self.layer_index(points))

    def decode(self, features: Tensor, directions: Tensor | None = None) -> FieldSample:
        return self.stack.decode(features)

    # -- rendering -----------------------------------------------------------------------------------------------

    def crossings(self, camera: Camera, resolution: int) -> Crossings:
        """Where the pixels' rays first meet each manifold; fp32, cached unless the predictor learns."""
        pixels = resolution * resolution
        if not self.bake_predictor:
            return Crossings.stack([self._search(camera[i], resolution, self.predictor) for i in range(len(camera))], pixels)
        state = (self.predictor.version, self.levels._version, self.levels.data_ptr(), resolution)
        keys = [bytes(label) for label in camera.label().detach().cpu().numpy()]
        with torch.no_grad():
            found = [
                self._cache.get((key, state), lambda i=i: self._search(camera[i], resolution, self.predictor.baked()))
                for i, key in enumerate(keys)
            ]
        return Crossings.stack(found, pixels)

    def _search(self, camera: Camera, resolution: int, scalar: Callable[[Tensor], Tensor]) -> Crossings:
        """Crossings of one camera, without the rays that meet nothing."""
        side = math.ceil(resolution / self.intersection_stride)
        origins, directions = camera.rays(side)
        depth, valid = first_crossings(
            scalar, origins, directions, self.levels, near=self.rig.near, far=self.rig.far, samples=self.samples
        )
        depth, valid = upsample_crossings(depth, valid, side, resolution)
        pixel = valid[0].any(-1).nonzero()[:, 0]
        origins, directions = camera.rays(resolution)
        depth, valid = depth[:, pixel], valid[:, pixel]
        points = origins[:, pixel, None] + depth[..., None] * directions[:, pixel, None]
        return Crossings(pixel[None], depth, valid, self.chart(points))

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
        if camera is None:
            raise ValueError("a 3D generator needs a camera")
        batch, cameras = len(ws), len(camera)
        if cameras % batch:
            raise ValueError(f"{cameras} cameras for {batch} codes: their number must be a multiple")
        unknown = set(taps) - set(self.tap_names)
        if unknown:
            raise ValueError(f"unknown taps {sorted(unknown)}; this generator has {self.tap_names}")
        views, size = cameras // batch, resolution or self.resolution
        per_camera = expression is not None and len(expression) != batch
        self.check_expression(expression, cameras if per_camera else batch)
        painted, shift, found = self.paint(ws, expression)

        with torch.autocast(camera.device.type, enabled=False):
            hits = self.crossings(camera, size)
        shared = not per_camera and views > 1  # one texture lookup then serves all views of an item
        uv = hits.uv.flatten(1, 2)
        uv = self._shifted(uv.reshape(batch, -1, 2) if shared else uv, shift)
        features = self.stack.on_manifolds(painted, uv.reshape(len(uv), -1, self.stack.levels, 2))
        if edit is not None:
            flat = features.reshape(len(uv), -1, TextureStack.CHANNELS)
            features = edit(self._points(camera, hits, size).reshape(len(uv), -1, 3), flat)
        sample = self.stack.decode(features)
        assert sample.occupancy is not None
        layers = hits.depth.shape[1:]
        colour = sample.colour.float().reshape(cameras, *layers, 3)
        alpha = sample.occupancy.reshape(cameras, *layers, 1) * hits.valid[..., None]
        rays = torch.cat(composite_layers(colour, alpha, hits.depth[..., None]), -1)
        image = hits.scatter(rays, size * size).mT.reshape(cameras, -1, size, size)
        colour, alpha, depth = image.split((3, 1, 1), 1)
        normals = depth_normals(depth.detach(), alpha.detach(), camera)
        backdrop = self.backdrop(ws, size).repeat_interleave(views, 0)
        return Rendering(
            image=colour + (1 - alpha) * backdrop, raw=None, depth=depth, alpha=alpha, normals=normals,
            taps={name: found[name] for name in taps},
        )

    @staticmethod
    def _points(camera: Camera, hits: Crossings, size: int) -> Tensor:
        """World points (C, K, N, 3) of the crossings."""
        origins, directions = camera.rays(size)
        pixel = hits.pixel.clamp_max(size * size - 1)[..., None].expand(-1, -1, 3)  # padding looks anywhere
        origins, directions = origins.gather(1, pixel), directions.gather(1, pixel)
        return origins[:, :, None] + hits.depth[..., None] * directions[:, :, None]

    def backdrop(self, ws: Latents, resolution: int) -> Tensor:
        """The image behind the head (B, 3, R, R), attached to the screen as in a studio portrait."""
        if self.background is None:
            return ws.groups["ws"].new_ones(len(ws), 3, resolution, resolution)
        codes = ws.groups["ws"][:, -1:].expand(-1, self.background.num_ws, -1)
        painted, _ = self.background(codes)
        return torch.tanh(F.interpolate(painted, size=(resolution,) * 2, mode="bilinear", align_corners=False) / 2)
