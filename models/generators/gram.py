"""GRAM: radiance on the level sets of a learned scalar field.

Sources: GRAM (Deng et al., 2022); its radiance network is the FiLM SIREN of pi-GAN (Chan et al., 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from models.camera import Camera, Rig
from models.generators.base import RadianceGenerator
from models.latents import Latents
from models.rendering.compositing import EMPTY, density_alpha, depth_normals, layer_weights
from models.rendering.manifolds import CrossingCache, first_crossings, weights_version
from models.rendering.output import Edit, FieldSample, Rendering
from models.rendering.pointwise import affine, in_chunks

BOX = 0.24  # side of the cube, world units, that the scalar field and the deformation see as [-1, 1]
PLANE = -0.12  # z of the background plane, world units
FLAT = 0.05  # samples whose scalars differ by no more are not interpolated
WIDENING = 0.001  # how far colours reach beyond [0, 1], so that black and white are within reach

Affine = tuple[Tensor, Tensor]
"""Weight (B, out, in) and bias (B, 1, out) of each code."""


def grid_focal(fov: float, side: int) -> float:
    """The normalised focal length whose pixel centres are the official rays.

    The official pixel grid spans the field of view ``fov`` (degrees) between the first and the last pixel centre, not
    between the outer borders: linspace(-1, 1, side).
    """
    return (side - 1) / (2 * side * math.tan(math.radians(fov) / 2))


def sphere_camera(phi: Tensor, theta: Tensor, fov: float, side: int) -> Camera:
    """Official camera angles as our cameras.

    Args:
        phi: (B,) radians from +y. theta: (B,) radians from +x towards +z. Both are pi / 2 in front of the face.
        fov: degrees. side: pixels of the images to render, on which the official grid depends.
    """
    phi = phi.clamp(1e-5, math.pi - 1e-5)
    rig = Rig(radius=1.0, pivot=(0.0, 0.0, 0.0), focal=grid_focal(fov, side), near=0.1, far=2.0)
    return rig.camera(math.pi / 2 - theta, math.pi / 2 - phi, device=phi.device)


def unit_rays(camera: Camera, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Origins (C, P, 3), unit directions (C, P, 3) and distance per camera-z (C, P) of an image's rays."""
    origins, directions = camera.rays(side)
    length = directions.norm(dim=-1)
    return origins, directions / length[..., None], length


def full_precision(x: Tensor) -> torch.autocast:
    """Not under the caller's autocast: sines of large numbers need all their digits."""
    return torch.autocast(x.device.type, enabled=False)


class ScalarField(nn.Module):
    """M: R^3 -> R, whose level sets are the manifolds; starts as ten times the distance from a sphere.

    Args:
        width, layers: of the hidden layers.
        centre: of the sphere, in units of half a ``BOX``. radius: a tenth of what is subtracted at first.
    """

    centre: Tensor

    def __init__(self, width: int, layers: int, centre: Sequence[float], radius: float) -> None:
        super().__init__()
        hidden = [nn.Linear(a, b) for a, b in pairwise([3, *[width] * layers])]
        self.hidden, self.last = nn.ModuleList(hidden), nn.Linear(width, 1)
        self.register_buffer("centre", torch.tensor([float(v) for v in centre]), persistent=False)
        for layer in hidden:  # geometric initialisation (SAL; Atzmon & Lipman, 2020)
            nn.init.normal_(layer.weight, std=math.sqrt(2 / width))
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.last.weight, 10 * math.sqrt(math.pi / width))
        nn.init.constant_(self.last.bias, -radius)

    def forward(self, points: Tensor) -> Tensor:
        """(..., 3) world points -> (...)."""
        return in_chunks(self._at, points.reshape(1, -1, 3), self.last.in_features, self).reshape(points.shape[:-1])

    def _at(self, points: Tensor) -> Tensor:
        x = points * (2 / BOX) - self.centre
        for layer in self.hidden:
            x = F.relu(affine(x, layer.weight[None], layer.bias[None, None]))  # type: ignore[index]
        return self.last(x)


class FiLMLayer(nn.Linear):
    """sin(gain (W x + b) + phase), gain = 15 frequency + 30, with one frequency and phase per code and channel.

    Gain and phase are folded into one affine map per code, which costs as little as two points do.
    """

    @staticmethod
    def gain(style: Tensor) -> Tensor:
        """(B, out) from a style (B, 2 out): frequencies, then phases."""
        return 15 * style.chunk(2, -1)[0] + 30

    def modulated(self, style: Tensor) -> Affine:
        """The affine map before the sine."""
        gain, phase = self.gain(style), style.chunk(2, -1)[1]
        return gain[..., None] * self.weight, (gain * self.bias + phase)[:, None]


class FiLMStack(nn.ModuleList):
    """FiLM layers of the given widths, one style each."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__(FiLMLayer(a, b) for a, b in pairwise(widths))

    def modulated(self, styles: Tensor) -> list[Affine]:
        """Of styles (B, layers, 2 width)."""
        return [layer.modulated(style) for layer, style in zip(self, styles.unbind(1), strict=True)]  # type: ignore[operator]


def siren_init(layers: Sequence[nn.Linear]) -> None:
    """Uniform initialisation for sines of frequency about 25 (SIREN; Sitzmann et al., 2020), as pi-GAN uses it."""
    for index, layer in enumerate(layers):
        fan_in = layer.in_features
        bound = 1 / fan_in if index == 0 else math.sqrt(6 / fan_in) / 25
        nn.init.uniform_(layer.weight, -bound, bound)


class StyleNetwork(nn.Module):
    """z -> frequency and phase of every channel of every FiLM layer: a leaky MLP.

    Args:
        layers: number of hidden layers.
        styles: number of FiLM layers. channels: of each.
    """

    def __init__(self, z_dim: int, width: int, layers: int, styles: int, channels: int) -> None:
        super().__init__()
        widths = [z_dim, *[width] * layers, 2 * styles * channels]
        linears = [nn.Linear(a, b) for a, b in pairwise(widths)]
        self.layers, self.styles = nn.ModuleList(linears), styles
        for layer in linears:
            nn.init.kaiming_normal_(layer.weight, a=0.2)
        with torch.no_grad():
            linears[-1].weight.mul_(0.25)

    def forward(self, z: Tensor) -> Tensor:
        """(..., z_dim) -> (..., styles, 2 channels): frequencies, then phases."""
        *hidden, last = self.layers
        for layer in hidden:
            z = F.leaky_relu(layer(z), 0.2)
        frequency, phase = last(z).chunk(2, -1)
        return torch.cat([x.unflatten(-1, (self.styles, -1)) for x in (frequency, phase)], -1)


class Modulated(NamedTuple):
    """A :class:`RadianceField` for a batch of codes."""

    trunk: list[Affine]
    heads: list[Tensor]
    """(width, 4) weights of colour and density, of each layer but the first."""
    bias: Tensor
    """(4,) of all heads together."""
    last: Affine
    """Of the view layer, for the features of the trunk."""
    view: Tensor
    """(B, 3, width) of the view layer, for the direction."""
    gain: Tensor
    """(B, 1, width) of the view layer."""


class RadianceField(nn.Module):
    """FiLM SIREN with skip heads: colour and density are sums over the heads of all layers but the first.

    Only the last layer's colour sees the view direction.

    Args:
        layers: of the trunk.
        box: side of the cube, world units, that is seen as [-1, 1].
    """

    def __init__(self, width: int, layers: int, box: float) -> None:
        super().__init__()
        density = [nn.Linear(width, 1) for _ in range(layers - 1)]
        colour = [nn.Linear(width, 3) for _ in range(layers - 1)]
        self.layers, self.view = FiLMStack([3, *[width] * layers]), FiLMLayer(3 + width, width)
        self.density, self.colour = nn.ModuleList(density), nn.ModuleList(colour)
        self.width, self.scale = width, 2 / box
        siren_init([*self.layers, self.view, *density, *colour])  # type: ignore[list-item]

    def modulate(self, ws: Tensor) -> Modulated:
        """Fold the styles (B, layers + 1, 2 width) into the weights, once for all points."""
        trunk = self.layers.modulated(ws[:, :-1])
        trunk[0] = (trunk[0][0] * self.scale, trunk[0][1])
        view, bias = self.view.modulated(ws[:, -1])
        density, colour = (torch.stack([h.weight for h in heads]) for heads in (self.density, self.colour))  # type: ignore[misc]
        colour = F.pad(colour[:-1], (0, 0, 0, 0, 0, 1))  # the last one reads the view layer instead
        biases = [torch.stack([h.bias for h in heads]).sum(0) for heads in (self.colour, self.density)]  # type: ignore[misc]
        return Modulated(
            trunk,
            list(torch.cat([colour, density], 1).mT),
            torch.cat(biases),
            (view[..., 3:], bias),
            view[..., :3].mT,
            FiLMLayer.gain(ws[:, -1])[:, None],
        )

    def trunk(self, code: Modulated, points: Tensor) -> tuple[Tensor, Tensor]:
        """What needs no direction, at points (B, P, 3): (B, P, 4) logits so far and (B, P, width) of the view layer."""
        first, *others = code.trunk
        x = affine(points, *first).sin()
        logits = code.bias
        for layer, head in zip(others, code.heads, strict=True):
            x = affine(x, *layer).sin()
            logits = logits + x @ head
        return logits, affine(x, *code.last)

    def seen(self, logits: Tensor, view: Tensor) -> Tensor:
        """(B, P, 4) colour and density logits from those so far and the view layer before its sine."""
        colour = F.linear(view.sin(), self.colour[-1].weight)  # type: ignore[arg-type]
        return logits + F.pad(colour, (0, 1))

    def forward(self, code: Modulated, points: Tensor, directions: Tensor) -> Tensor:
        """(B, P, 4) logits of colour and density at points (B, P, 3) along unit directions (B, P, 3)."""
        logits, view = self.trunk(code, points)
        return self.seen(logits, torch.baddbmm(view, directions, code.view))


@dataclass(frozen=True)
class Surfaces:
    """Where the rays of C images of P pixels meet N surfaces, sorted by distance.

    Attributes:
        distance: (C, P, N) along the unit ray.
        valid: (C, P, N) whether there is a surface.
        plane: (C, P, N) where the background plane is.
        shift: (C, P, N, 3) from there to where the radiance is asked, world units; None for nowhere else.
    """

    distance: Tensor
    valid: Tensor
    plane: Tensor
    shift: Tensor | None = None

    def points(self, origins: Tensor, directions: Tensor) -> Tensor:
        """(C, P, N, 3) in the world."""
        return origins[:, :, None] + self.distance[..., None] * directions[:, :, None]

    @staticmethod
    def cat(items: Sequence[Surfaces]) -> Surfaces:
        """Surfaces without shift, concatenated along the images."""
        return Surfaces(*(torch.cat(x) for x in zip(*((i.distance, i.valid, i.plane) for i in items), strict=True)))


class Traced(NamedTuple):
    """What rays see."""

    colour: Tensor
    """(C, P, 3) in [-1, 1], background and all."""
    weights: Tensor
    """(C, P, N) visibility of each surface."""
    missed: Tensor
    """(C, P) of a ray that no surface stops."""


class GRAMGenerator(RadianceGenerator):
    """Rays composite the radiance at their first crossings of the level sets of a scalar field.

    The one group of codes, "ws", holds the frequencies and phases of each FiLM layer: (B, layers + 1, 2 width).

    Args:
        z_dim: size of z.
        resolution: native image side in pixels. The official pixel grid depends on it (:func:`grid_focal`): the rig
            renders exactly that grid at this side, and the same field of view at others.
        width, layers: of the radiance network's trunk. mapping_width, mapping_layers: hidden ones of the mapping.
        box: side of the cube, world units, that the radiance network sees as [-1, 1].
        predictor_width, predictor_layers, centre, radius: of :class:`ScalarField`.
        manifolds: number of surfaces, the background plane included.
        levels: the first and the last level, evenly spaced between.
        samples: per ray, in the search for crossings. near, far: where, distances along the ray.
        fov: degrees, see ``resolution``.
        delta: optical thickness of a manifold: opacity = 1 - exp(-delta density). delta_final: of the background
            plane and of the last surface of a ray, where there is such a plane.
        background: whether the last surface is a plane behind the head.
        white_back: whether what rays miss is white, not black. white_plane: whether the background plane is white.
        last_back: whether the last surface gets all that is left of a ray.
        density_clamp: "softplus", "relu" or "none".
        colour_clamp: "widen_sigmoid", "sigmoid" or "none".
        lock_view: look at colours along -z always, as official videos do.
        rig: further arguments of :class:`Rig`: the pose distribution.

    Raises:
        ValueError: when a clamp is unknown.
    """

    levels: Tensor
    mean: Tensor

    def __init__(
        self,
        z_dim: int = 256,
        resolution: int = 256,
        width: int = 256,
        layers: int = 8,
        mapping_width: int = 256,
        mapping_layers: int = 3,
        box: float = BOX,
        predictor_width: int = 128,
        predictor_layers: int = 3,
        centre: Sequence[float] = (0.0, 0.0, -1.5),
        radius: float = 0.0,
        manifolds: int = 24,
        levels: Sequence[float] = (23.0, 8.0),
        samples: int = 64,
        near: float = 0.88,
        far: float = 1.12,
        fov: float = 12.0,
        delta: float = 0.04,
        delta_final: float = 1e10,
        background: bool = True,
        white_back: bool = False,
        white_plane: bool = False,
        last_back: bool = False,
        density_clamp: str = "softplus",
        colour_clamp: str = "widen_sigmoid",
        lock_view: bool = False,
        rig: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if density_clamp not in ("softplus", "relu", "none"):
            raise ValueError(f"density_clamp must be softplus, relu or none, got {density_clamp!r}")
        if colour_clamp not in ("widen_sigmoid", "sigmoid", "none"):
            raise ValueError(f"colour_clamp must be widen_sigmoid, sigmoid or none, got {colour_clamp!r}")
        self.z_dim, self.resolution = z_dim, resolution
        self.num_ws, self.w_dim = layers + 1, 2 * width
        self.style = StyleNetwork(z_dim, mapping_width, mapping_layers, self.num_ws, width)
        self.field = RadianceField(width, layers, box)
        self.predictor = ScalarField(predictor_width, predictor_layers, centre, radius)
        self.samples, self.near, self.far, self.fov = samples, near, far, fov
        self.delta, self.delta_final = delta, delta_final if background else delta
        self.background, self.last_back = background, last_back
        self.white_back, self.white_plane = white_back, white_plane
        self.density_clamp, self.colour_clamp, self.lock_view = density_clamp, colour_clamp, lock_view
        focal = grid_focal(fov, resolution)
        corner = math.hypot(1, 0.5 / focal, 0.5 / focal)  # distance per camera-z: the official range is of distances
        self.rig = Rig(**{
            "radius": 1.0, "focal": focal, "pivot": (0.0, 0.0, 0.0), "near": near / corner, "far": far, **(rig or {}),
        })  # fmt: skip
        self.register_buffer("levels", torch.linspace(levels[0], levels[1], manifolds - background), persistent=False)
        self.register_buffer("mean", torch.zeros(self.num_ws, self.w_dim))
        self._cache: CrossingCache[Surfaces] = CrossingCache()

    # -- codes -------------------------------------------------------------------------------------------------------

    def mapping(
        self, z: Tensor, *, camera: Camera | None = None, truncation: float = 1.0, cutoff: int | None = None
    ) -> Latents:
        if z.shape[1:] not in ((self.z_dim,), (self.num_ws, self.z_dim)):
            raise ValueError(f"z must be (B, {self.z_dim}) or (B, {self.num_ws}, {self.z_dim}), got {tuple(z.shape)}")
        with full_precision(z):
            latents = self.codes(z)
        return latents if truncation == 1 else latents.truncate(self.mean_latents, truncation, cutoff)

    def codes(self, z: Tensor) -> Latents:
        """z (B, z_dim) or (B, num_ws, z_dim) to codes that are not truncated."""
        styles = self.style(z)
        return Latents({"ws": styles if z.ndim == 2 else styles.diagonal(dim1=1, dim2=2).mT})

    @property
    def mean_latents(self) -> Latents:
        return Latents({"ws": self.mean[None]})

    @torch.no_grad()
    def update_mean(self, count: int = 10_000, seed: int = 0) -> None:
        """Set the mean code from ``count`` random z."""
        z = self.sample_z(count, torch.Generator().manual_seed(seed)).to(self.mean.device)
        self.mean.copy_(self.codes(z).groups["ws"].mean(0))

    # -- the field -----------------------------------------------------------------------------------------------------

    def canonical(self, ws: Latents, points: Tensor, expression: Tensor | None) -> Tensor:
        """Where the radiance network is asked for what is at world points (B, P, 3)."""
        self.check_expression(expression, len(ws))
        return points

    def features(self, ws: Latents, points: Tensor, expression: Tensor | None = None) -> Tensor:
        """(B, P, 4 + 2 width): the logits so far, the view layer before direction and sine, and its gain."""
        with full_precision(points):
            return self._features(self.field.modulate(ws.groups["ws"]), self.canonical(ws, points, expression))

    def _features(self, code: Modulated, points: Tensor) -> Tensor:
        logits, view = self.field.trunk(code, points)
        return torch.cat([logits, view, code.gain.expand_as(view)], -1)

    def decode(self, features: Tensor, directions: Tensor | None = None) -> FieldSample:
        """As :meth:`RadianceGenerator.decode`; without directions, seen along -z."""
        logits, view, gain = features.split([4, self.field.width, self.field.width], -1)
        with full_precision(features):
            offset = gain * F.linear(self.view(directions), self.field.view.weight[:, :3])
            return self.activate(self.field.seen(logits, view + offset))

    def activate(self, logits: Tensor) -> FieldSample:
        """Colour in [-1, 1], density and the opacity of a manifold from (B, P, 4) logits."""
        colour, density = logits.split([3, 1], -1)
        if self.colour_clamp == "none":
            colour = 2 * colour - 1
        else:  # 2 sigmoid(x) - 1
            colour = torch.tanh(colour / 2) * (1 + 2 * WIDENING * (self.colour_clamp == "widen_sigmoid"))
        if self.density_clamp != "none":
            density = F.softplus(density) if self.density_clamp == "softplus" else F.relu(density)
        return FieldSample(colour, density, occupancy=density_alpha(density, density.new_tensor(self.delta)))

    def view(self, directions: Tensor | None) -> Tensor:
        """Unit directions (..., 3) along which colours are looked at; -z without any, and where they are locked."""
        ahead = self.mean.new_tensor([0.0, 0.0, -1.0])
        return ahead if directions is None else ahead.expand_as(directions) if self.lock_view else directions

    # -- rendering -----------------------------------------------------------------------------------------------------

    def crossings(
        self, ws: Latents, origins: Tensor, directions: Tensor, expression: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """First crossing of each level, in the order of the levels, without the background plane.

        Args:
            origins, directions: (C, P, 3), unit.

        Returns:
            distance (C, P, L), valid (C, P, L), and the shift (C, P, L, 3) of :class:`Surfaces`.
        """
        distance, valid = first_crossings(
            self.predictor, origins, directions, self.levels,
            near=self.near, far=self.far, samples=self.samples, flat=FLAT,
        )  # fmt: skip
        return distance, valid, None

    def surfaces(self, ws: Latents, origins: Tensor, directions: Tensor, expression: Tensor | None = None) -> Surfaces:
        """What the rays meet, front to back."""
        distance, valid, shift = self.crossings(ws, origins, directions, expression)
        if self.background:
            distance = torch.cat([distance, (PLANE - origins[..., 2:]) / directions[..., 2:]], -1)
            valid = F.pad(valid, (0, 1), value=True)
            shift = None if shift is None else F.pad(shift, (0, 0, 0, 1))
        distance, order = distance.sort(-1)
        valid = valid.gather(-1, order)
        plane = order == len(self.levels)  # nowhere without a background
        return Surfaces(
            distance, valid, plane, None if shift is None else shift.gather(2, order[..., None].expand_as(shift))
        )

    def _surfaces(self, ws: Latents, camera: Camera, side: int, expression: Tensor | None) -> Surfaces:
        """:meth:`surfaces` of whole images, cached unless the scalar field or the camera learns."""
        learning = (camera.cam2world, camera.intrinsics, *self.predictor.parameters())
        if torch.is_grad_enabled() and any(x.requires_grad for x in learning):
            return self.surfaces(ws, *unit_rays(camera, side)[:2])
        state = (weights_version(self.predictor), side)
        keys = [bytes(label) for label in camera.label().detach().float().cpu().numpy()]
        with torch.no_grad():
            return Surfaces.cat([
                self._cache.get((key, state), lambda i=i: self.surfaces(ws, *unit_rays(camera[i], side)[:2]))
                for i, key in enumerate(keys)
            ])  # fmt: skip

    def trace(
        self, ws: Latents, origins: Tensor, directions: Tensor, surfaces: Surfaces, edit: Edit | None = None
    ) -> Traced:
        """Composite the radiance of what rays meet.

        Args:
            ws: B codes.
            origins, directions: (C, P, 3), unit; C is a multiple of B. Any rays, a patch of an image for instance.
            surfaces: what they meet, see :meth:`surfaces`.
        """
        rows, shape, layers = len(ws), surfaces.valid.shape, surfaces.valid.shape[-1]
        final = surfaces.plane.clone()
        final[..., -1] = True
        needed = surfaces.valid | final if self.last_back else surfaces.valid
        # What nobody sees is not evaluated.
        needed = needed.reshape(rows, -1)
        index = pad_sequence([row.nonzero()[:, 0] for row in needed], batch_first=True, padding_value=needed.shape[1])
        points = surfaces.points(origins, directions)
        asked = (points if surfaces.shift is None else points + surfaces.shift).reshape(rows, -1, 3)
        points = points.reshape(rows, -1, 3)
        directions = self.view(directions).reshape(rows, -1, 3)
        code = self.field.modulate(ws.groups["ws"])

        def radiance(part: Tensor) -> Tensor:
            part = part.clamp_max(needed.shape[1] - 1)  # padding looks anywhere
            xyz = part.expand(-1, -1, 3)
            x = asked.gather(1, xyz)
            seen = directions.gather(1, torch.div(xyz, layers, rounding_mode="floor"))
            if edit is None:
                found = self.activate(self.field(code, x, seen))
            else:
                found = self.decode(edit(points.gather(1, xyz), self._features(code, x)), seen)
            assert found.density is not None
            return torch.cat([found.colour, found.density], -1)

        found = in_chunks(radiance, index[..., None], self.field.width, self)
        sample = found.new_zeros(rows, needed.shape[1] + 1, 4).scatter(1, index[..., None].expand_as(found), found)
        colour, density = sample[:, :-1].reshape(*shape, 4).split([3, 1], -1)
        if self.white_plane:
            colour = torch.where(surfaces.plane[..., None], 1.0, colour)

        delta = torch.where(final, self.delta_final, self.delta)[..., None]
        weights = layer_weights(density_alpha(density, delta) * surfaces.valid[..., None])  # T_i a_i (Eq. 3)
        missed = 1 - weights.sum(2)
        backdrop = 1.0 if self.white_back else -1.0
        if self.last_back:
            weights = weights + F.pad(missed[:, :, None], (0, 0, layers - 1, 0))
            backdrop += 1.0  # white comes on top of it, as released
        return Traced((weights * colour).sum(2) + backdrop * missed, weights[..., 0], missed[..., 0])

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
        side = resolution or self.resolution
        ws = ws.repeat_interleave(rows // len(ws))
        with full_precision(camera.cam2world):
            ws = ws.to(self.mean.dtype)
            surfaces = self._surfaces(ws, camera, side, expression)
            origins, directions, length = unit_rays(camera, side)
            colour, weights, _ = self.trace(ws, origins, directions, surfaces, edit)
            subject = weights * ~surfaces.plane
            alpha = subject.sum(-1)
            share = subject / alpha.clamp_min(EMPTY)[..., None]
            depth = surfaces.distance / length[..., None]
            mean = (share * depth).sum(-1)
            spread = (share * (depth - mean[..., None]).square()).sum(-1)
            maps = torch.cat([colour, torch.stack([alpha, mean, spread], -1)], -1)
            image, alpha, depth, spread = maps.mT.unflatten(2, (side, side)).split([3, 1, 1, 1], 1)
        return Rendering(
            image=image,
            depth=depth,
            alpha=alpha,
            spread=spread,
            normals=depth_normals(depth.detach(), alpha.detach(), camera),
        )
