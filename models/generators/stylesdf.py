"""StyleSDF: a signed distance field, rendered to features at low resolution, and a style-based decoder to the image.

World: the face at the origin, cameras on the unit sphere; distances are world units.

Source: StyleSDF (Or-El et al., 2022), Sec. 3; the field's layers are those of pi-GAN (Chan et al., 2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.camera import Camera, Rig
from models.generators.base import Discriminator, DiscriminatorOutput, ParameterGroup, RadianceGenerator
from models.generators.fir import fir_kernel
from models.generators.layers import LEAKY_SLOPE, MappingNetwork
from models.generators.stylegan2 import Noise, SynthesisBlock, SynthesisLayer, ToImage
from models.latents import Latents
from models.rendering.compositing import EMPTY, Randomness, field_gradient, uniform
from models.rendering.output import Edit, FieldSample, Rendering
from models.rendering.pointwise import IMAGES, affine

GAMMA, GAMMA_SCALE, BETA_SCALE = 30.0, 15.0, 0.25  # frequencies near 30, as SIREN's first layer
PORTION = {"cpu": 2**13}  # points shaded at once: activations that stay in the cache; elsewhere 2^20
OPAQUE = 1e10  # length of the last interval of a ray, so that any density at its end is seen
THINNEST = 1e-5  # of surfaces, world units

RIG = Rig(
    radius=1.0, focal=0.5 / math.tan(math.radians(6)), pivot=(0, 0, 0), near=0.88, far=1.12, yaw_std=0.3, pitch_std=0.15
)  # fmt: skip


class FiLMSiren(nn.Linear):
    """sin(gamma(w) * (W x + b) + beta(w)) (Sec. 3.2)."""

    def __init__(self, in_features: int, out_features: int, w_dim: int, *, first: bool = False) -> None:
        super().__init__(in_features, out_features)
        bound = 1 / in_features if first else math.sqrt(6 / in_features) / 25
        nn.init.uniform_(self.weight, -bound, bound)
        self.gamma, self.beta = nn.Linear(w_dim, out_features), nn.Linear(w_dim, out_features)
        for linear in (self.gamma, self.beta):
            nn.init.normal_(linear.weight, std=0.25 * math.sqrt(2 / (1 + 0.2**2) / w_dim))

    def modulation(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """w (B, w_dim) -> gamma, beta (B, 1, out_features)."""
        return (GAMMA + GAMMA_SCALE * self.gamma(w))[:, None], (BETA_SCALE * self.beta(w))[:, None]

    def fused(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's affine map for each code, gamma * W and gamma * b + beta: no further products at the points.

        Returns:
            weight (B, out_features, in_features) and bias (B, 1, out_features).
        """
        gamma, beta = self.modulation(w)
        return self.weight * gamma.mT, torch.addcmul(beta, gamma, self.bias)

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """x (B, P, in_features) with its own gamma and beta (B, P, out_features) per point -> (B, P, out_features)."""
        return torch.sin(gamma * super().forward(x) + beta)


Film = list[tuple[Tensor, Tensor]]
"""Each layer's weight and bias for a batch of codes, see :meth:`FiLMSiren.fused`."""


class SDFField(nn.Module):
    """Points to distance and, along a direction, to features and colour.

    Distances are read before the view layer, so they depend on points alone.

    Args:
        width: channels of every layer. depth: layers before the view layer. w_dim: size of a style code.
    """

    def __init__(self, width: int, depth: int, w_dim: int) -> None:
        super().__init__()
        self.trunk = nn.ModuleList(FiLMSiren(width if i else 3, width, w_dim, first=i == 0) for i in range(depth))
        self.view = FiLMSiren(width + 3, width, w_dim)
        self.colour, self.distance = nn.Linear(width, 3), nn.Linear(width, 1)
        for head in (self.colour, self.distance):
            bound = math.sqrt(6 / width) / 25
            nn.init.uniform_(head.weight, -bound, bound)

    @property
    def layers(self) -> list[FiLMSiren]:
        """Every layer that reads a code, in order."""
        return [*self.trunk, self.view]  # type: ignore[list-item]

    def film(self, ws: Tensor) -> Film:
        """Style codes (B, depth + 1, w_dim), one a layer, to the layers' affine maps."""
        return [layer.fused(w) for layer, w in zip(self.layers, ws.unbind(1), strict=True)]

    @staticmethod
    def backbone(points: Tensor, film: Film) -> Tensor:
        """Normalised points (B, P, 3) -> (B, P, width), what distances are read from."""
        x = points
        for weight, bias in film[:-1]:
            x = affine(x, weight, bias).sin()
        return x

    @staticmethod
    def features(x: Tensor, directions: Tensor, film: Film) -> Tensor:
        """Backbone features (B, P, width) seen along unit directions (B, P, 3) -> (B, P, width)."""
        weight, bias = film[-1]
        return affine(torch.cat([x, directions], -1), weight, bias).sin()


def portions(rows: int, rays: int, samples: int, device: torch.device) -> list[slice]:
    """Slices of the rays such that all rows' samples on a slice are one ``PORTION``."""
    step = max(PORTION.get(device.type, 2**20) // (rows * samples) // IMAGES, 1) * IMAGES
    return [slice(start, start + step) for start in range(0, rays, step)]


class Volume(NamedTuple):
    """What rays through the field have seen. R rays of N samples per code."""

    colour: Tensor
    """(B, R, 3) in [-1, 1]."""
    features: Tensor
    """(B, R, width)."""
    raw: Tensor
    """(B, R, N) distance, or density before its activation, at the samples."""
    weights: Tensor
    """(B, R, N) visibility; the last sample is the background."""


class Decoder(nn.Module):
    """Enlarges rendered features to the image, StyleGAN2's synthesis from a given map (Sec. 3.3).

    Args:
        code_dim: of the renderer code that decoder codes are made from. in_channels, side: of the features.
        channels: from the features' side to the image's, doubling each time.
        w_dim: size of a decoder code.
        mapping_layers, lr_multiplier: of the mapping network.
        taps: of the separable upsampling filter.
    """

    kernel: Tensor

    def __init__(
        self, code_dim: int, in_channels: int, side: int, channels: Sequence[int] = (512, 512, 256, 128, 64), *,
        w_dim: int = 512, mapping_layers: int = 5, lr_multiplier: float = 0.01, taps: Sequence[float] = (1, 3, 3, 1),
    ) -> None:  # fmt: skip
        super().__init__()
        self.w_dim, self.num_ws = w_dim, 2 * len(channels)
        self.sides = [side * 2**k for k in range(len(channels))]
        self.resolution = self.sides[-1]
        self.map_network = MappingNetwork(code_dim, w_dim, layers=mapping_layers, lr_multiplier=lr_multiplier)
        self.stem = SynthesisLayer(in_channels, channels[0], w_dim, side, upsample=False, clamp=None)
        self.to_image = ToImage(channels[0], 3, w_dim, clamp=None)
        self.blocks = nn.ModuleList(
            SynthesisBlock(before, width, 3, w_dim, size)
            for (before, width), size in zip(pairwise(channels), self.sides[1:], strict=True)
        )
        self.register_buffer("kernel", fir_kernel(taps), persistent=False)

    @property
    def layers(self) -> list[SynthesisLayer]:
        """The convolutions, in order."""
        return [self.stem, *(layer for block in self.blocks for layer in block.layers)]  # type: ignore[union-attr]

    def forward(self, features: Tensor, ws: Tensor, noise: Noise = "const") -> Iterator[tuple[Tensor, Tensor]]:
        """Features (B, C, S, S) and image so far (B, 3, S, S), from the smallest side to the largest.

        Args:
            features: (B, in_channels, side, side). ws: (B, num_ws, w_dim).
        """
        x = self.stem(features, ws[:, 0], self.kernel, noise)
        image = self.to_image(x, ws[:, 1])
        yield x, image
        for k, block in enumerate(self.blocks):
            x, image = block(x, image, ws[:, 2 * k + 1 : 2 * k + 4], self.kernel, noise)
            yield x, image


class StyleSDF(RadianceGenerator):
    """Rays integrate a field's features into a small picture, which a style-based decoder enlarges.

    Latents have the groups "renderer" (one code a layer of the field) and, with a decoder, "decoder"; ``num_ws`` and
    ``w_dim`` are their sums, and rows of ``affine_weights`` act on both codes, one after the other.

    Args:
        z_dim: size of z.
        width, depth: of the field; a renderer code has ``width`` numbers.
        mapping_layers: from z to the renderer code.
        raw_resolution: side of the rendered picture, pixels.
        samples: per ray.
        decoder: arguments of :class:`Decoder`; None leaves the rendered picture as it is, at any resolution.
        signed_distance: whether the field is a signed distance; otherwise its density is softplus(field).
        beta: what the width of a signed distance's surface starts from, world units.
        offset_sampling: samples of a ray move together when drawn (Eq. 3), not each within its own interval.
        normalize_points: scale the depth range to [-1, 1] before the field sees points.
        static_directions: show the field directions in the camera's frame, so that appearance does not turn with it.
        opaque_end: what passes all samples but the last is seen there, as a background.
        rig: of the training poses; its near and far bound the rays.

    Raises:
        ValueError: when ``beta`` is not positive.
    """

    renderer_mean: Tensor
    decoder_mean: Tensor

    def __init__(
        self,
        z_dim: int = 256,
        width: int = 256,
        depth: int = 8,
        mapping_layers: int = 3,
        raw_resolution: int = 64,
        samples: int = 24,
        decoder: dict[str, Any] | None = None,
        signed_distance: bool = True,
        beta: float = 0.1,
        offset_sampling: bool = True,
        normalize_points: bool = True,
        static_directions: bool = True,
        opaque_end: bool = True,
        rig: Rig = RIG,
    ) -> None:
        super().__init__()
        if not beta > 0:
            raise ValueError(f"beta is a width, it must be positive, got {beta}")
        self.z_dim, self.rig, self.samples, self.raw_resolution = z_dim, rig, samples, raw_resolution
        self.offset_sampling, self.static_directions, self.opaque_end = offset_sampling, static_directions, opaque_end
        self.point_scale = 2 / (rig.far - rig.near) if normalize_points else 1.0
        self.map_network = nn.Sequential()
        for i in range(mapping_layers):
            linear = nn.Linear(width if i else z_dim, width)
            nn.init.kaiming_normal_(linear.weight, a=0.2)
            self.map_network.extend([linear, nn.LeakyReLU(0.2)])
        self.field = SDFField(width, depth, width)
        self.beta = nn.Parameter(torch.tensor(beta)) if signed_distance else None
        self.decoder = None if decoder is None else Decoder(width, width, raw_resolution, **decoder)
        self.free_resolution = decoder is None
        self.register_buffer("renderer_mean", torch.zeros(width))
        self.num_ws, self.w_dim, self.resolution = depth + 1, width, raw_resolution
        if self.decoder is not None:
            self.register_buffer("decoder_mean", torch.zeros(self.decoder.w_dim))
            self.num_ws, self.w_dim = self.num_ws + self.decoder.num_ws, self.w_dim + self.decoder.w_dim
            self.resolution = self.decoder.resolution

    # -- codes -----------------------------------------------------------------------------------------------------

    def mapping(
        self, z: Tensor, *, camera: Camera | None = None, truncation: float = 1.0, cutoff: int | None = None
    ) -> Latents:
        """As :meth:`Generator.mapping`; decoder codes are made from renderer codes.

        Truncation acts twice on decoder codes: on the renderer code that they are made from, and on themselves.

        Raises:
            ValueError: when z has another shape.
        """
        if z.shape[1:] not in ((self.z_dim,), (self.num_ws, self.z_dim)):
            raise ValueError(f"z must be (B, {self.z_dim}) or (B, {self.num_ws}, {self.z_dim}), got {tuple(z.shape)}")
        renderer = self.map_network(z)
        if truncation == 1:
            return self._latents(renderer)
        centre = self.renderer_mean
        truncated = self._latents(centre + truncation * (renderer - centre))
        if self.decoder is not None:
            centre, codes = self.decoder_mean, truncated.groups["decoder"]
            truncated = Latents({**truncated.groups, "decoder": centre + truncation * (codes - centre)})
        return truncated if cutoff is None else truncated.mix(self._latents(renderer), cutoff)

    def _latents(self, renderer: Tensor) -> Latents:
        """One renderer code (B, width) for all layers, or one for each: (B, num_ws, width)."""
        count = len(self.field.layers)
        if renderer.ndim == 2:
            own = renderer[:, None]
            groups = {"renderer": own.expand(-1, count, -1)}
        else:
            own = renderer[:, count:]
            groups = {"renderer": renderer[:, :count]}
        if self.decoder is not None:
            groups["decoder"] = self.decoder.map_network(own).expand(-1, self.decoder.num_ws, -1)
        return Latents(groups)

    @property
    def mean_latents(self) -> Latents:
        groups = {"renderer": self.renderer_mean.expand(1, len(self.field.layers), -1)}
        if self.decoder is not None:
            groups["decoder"] = self.decoder_mean.expand(1, self.decoder.num_ws, -1)
        return Latents(groups)

    def complete(self, ws: Latents) -> Latents:
        """As :meth:`Generator.complete`; decoder codes are made of the renderer's, as :meth:`mapping` makes them.

        One renderer code makes all of them: where those of the layers differ, their mean.
        """
        if self.decoder is None or "decoder" in ws.groups or "renderer" not in ws.groups:
            return super().complete(ws)
        own = ws.groups["renderer"].mean(1)
        codes = self.decoder.map_network(own)[:, None].expand(-1, self.decoder.num_ws, -1)
        return Latents({**ws.groups, "decoder": codes})

    @torch.no_grad()
    def update_mean(self, count: int = 10_000, seed: int = 0) -> None:
        """Set the mean codes from ``count`` random z."""
        z = self.sample_z(count, torch.Generator().manual_seed(seed)).to(self.renderer_mean.device)
        renderer = self.map_network(z)
        self.renderer_mean.copy_(renderer.mean(0))
        if self.decoder is not None:
            self.decoder_mean.copy_(self.decoder.map_network(renderer).mean(0))

    def parameter_groups(self) -> dict[str, ParameterGroup]:
        """The field with its mapping, the decoder with its own, and the surface's width beta."""
        groups = {
            "decoder": [] if self.decoder is None else list(self.decoder.parameters()),
            "beta": [] if self.beta is None else [self.beta],
        }
        apart = {id(parameter) for group in groups.values() for parameter in group}
        groups = {"renderer": [p for p in self.parameters() if id(p) not in apart], **groups}
        return {name: ParameterGroup(group) for name, group in groups.items() if group}

    def affine_weights(self, layers: Sequence[int] | None = None) -> Tensor:
        """As :meth:`Generator.affine_weights`, of the field's layers and the decoder's convolutions: layer i reads
        code i. Columns are those of both codes, and 0 for the code that a layer does not read."""
        found = [
            torch.cat([GAMMA_SCALE * layer.gamma.weight, BETA_SCALE * layer.beta.weight]) for layer in self.field.layers
        ]
        if self.decoder is not None:
            width, own = self.field.distance.in_features, self.decoder.w_dim
            affines = [layer.affine for layer in self.decoder.layers]
            found = [F.pad(weight, (0, own)) for weight in found]
            found += [F.pad(affine.weight * affine.scale, (width, 0)) for affine in affines]
        return torch.cat(found if layers is None else [found[i] for i in layers])

    # -- the field -------------------------------------------------------------------------------------------------

    def features(self, ws: Latents, points: Tensor, expression: Tensor | None = None) -> Tensor:
        """Field features at world points (B, P, 3).

        Returns:
            (B, P, 3 * width + 1): backbone features, the raw distance, and what the view layer makes of the code.
        """
        self.check_expression(expression, len(ws))
        codes = ws.groups["renderer"]
        x = self.field.backbone(points * self.point_scale, self.field.film(codes))
        return self._pack(x, self.field.distance(x), codes)

    def _pack(self, x: Tensor, raw: Tensor, codes: Tensor) -> Tensor:
        view = (t.expand(-1, x.shape[1], -1) for t in self.field.view.modulation(codes[:, -1]))
        return torch.cat([x, raw, *view], -1)

    def _unpack(self, features: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """The raw distance (B, P, 1), and features seen along ``directions`` (B, P, width)."""
        width = self.field.distance.in_features
        x, raw, gamma, beta = features.split((width, 1, width, width), -1)
        return raw, self.field.view(torch.cat([x, directions], -1), gamma, beta)

    def decode(self, features: Tensor, directions: Tensor | None = None) -> FieldSample:
        """As :meth:`RadianceGenerator.decode`. With static directions these are meant in the frame of a frontal
        camera, whose axes are the world's; without any, points are seen from the front."""
        if directions is None:
            directions = features.new_tensor([0.0, 0.0, -1.0]).expand(*features.shape[:2], 3)
        return self._sample(*self._unpack(features, directions))

    def shade(self, ws: Latents, points: Tensor, directions: Tensor) -> FieldSample:
        """``decode(features(ws, points), directions)``, at the cost of what is needed without an edit between them."""
        film = self.field.film(ws.groups["renderer"])
        x = self.field.backbone(points * self.point_scale, film)
        return self._sample(self.field.distance(x), self.field.features(x, directions, film))

    def _sample(self, raw: Tensor, seen: Tensor) -> FieldSample:
        colour = 2 * torch.sigmoid(self.field.colour(seen)) - 1
        return FieldSample(colour, density=self.density(raw), sdf=raw if self.beta is not None else None)

    def density(self, raw: Tensor) -> Tensor:
        """Volume density, 1 / world unit, of what the field says: sigmoid(-d / beta) / beta (Sec. 3.2).

        Learning may drive beta below 0, where a density means nothing: from ``THINNEST`` on it has no effect.
        """
        if self.beta is None:
            return F.softplus(raw)
        beta = self.beta.clamp_min(THINNEST)
        return torch.sigmoid(-raw / beta) / beta

    def surface(self, ws: Latents, points: Tensor) -> Tensor:
        """The field at world points (B, P, 3): signed distance (B, P, 1), world units; its gradient by autograd gives
        normals and the eikonal term. The raw density where the field is none."""
        return self._surface(points, self.field.film(ws.groups["renderer"]))

    def _surface(self, points: Tensor, film: Film) -> Tensor:
        return self.field.distance(self.field.backbone(points * self.point_scale, film))

    # -- rendering -------------------------------------------------------------------------------------------------

    @property
    def tap_names(self) -> tuple[str, ...]:
        sides = self.decoder.sides if self.decoder is not None else ()
        return ("field", "weights", *(f"{kind}{side}" for side in sides for kind in ("block", "image")))

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
        """As :meth:`Generator.synthesis`.

        ``randomness`` moves the samples along each ray, and a generator also draws the decoder's noise. Given as a
        tensor it holds uniform numbers: (cameras, side, side) with offset sampling, else (cameras, side, side,
        samples). ``edit`` is called once, with the points of all views of a code in one row. Normals are the gradient
        of the field, before any edit, at the expected depth. The taps "field" and "weights" are (cameras, samples,
        side, side): the field at the samples, and their visibility.
        """
        self.check_taps(taps)
        camera, rows = self.check_views(ws, camera, expression)
        if self.decoder is not None and resolution not in (None, self.resolution):
            raise ValueError(f"the resolution is {self.resolution}: noise maps of the decoder are of that size")
        side = self.raw_resolution if self.decoder is not None else resolution or self.raw_resolution

        def by_code(t: Tensor) -> Tensor:
            return t.reshape(rows, -1, t.shape[-1])

        def by_view(t: Tensor) -> Tensor:
            return t.reshape(len(camera), side, side, -1).permute(0, 3, 1, 2)

        with torch.autocast(camera.device.type, enabled=False):
            codes = ws.groups["renderer"].to(self.renderer_mean.dtype)
            film = self.field.film(codes)
            origins, directions = (by_code(t) for t in camera.rays(side))
            views = by_code(camera_directions(camera, side)) if self.static_directions else directions
            depths = by_code(self.sample_depths(len(camera), side, randomness, camera.device))
            volume = self._integrate(codes, film, origins, directions, F.normalize(views, dim=-1), depths, edit)

            weights, subject = volume.weights[..., :-1], depths[..., :-1]
            alpha = 1 - volume.weights[..., -1:]
            total = alpha.clamp_min(EMPTY)
            depth = (weights * subject).sum(-1, keepdim=True) / total
            spread = (weights * (subject - depth).square()).sum(-1, keepdim=True) / total
            normals = self._normals(film, origins, directions, depth) * (alpha > 0)

        raw, features = by_view(volume.colour), by_view(volume.features)
        found = {"field": by_view(volume.raw), "weights": by_view(volume.weights)}
        image = raw
        if self.decoder is not None:
            noise = randomness if isinstance(randomness, torch.Generator) else "const"
            codes = ws.groups["decoder"].repeat_interleave(len(camera) // rows, 0)
            for size, (x, image) in zip(self.decoder.sides, self.decoder(features, codes, noise), strict=True):
                found |= {f"block{size}": x, f"image{size}": image}
        return Rendering(
            image=image,
            raw=None if self.decoder is None else raw,
            depth=by_view(depth),
            alpha=by_view(alpha),
            spread=by_view(spread),
            normals=by_view(normals),
            features=features,
            taps={name: found[name] for name in taps},
        )

    def sample_depths(self, cameras: int, side: int, randomness: Randomness, device: torch.device) -> Tensor:
        """Depths of the samples (cameras, side, side, samples), camera-z, world units.

        Raises:
            ValueError: when given uniform numbers are of another shape.
        """
        near, far, count = self.rig.near, self.rig.far, self.samples
        last = 1 - 1 / count if self.offset_sampling else 1.0
        t = torch.linspace(0, last, count, device=device, dtype=self.renderer_mean.dtype)
        depths = near * (1 - t) + far * t
        shape = (cameras, side, side, 1 if self.offset_sampling else count)
        if randomness is None:
            return depths.expand(cameras, side, side, -1)
        if isinstance(randomness, Tensor) and self.offset_sampling:
            randomness = randomness[..., None]
        jitter = uniform(shape, randomness, device)
        if self.offset_sampling:
            return depths + jitter * (far - near) / count  # Eq. 3
        middle = (depths[1:] + depths[:-1]) / 2
        lower, upper = torch.cat([depths[:1], middle]), torch.cat([middle, depths[-1:]])
        return lower + (upper - lower) * jitter

    def _integrate(
        self, codes: Tensor, film: Film, origins: Tensor, directions: Tensor, views: Tensor, depths: Tensor,
        edit: Edit | None,
    ) -> Volume:  # fmt: skip
        """Shade the samples of all rays and integrate along them: at once for an edit, else in portions."""

        def shade(part: slice) -> Volume:
            depth, direction = depths[:, part], directions[:, part]
            points = (origins[:, part, None] + depth[..., None] * direction[:, :, None]).flatten(1, 2)
            view = views[:, part].repeat_interleave(self.samples, 1)
            x = self.field.backbone(points * self.point_scale, film)
            raw = self.field.distance(x)
            if edit is None:
                seen = self.field.features(x, view, film)
            else:
                raw, seen = self._unpack(edit(points, self._pack(x, raw, codes)), view)
            raw = raw.view_as(depth)
            weights = self._weights(self.density(raw), depth, direction.norm(dim=-1, keepdim=True))

            def integrate(values: Tensor) -> Tensor:
                return (weights[:, :, None] @ values.unflatten(1, depth.shape[1:]))[:, :, 0]

            colour = 2 * integrate(torch.sigmoid(self.field.colour(seen))) - 1
            return Volume(colour, integrate(seen), raw, weights)

        rows, rays = directions.shape[:2]
        parts = portions(rows, rays, self.samples, depths.device) if edit is None else [slice(None)]
        found = [shade(part) for part in parts]
        return Volume(*(torch.cat(part, 1) for part in zip(*found, strict=True)))

    def _weights(self, density: Tensor, depth: Tensor, length: Tensor) -> Tensor:
        """Visibility of samples with density and depth (B, R, N) on rays whose directions have ``length`` (B, R, 1)."""
        optical = density * F.pad(depth.diff(dim=-1), (0, 1), value=OPAQUE) * length
        transmittance = torch.exp(-F.pad(optical[..., :-1].cumsum(-1), (1, 0)))
        opacity = -torch.expm1(-optical)
        if self.opaque_end:
            opacity = F.pad(opacity[..., :-1], (0, 1), value=1.0)
        return transmittance * opacity

    def _normals(self, film: Film, origins: Tensor, directions: Tensor, depth: Tensor) -> Tensor:
        """Unit gradients of the field at the depths (B, R, 1), facing the camera: (B, R, 3). Detached."""
        points = (origins + depth * directions).detach()
        film = [(weight.detach(), bias.detach()) for weight, bias in film]
        parts = [points[:, part] for part in portions(len(points), points.shape[1], 1, points.device)]
        gradient = torch.cat([field_gradient(lambda p: self._surface(p, film), part)[1] for part in parts], 1)
        towards = -(gradient * directions).sum(-1, keepdim=True)
        return F.normalize(torch.where(towards < 0, -gradient, gradient), dim=-1, eps=1e-30).detach()


def camera_directions(camera: Camera, side: int) -> Tensor:
    """Directions of rays in the frame of each camera, axes x right, y up, z backward: (B, side * side, 3)."""
    frontal = torch.diag(camera.cam2world.new_tensor([1.0, -1.0, -1.0, 1.0])).expand(len(camera), -1, -1)
    return Camera(frontal, camera.intrinsics).rays(side)[1]


class CoordConv(nn.Conv2d):
    """Convolution of features, rows and columns, the last two growing from -1 to 1 over the map (Liu et al., 2018).

    What the coordinates add is the same for every item of a batch.
    """

    coordinates: Tensor

    def __init__(self, in_channels: int, out_channels: int, side: int) -> None:
        super().__init__(in_channels + 2, out_channels, 3, padding=1)
        along = torch.linspace(-1, 1, side)
        rows_columns = torch.stack(torch.meshgrid(along, along, indexing="ij"))
        self.register_buffer("coordinates", rows_columns[None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, side, side) -> (B, out_channels, side, side)."""
        weight, position = self.weight[:, :-2], self.weight[:, -2:]
        added = F.conv2d(self.coordinates, position, self.bias, padding=self.padding)
        return F.conv2d(x, weight, padding=self.padding) + added


class CoordBlock(nn.Module):
    """Two coordinate convolutions and a skip, halving the side."""

    def __init__(self, in_channels: int, out_channels: int, side: int) -> None:
        super().__init__()
        self.conv1 = CoordConv(in_channels, out_channels, side)
        self.conv2 = CoordConv(out_channels, out_channels, side)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, side, side) -> (B, out_channels, side / 2, side / 2)."""
        skip = self.skip(F.avg_pool2d(x, 2))
        x = F.leaky_relu(self.conv2(F.leaky_relu(self.conv1(x), LEAKY_SLOPE)), LEAKY_SLOPE)
        return (F.avg_pool2d(x, 2) + skip) * math.sqrt(0.5)


class VolumeDiscriminator(Discriminator):
    """Judges rendered pictures before the decoder, and regresses their pose (Sec. 3.4).

    Args:
        channels: of the features from the picture's side down to 2; the side is 2 ** len(channels).
        pose: whether it answers yaw and pitch.
    """

    def __init__(self, channels: Sequence[int] = (128, 256, 400, 400, 400, 400), *, pose: bool = True) -> None:
        super().__init__()
        self.resolution = 2 ** len(channels)
        self.stem = nn.Conv2d(3, channels[0], 1)
        self.blocks = nn.ModuleList(
            CoordBlock(before, width, self.resolution >> i) for i, (before, width) in enumerate(pairwise(channels))
        )
        self.out = nn.Conv2d(channels[-1], 3 if pose else 1, 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=LEAKY_SLOPE)

    def forward(self, image: Tensor, camera: Camera | None = None) -> DiscriminatorOutput:
        """Judge images (B, 3, resolution, resolution) in [-1, 1].

        Raises:
            ValueError: when the size is wrong, or a camera would be ignored.
        """
        if image.shape[1:] != (3, self.resolution, self.resolution):
            raise ValueError(f"images must be (B, 3, {self.resolution}, {self.resolution}), got {tuple(image.shape)}")
        if camera is not None:
            raise ValueError("this discriminator takes no camera: it regresses the pose")
        x = F.leaky_relu(self.stem(image), LEAKY_SLOPE)
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        found = self.out(x).flatten(1).float()
        return DiscriminatorOutput(found[:, :1], found[:, 1:] if found.shape[1] == 3 else None, tuple(features))
