"""Canonical head coordinates, and a radiance field stored as one texture per surface manifold."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from models.configurable import Configurable
from models.rendering.atlas import Chart
from models.rendering.output import FieldSample


class HeadChart(Chart):
    """Cylinder-like coordinates (u, v) in [-1, 1] around a vertical axis, finest at the face.

    u grows with the azimuth and v downwards, as image rows do. Rows are stretched near the crown, where the
    surface turns horizontal.

    Args:
        azimuth_max: degrees from the front that the chart covers on each side.
        bottom, top: heights covered, world units.
        crown: height above which rows are stretched.
        focus_u, focus_v: degrees in (0, 90); coordinates are sines that end at this angle, so that the middle is
            finer than the borders. Near 0 the chart is uniform.
        axis_z: where the axis passes, world units.
        lean: how much the axis leans back above the crown. All azimuths meet on it: hair worn high on the back of
            the head can only be painted when the axis passes through it.
    """

    closed = True

    def __init__(
        self,
        azimuth_max: float = 150.0,
        bottom: float = -1.55,
        top: float = 1.3,
        crown: float = 0.7,
        focus_u: float = 85.0,
        focus_v: float = 65.0,
        axis_z: float = -0.1,
        lean: float = 0.0,
    ) -> None:
        super().__init__()
        if not (0 < focus_u < 90 and 0 < focus_v < 90):
            raise ValueError(f"chart: focus_u and focus_v must lie in (0, 90) degrees, got {focus_u} and {focus_v}")
        self.azimuth_max, self.crown, self.axis_z, self.lean = math.radians(azimuth_max), crown, axis_z, lean
        self.focus_u, self.focus_v = math.radians(focus_u), math.radians(focus_v)
        self.low, self.high = bottom, top + max(top - crown, 0.0) ** 2

    def _axis(self, y: Tensor) -> Tensor:
        """z of the axis at height ``y``."""
        return self.axis_z - self.lean * (y - self.crown).clamp_min(0)

    def forward(self, points: Tensor) -> Tensor:
        """World points (..., 3) -> (..., 2) chart coordinates, clamped where the chart ends."""
        x, y, z = points.unbind(-1)
        u = torch.atan2(x, z - self._axis(y)) / self.azimuth_max
        height = y + (y - self.crown).clamp_min(0).square()
        v = 1 - 2 * (height - self.low) / (self.high - self.low)
        # The sine turns back beyond 90 degrees: clamp there.
        u = torch.sin((u * self.focus_u).clamp(-math.pi / 2, math.pi / 2)) / math.sin(self.focus_u)
        v = torch.sin((v * self.focus_v).clamp(-math.pi / 2, math.pi / 2)) / math.sin(self.focus_v)
        return torch.stack([u, v], -1)

    def _place(self, uv: Tensor) -> tuple[Tensor, Tensor]:
        """Azimuth, radians, and height y, world units, of chart coordinates (..., 2)."""
        u, v = uv.unbind(-1)
        limit = 1 - 1e-6  # the slope of asin is infinite at 1
        u = torch.asin((u * math.sin(self.focus_u)).clamp(-limit, limit)) / self.focus_u
        v = torch.asin((v * math.sin(self.focus_v)).clamp(-limit, limit)) / self.focus_v
        height = self.low + (1 - v) / 2 * (self.high - self.low)
        above = (height - self.crown).clamp_min(0)  # inverts y + (y - crown)^2
        return u * self.azimuth_max, torch.where(above > 0, self.crown + ((1 + 4 * above).sqrt() - 1) / 2, height)

    def displace(self, points: Tensor, shift: Tensor) -> Tensor:
        """Move world points (..., 3) by a chart shift (..., 2): around the axis and along it."""
        x, y, z = points.unbind(-1)
        z = z - self._axis(y)
        azimuth, y = self._place(self(points) + shift)
        radius = (x.square() + z.square()).clamp_min(1e-12).sqrt()
        return torch.stack([radius * azimuth.sin(), y, radius * azimuth.cos() + self._axis(y)], -1)

    def segments(self, uv: Tensor, extent: float) -> tuple[Tensor, Tensor]:
        """As :class:`Chart`: horizontal lines that end on the axis."""
        azimuth, y = self._place(uv)
        axis = torch.stack([torch.zeros_like(y), y, self._axis(y)], -1)
        outwards = torch.stack([azimuth.sin(), torch.zeros_like(y), azimuth.cos()], -1)
        return axis + math.sqrt(2) * extent * outwards, axis


class FrontalChart(Chart):
    """Coordinates (u, v) in [-1, 1] across a square seen along -z, for manifolds that all face the front (GRAM-HD).

    Args:
        centre: a point before or behind the square's middle. reach: half its side, world units.
    """

    centre: Tensor

    def __init__(self, centre: Sequence[float] = (0.0, 0.0, 0.0), reach: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("centre", torch.tensor([float(v) for v in centre]), persistent=False)
        self.reach = reach

    def forward(self, points: Tensor) -> Tensor:
        """World points (..., 3) -> (..., 2), clamped at the square's border; v grows downwards."""
        x, y, _ = (points - self.centre).unbind(-1)
        return torch.stack([x, -y], -1).div(self.reach).clamp(-1, 1)

    def segments(self, uv: Tensor, extent: float) -> tuple[Tensor, Tensor]:
        """As :class:`Chart`: lines parallel to z, front to back."""
        x, y = (uv * uv.new_tensor([self.reach, -self.reach]) + self.centre[:2]).unbind(-1)
        front, back = (torch.stack([x, y, torch.full_like(x, z)], -1) for z in (extent, -extent))
        return front, back


class TextureStack(Configurable):
    """Radiance as one chart texture per manifold: 3 colour channels and an opacity, all before activation.

    A texel's manifolds lie close together on one head, so they share a colour and paint small differences from it.
    Without that their colours drift apart, each wrong, and only their sum is right from the trained views.

    Args:
        levels: number of manifolds.
        thickness: optical thickness of one manifold; opacity = 1 - exp(-softplus(sigma) * thickness)
            (GRAM: .04). With 1 it equals sigmoid(sigma).
        own_colour: scale of a manifold's own colour against the shared one.
    """

    CHANNELS = 4
    SHARED = 3
    scale: Tensor

    def __init__(self, levels: int, thickness: float = 1.0, own_colour: float = 0.3) -> None:
        super().__init__()
        self.levels, self.thickness = levels, thickness
        scale = torch.tensor([own_colour] * 3 + [1.0])
        self.register_buffer("scale", scale.reshape(4, 1, 1), persistent=False)

    @property
    def channels(self) -> int:
        """Channels of the painted map: the shared colour, then colour and opacity of each manifold."""
        return self.SHARED + self.levels * self.CHANNELS

    def unfold(self, painted: Tensor) -> Tensor:
        """Painted map (B, 3 + levels * 4, S, S) -> textures (B, levels * 4, S, S), the shared colour added."""
        shared, own = painted.split((self.SHARED, self.levels * self.CHANNELS), 1)
        own = own.unflatten(1, (self.levels, self.CHANNELS)) * self.scale.to(own.dtype)
        return (own + F.pad(shared, (0, 0, 0, 0, 0, 1))[:, None]).flatten(1, 2)

    def on_manifolds(self, painted: Tensor, uv: Tensor) -> Tensor:
        """Features of points that lie on the manifolds, by one 2D lookup each.

        Args:
            painted: (B, levels * 4, S, S). uv: (B, P, levels, 2): point p, n lies on manifold n.

        Returns:
            (B, P, levels, 4).
        """
        batch, count = uv.shape[:2]
        textures = painted.reshape(batch * self.levels, self.CHANNELS, *painted.shape[2:])
        grid = uv.transpose(1, 2).reshape(batch * self.levels, count, 1, 2)
        found = F.grid_sample(textures, grid.to(textures.dtype), align_corners=False, padding_mode="border")
        return found.reshape(batch, self.levels, self.CHANNELS, count).permute(0, 3, 1, 2)

    def at(self, painted: Tensor, uv: Tensor, layer: Tensor) -> Tensor:
        """Features at any point, linear between manifolds.

        Args:
            uv: (B, P, 2). layer: (B, P) fractional manifold index in [0, levels - 1].

        Returns:
            (B, P, 4).
        """
        batch, count = uv.shape[:2]
        volume = painted.reshape(batch, self.levels, self.CHANNELS, *painted.shape[2:]).transpose(1, 2)
        # align_corners=False puts index i at (2 i + 1) / levels - 1.
        depth = (2 * layer + 1) / self.levels - 1
        grid = torch.cat([uv, depth[..., None]], -1).reshape(batch, count, 1, 1, 3)
        found = F.grid_sample(volume, grid.to(volume.dtype), align_corners=False, padding_mode="border")
        return found.reshape(batch, self.CHANNELS, count).mT

    def decode(self, features: Tensor) -> FieldSample:
        """(..., 4) -> colour (..., 3) in [-1, 1] and occupancy (..., 1)."""
        colour = torch.tanh(features[..., :3] / 2)
        optical = F.softplus(features[..., 3:].float()) * self.thickness
        return FieldSample(colour=colour, occupancy=-torch.expm1(-optical))
