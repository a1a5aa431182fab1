"""EG3D: a StyleGAN2 backbone paints three planes, a small decoder and volume rendering make a small picture of
features, and two more StyleGAN2 blocks enlarge it.

Source: EG3D (Chan et al., 2022). Its cameras and world axes are ours; its depths are distances along unit rays.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.camera import LABEL_SIZE, Camera, Rig
from models.generators.base import RadianceGenerator
from models.generators.fir import fir_kernel
from models.generators.layers import EqualLinear, MappingNetwork
from models.generators.stylegan2 import Noise, SynthesisBlock, SynthesisNetwork, full_precision
from models.generators.triplane import Axes, sample_planes
from models.latents import Latents
from models.rendering.compositing import (
    EMPTY,
    Randomness,
    density_alpha,
    depth_normals,
    inverse_cdf,
    layer_weights,
    uniform,
    widen,
)
from models.rendering.output import Edit, FieldSample, Rendering

RELEASED: Axes = ((0, 1), (0, 2), (2, 0))
"""xy, xz, zx: no plane holds yz. The official weights were trained with this slip and depend on it."""

RIG = {"radius": 2.7, "focal": 4.2647, "pivot": (0.0, 0.0, 0.2), "centre": (0.0, 0.0, 0.0), "near": 2.25, "far": 3.3}
"""FFHQ's: cameras on a sphere around the origin look at a point before it."""


CHUNK = 1 << 15
"""Samples taken at a time: CPUs spend half their time on fresh memory where these are many more."""


NOISE_MODES = ("none", "const", "random")


class Samples(NamedTuple):
    """One pass along V x P rays."""

    distance: Tensor
    """(V, P, N) along the ray, world units."""
    colour: Tensor
    """(V, P, N, C) in [0, 1]: RGB and further features."""
    sigma: Tensor
    """(V, P, N) density before the softplus."""


class Pixels(NamedTuple):
    """V x P rays, integrated."""

    colour: Tensor
    """(V, P, C), premultiplied."""
    alpha: Tensor
    """(V, P)."""
    distance: Tensor
    """(V, P) expected, 0 on empty rays."""


class ConditionalMapping(nn.Module):
    """z and a camera label to w (EG3D, Sec. 4.4).

    Args:
        label: size of the label; 0 takes none.
        embedding: size of its embedding.
        layers, hidden, lr_multiplier: of the MLP.
    """

    def __init__(
        self, z_dim: int, w_dim: int, *, label: int = LABEL_SIZE, embedding: int | None = None, layers: int = 2,
        hidden: int | None = None, lr_multiplier: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__()
        embedding = (embedding or w_dim) if label else 0
        self.embed = EqualLinear(label, embedding) if label else None
        self.network = MappingNetwork(
            z_dim + embedding, w_dim, layers=layers, hidden=hidden, normalize=False, lr_multiplier=lr_multiplier
        )

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        """z (B, z_dim) or (B, num_ws, z_dim), label (B, 25) -> w (..., w_dim)."""
        z = _normalized(z)
        if self.embed is not None:
            embedded = _normalized(self.embed(label))
            z = torch.cat([z, embedded if z.ndim == 2 else embedded[:, None].expand(-1, z.shape[1], -1)], -1)
        return self.network(z)


def _normalized(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-8)


class Decoder(nn.Module):
    """Plane features to density and colour features (EG3D, Sec. 4.1).

    Args:
        features: channels in and out. hidden: width. lr_multiplier: of both layers.
    """

    def __init__(self, features: int, hidden: int = 64, lr_multiplier: float = 1.0) -> None:
        super().__init__()
        self.hidden = EqualLinear(features, hidden, lr_multiplier=lr_multiplier)
        self.out = EqualLinear(hidden, 1 + features, lr_multiplier=lr_multiplier)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(..., features) -> colour (..., features) in [0, 1] up to 0.001, density before the softplus (...)."""
        raw = self.out(F.softplus(self.hidden(features)))
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        # Beyond [0, 1] by 0.001, as in mip-NeRF: the colours of an image are never saturated.
        colour = torch.add(raw.new_tensor(-0.001), torch.sigmoid(raw[..., 1:]), alpha=1 + 2 * 0.001)
        return colour, raw[..., 0]


class SuperResolution(nn.Module):
    """Two blocks that turn a small picture and its features into a large one (EG3D, Sec. 4.3).

    Args:
        in_channels: of the rendered features.
        channels: of the two blocks.
        resolution: of the result, pixels.
        factor: from the blocks' input to the result: 2 or 4, of which the second block does 2.
        antialias: when the input is resized to the blocks' side.
        noise: "none", "const" or "random": drawn wherever the caller draws.
        taps, clamp: see :class:`SynthesisNetwork`.

    Raises:
        ValueError: for another factor or noise.
    """

    kernel: Tensor

    def __init__(
        self, w_dim: int, in_channels: int, *, channels: Sequence[int] = (256, 128), resolution: int = 512,
        factor: int = 4, antialias: bool = True, noise: str = "none", taps: Sequence[float] = (1, 3, 3, 1),
        clamp: float | None = 256.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if factor not in (2, 4):
            raise ValueError(f"superresolution.factor must be 2 or 4, got {factor}")
        if noise not in NOISE_MODES:
            raise ValueError(f"superresolution.noise must be one of {NOISE_MODES}, got {noise!r}")
        self.channels = first, second = int(channels[0]), int(channels[1])
        self.resolution, self.side = resolution, resolution // factor
        self.antialias, self.noise, self.clamp = antialias, noise, clamp
        small = SynthesisBlock(in_channels, first, 3, w_dim, resolution // 2, upsample=factor == 4, clamp=clamp)
        self.blocks = nn.ModuleList([small, SynthesisBlock(first, second, 3, w_dim, resolution, clamp=clamp)])
        self.register_buffer("kernel", fir_kernel(taps), persistent=False)

    def forward(self, features: Tensor, w: Tensor, noise: Noise = "const") -> list[tuple[Tensor, Tensor]]:
        """Features and image after each block.

        Args:
            features: (B, in_channels, h, w); the first three are the small picture.
            w: (B, w_dim), for every layer.
            noise: where ``random`` noise comes from.
        """
        if features.shape[-1] != self.side:
            features = F.interpolate(
                features, (self.side, self.side), mode="bilinear", align_corners=False, antialias=self.antialias
            )
        x, image, ws = features, features[:, :3], w[:, None].expand(-1, 3, -1)
        found: list[tuple[Tensor, Tensor]] = []
        for block in self.blocks:
            x, image = block(x, image, ws, self.kernel, noise if self.noise == "random" else self.noise)
            found.append((x, image))
        return found


class EG3DGenerator(RadianceGenerator):
    """EG3D.

    Args:
        mapping: arguments of :class:`ConditionalMapping`.
        label_scale: factor on the camera label (``c_scale``); 0 hides the camera from the mapping.
        channels: of the backbone, from side 4 up.
        plane_features: channels of one plane.
        taps, clamp: of the backbone, see :class:`SynthesisNetwork`.
        axes: of the planes, see :data:`RELEASED`.
        box: side of the cube that the planes span, world units (``box_warp``).
        decoder: arguments of :class:`Decoder`.
        render_resolution: side of the small picture (``neural_rendering_resolution``).
        coarse, fine: samples a ray of the two passes; ``fine=0`` leaves the second out.
        disparity: space the coarse samples evenly in 1 / distance.
        white_back: what lies behind: white, or else black.
        superresolution: arguments of :class:`SuperResolution`.
        rig: arguments of :class:`Rig`; near and far are distances from the camera.

    Raises:
        ValueError: with fewer than four coarse samples, which leaves nothing to resample.
    """

    free_resolution = False
    w_avg: Tensor

    def __init__(
        self,
        *,
        z_dim: int = 512,
        w_dim: int = 512,
        mapping: dict[str, Any] | None = None,
        label_scale: float = 1.0,
        channels: Sequence[int] = (512, 512, 512, 512, 512, 256, 128),
        plane_features: int = 32,
        taps: Sequence[float] = (1, 3, 3, 1),
        clamp: float | None = None,
        axes: Axes = RELEASED,
        box: float = 1.0,
        decoder: dict[str, Any] | None = None,
        render_resolution: int = 128,
        coarse: int = 48,
        fine: int = 48,
        disparity: bool = False,
        white_back: bool = False,
        superresolution: dict[str, Any] | None = None,
        rig: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if coarse < 4:
            raise ValueError(f"coarse must be at least 4, got {coarse}")
        self.z_dim, self.w_dim, self.label_scale = z_dim, w_dim, label_scale
        self.axes, self.box, self.render_resolution = axes, box, render_resolution
        self.coarse, self.fine, self.disparity, self.white_back = coarse, fine, disparity, white_back
        self.rig = Rig(**{**RIG, **(rig or {})})
        self.map_network = ConditionalMapping(z_dim, w_dim, **(mapping or {}))
        self.backbone = SynthesisNetwork(w_dim, channels, len(axes) * plane_features, taps=taps, clamp=clamp)
        self.decoder = Decoder(plane_features, **(decoder or {}))
        self.superresolution = SuperResolution(w_dim, plane_features, **{"taps": taps, **(superresolution or {})})
        self.num_ws, self.resolution = self.backbone.num_ws, self.superresolution.resolution
        self.register_buffer("w_avg", torch.zeros(w_dim))

    # -- codes ---------------------------------------------------------------------------------------------------

    @property
    def mean_latents(self) -> Latents:
        return Latents({"ws": self.w_avg.expand(1, self.num_ws, -1)})

    @torch.no_grad()
    def update_mean(self, count: int = 10_000, seed: int = 0) -> None:
        """Set the mean code from ``count`` random z and cameras."""
        generator = torch.Generator().manual_seed(seed)
        z, camera = self.sample_z(count, generator), self.rig.random(count, generator)
        label = camera.label() * self.label_scale
        self.w_avg.copy_(self.map_network(z.to(self.w_avg), label.to(self.w_avg)).mean(0))

    def mapping(
        self, z: Tensor, *, camera: Camera | None = None, truncation: float = 1.0, cutoff: int | None = None
    ) -> Latents:
        """As :meth:`Generator.mapping`, conditioned on ``camera``, as many as codes; None is the frontal one."""
        if z.shape[1:] not in ((self.z_dim,), (self.num_ws, self.z_dim)):
            raise ValueError(f"z must be (B, {self.z_dim}) or (B, {self.num_ws}, {self.z_dim}), got {tuple(z.shape)}")
        if camera is not None and len(camera) != len(z):
            raise ValueError(f"{len(camera)} cameras to condition {len(z)} codes on: give one each")
        label = (camera or self.rig.camera(0.0)).label().to(z).expand(len(z), -1)
        w = self.map_network(z, label * self.label_scale)
        latents = Latents({"ws": w if w.ndim == 3 else w[:, None].expand(-1, self.num_ws, -1)})
        return latents if truncation == 1 else latents.truncate(self.mean_latents, truncation, cutoff)

    @property
    def tap_names(self) -> tuple[str, ...]:
        return (*(f"block{side}" for side in self.backbone.sides), "superresolution0", "superresolution1")

    def affine_weights(self, layers: Sequence[int] | None = None) -> Tensor:
        """As :meth:`Generator.affine_weights`, of the backbone's convolutions."""
        found = [layer.affine for block in self.backbone.blocks for layer in block.layers]  # type: ignore[union-attr]
        chosen = found if layers is None else [found[i] for i in layers]
        return torch.cat([affine.weight * affine.scale for affine in chosen])

    # -- field ---------------------------------------------------------------------------------------------------

    def features(self, ws: Latents, points: Tensor, expression: Tensor | None = None) -> Tensor:
        self.check_expression(expression, len(ws))
        _, painted = self.backbone(ws.ws)[-1]
        return self.at(painted, points)

    def at(self, painted: Tensor, points: Tensor) -> Tensor:
        """Features at world points (B, P, 3): the mean of the planes (B, planes * C, S, S) there, (B, P, C)."""
        planes = painted.unflatten(1, (len(self.axes), -1))
        return sample_planes(planes, points * (2 / self.box), self.axes).mean(1).mT

    def decode(self, features: Tensor, directions: Tensor | None = None) -> FieldSample:
        colour, sigma = self.decoder(features)
        return FieldSample(colour=colour[..., :3] * 2 - 1, density=F.softplus(sigma - 1)[..., None])

    # -- rays ----------------------------------------------------------------------------------------------------

    def march(
        self,
        painted: Tensor,
        origins: Tensor,
        directions: Tensor,
        *,
        jitter: Tensor | None = None,
        edit: Edit | None = None,
    ) -> list[Samples]:
        """Sample the field along unit rays, evenly and then where the first pass found something.

        Args:
            painted: (B, planes * C, S, S).
            origins, directions: (V, P, 3), V a multiple of B.
            jitter: (V, P, coarse + fine) uniform numbers; None puts the samples at equal steps and quantiles.

        Returns:
            the coarse and the fine pass; the latter's distances are in ascending order only without jitter.
        """

        def sample(distance: Tensor) -> Samples:
            points = origins[:, :, None] + distance[..., None] * directions[:, :, None]
            points = points.reshape(len(painted), -1, 3)
            features = self.at(painted, points)
            if edit is not None:
                features = edit(points, features)
            colour, sigma = self.decoder(features)
            return Samples(distance, colour.reshape(*distance.shape, -1), sigma.reshape(distance.shape))

        shape, near, far = origins.shape[:2], self.rig.near, self.rig.far
        steps = torch.linspace(0, 1, self.coarse, dtype=origins.dtype, device=origins.device).expand(*shape, -1)
        quantiles = torch.linspace(0, 1, self.fine, dtype=origins.dtype, device=origins.device).expand(*shape, -1)
        if jitter is not None:
            offsets, quantiles = jitter.split([self.coarse, self.fine], -1)
            steps = steps + offsets / (self.coarse - 1)
        if self.disparity:
            passes = [sample(1 / ((1 - steps) / near + steps / far))]
        else:
            passes = [sample(near + (far - near) * steps)]
        if self.fine:
            distance, _, sigma = passes[0]
            weights = widen(segment_weights(distance, sigma.detach()))
            # The official resampling pairs the inner weights with the borders one step nearer.
            edges = ((distance[..., 1:] + distance[..., :-1]) / 2)[..., :-1]
            passes.append(sample(inverse_cdf(edges, weights[..., 1:-1], quantiles)))
        return passes

    def render(
        self, painted: Tensor, origins: Tensor, directions: Tensor, *, jitter: Tensor | None, edit: Edit | None
    ) -> Pixels:
        """March and integrate, some rays of one code at a time; all at once for an edit; arguments as ``march``."""
        if edit is not None:
            return integrate(self.march(painted, origins, directions, jitter=jitter, edit=edit))
        views = len(origins) // len(painted)
        count = max(CHUNK // (views * self.coarse), 1)

        def rendered(code: int) -> Pixels:
            rows = slice(code * views, (code + 1) * views)
            starts, ahead = origins[rows].split(count, 1), directions[rows].split(count, 1)
            drawn = itertools.repeat(None) if jitter is None else jitter[rows].split(count, 1)
            return _joined(
                [
                    integrate(self.march(painted[code : code + 1], *rays, jitter=numbers))
                    for *rays, numbers in zip(starts, ahead, drawn, strict=False)
                ],
                1,
            )

        return _joined([rendered(code) for code in range(len(painted))], 0)

    def synthesis(
        self,
        ws: Latents,
        camera: Camera | None = None,
        *,
        expression: Tensor | None = None,
        edit: Edit | None = None,
        randomness: Randomness = None,
        taps: Sequence[str] = (),
        resolution: int | None = None,
    ) -> Rendering:
        """As :meth:`Generator.synthesis`, at the native resolution only.

        Args:
            randomness: a generator draws the noise maps of the backbone and jitters the samples along each ray, as in
                training; a tensor of uniform numbers (cameras, pixels, coarse + fine) is the jitter alone.

        Raises:
            ValueError: for another resolution.
        """
        self.check_taps(taps)
        camera, _ = self.check_views(ws, camera, expression)
        if resolution not in (None, self.resolution):
            raise ValueError(f"the resolution of an EG3D generator is {self.resolution}, got {resolution}")
        views, side = len(camera) // len(ws), self.render_resolution
        drawn = randomness if isinstance(randomness, torch.Generator) else "const"
        blocks = self.backbone(ws.ws, drawn)
        painted = blocks[-1][1]

        origins, directions = camera.rays(side)
        length = directions.norm(dim=-1, keepdim=True)
        jitter = None
        if randomness is not None:
            jitter = uniform((len(camera), side**2, self.coarse + self.fine), randomness, camera.device)
        pixels = self.render(painted, origins, directions / length, jitter=jitter, edit=edit)
        alpha = pixels.alpha.unflatten(1, (1, side, side))
        depth = (pixels.distance / length[..., 0]).unflatten(1, (1, side, side))
        features = (pixels.colour.mT * 2 - 1).unflatten(2, (side, side))
        if self.white_back:
            features = features + 2 * (1 - alpha)

        w = ws.ws[:, -1].repeat_interleave(views, 0)
        blocks += self.superresolution(features, w, drawn)
        found = {name: x for name, (x, _) in zip(self.tap_names, blocks, strict=True)}
        return Rendering(
            image=blocks[-1][1],
            raw=features[:, :3],
            depth=depth,
            alpha=alpha,
            normals=depth_normals(depth.detach(), alpha.detach(), camera),
            features=features,
            taps={name: found[name] for name in taps},
        )


def _joined(parts: Sequence[Pixels], axis: int) -> Pixels:
    return parts[0] if len(parts) == 1 else Pixels(*(torch.cat(found, axis) for found in zip(*parts, strict=True)))


def segment_weights(distance: Tensor, sigma: Tensor) -> Tensor:
    """Visibility of the pieces between samples, each of its ends' mean density: the mid-point rule (EG3D, Supp. A).

    Args:
        distance, sigma: (V, P, N), ascending.

    Returns:
        (V, P, N - 1).
    """
    density = F.softplus((sigma[..., 1:] + sigma[..., :-1]) / 2 - 1)
    return layer_weights(density_alpha(density, distance.diff(dim=-1))[..., None])[..., 0]


def integrate(passes: Sequence[Samples]) -> Pixels:
    """Volume rendering of all passes together (NeRF, Eq. 3).

    A piece has its ends' mean colour, so that a sample counts by half the weight of its two pieces: colours need not
    be sorted.
    """
    with full_precision(passes[0].distance):
        distance, order = torch.cat([samples.distance for samples in passes], -1).sort(-1)
        sigma = torch.cat([samples.sigma for samples in passes], -1).gather(-1, order)
        weights = segment_weights(distance, sigma)
        alpha = weights.sum(-1)
        expected = (weights * (distance[..., 1:] + distance[..., :-1]) / 2).sum(-1) / alpha.clamp_min(EMPTY)
        shares = (F.pad(weights, (1, 0)) + F.pad(weights, (0, 1))) / 2
        shares = torch.zeros_like(shares).scatter(-1, order, shares)
        counts = [samples.distance.shape[-1] for samples in passes]
        colour = sum(
            (share[..., None, :] @ samples.colour)[..., 0, :]
            for share, samples in zip(shares.split(counts, -1), passes, strict=True)
        )
        assert isinstance(colour, Tensor)
        return Pixels(colour, alpha, expected)
