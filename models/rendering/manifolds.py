"""Surface manifolds: the level sets of a scalar predictor, and where rays first meet them.

Source: GRAM (Deng et al., 2022) and GRAMInverter (Deng et al., 2023), Sec. 3.1 and A.3.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from models.camera import Camera
from models.configurable import Configurable
from models.rendering.pointwise import affine, in_chunks

Item = TypeVar("Item")


def weights_version(module: nn.Module) -> Hashable:
    """Changes whenever a weight of ``module`` changes or moves."""
    return tuple((p.data_ptr(), p._version, p.device) for p in module.parameters())


class ManifoldPredictor(Configurable):
    """M: R^3 -> R, whose level sets are the manifolds (GRAMInverter, Eq. 1).

    Args:
        hidden: width of each hidden layer.
        layers: number of hidden layers.
        centre, radius: of the initial sphere, in units of ``scale``.
        extent: half side of the cube in which the levels live, world units.
        grid: side of the grid that :meth:`baked` samples the predictor on.
        activation: "softplus", for smooth surfaces, or "relu" as GRAM's.
        start: "exact", a sphere's signed distance to which a network is added that starts at zero, or "geometric", a
            network that starts near ten times such a distance (SAL, Atzmon & Lipman, 2020), as GRAM's.
        scale: what world coordinates are multiplied by; GRAM's cube of side .24 is brought to [-1, 1].

    Raises:
        ValueError: when ``activation`` or ``start`` is neither.
    """

    centre: Tensor

    def __init__(
        self,
        hidden: int = 64,
        layers: int = 3,
        centre: Sequence[float] = (0.0, 0.0, 0.0),
        radius: float = 0.9,
        extent: float = 1.8,
        grid: int = 80,
        activation: str = "softplus",
        start: str = "exact",
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if activation not in ("softplus", "relu"):
            raise ValueError(f"activation must be softplus or relu, got {activation!r}")
        if start not in ("exact", "geometric"):
            raise ValueError(f"start must be exact or geometric, got {start!r}")
        widths = [3, *[hidden] * layers]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.last = nn.Linear(hidden, 1)
        if start == "geometric":
            for layer in self.hidden:
                nn.init.normal_(layer.weight, std=math.sqrt(2 / hidden))  # type: ignore[arg-type]
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            nn.init.constant_(self.last.weight, 10 * math.sqrt(math.pi / hidden))
            nn.init.constant_(self.last.bias, -10 * radius)
        else:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)
        self.start, self.scale = start, scale
        self.register_buffer("centre", torch.tensor([float(v) for v in centre]), persistent=False)
        self.radius, self.extent, self.grid, self.activation = radius, extent, grid, activation
        self._baked: tuple[object, Tensor] | None = None

    def forward(self, points: Tensor) -> Tensor:
        """(..., 3) world points -> (...) scalar, fp32."""
        with torch.autocast(points.device.type, enabled=False):
            flat = points.float().reshape(1, -1, 3)
            return in_chunks(self._at, flat, self.last.in_features).reshape(points.shape[:-1])

    def _at(self, points: Tensor) -> Tensor:
        """(1, P, 3) -> (1, P, 1)."""
        points = points * self.scale
        x = points - self.centre if self.start == "geometric" else points
        for layer in self.hidden:
            x = affine(x, layer.weight[None], layer.bias[None, None])  # type: ignore[index]
            x = F.relu(x) if self.activation == "relu" else F.softplus(x, beta=10.0)
        if self.start == "geometric":
            return self.last(x)
        return (points - self.centre).norm(dim=-1, keepdim=True) - self.radius + self.last(x)

    @property
    def version(self) -> Hashable:
        """Changes whenever a weight changes or moves."""
        return weights_version(self)

    def baked(self) -> Callable[[Tensor], Tensor]:
        """The predictor as a trilinear lookup, without gradient: about 30 times cheaper per point.

        The grid is made again whenever a weight has changed.
        """
        key = self.version
        if self._baked is None or self._baked[0] != key:
            with torch.no_grad():
                axis = torch.linspace(-self.extent, self.extent, self.grid, device=self.centre.device)
                z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
                self._baked = key, self(torch.stack([x, y, z], -1))[None, None]
        volume = self._baked[1]

        def lookup(points: Tensor) -> Tensor:
            grid = (points / self.extent).reshape(1, -1, 1, 1, 3)
            return F.grid_sample(volume, grid, align_corners=True, padding_mode="border").reshape(points.shape[:-1])

        return lookup


@dataclass(frozen=True)
class Brackets:
    """Between which samples of a ray its first crossings of N levels lie.

    Attributes:
        after: (..., N) index of the sample behind the crossing.
        fraction: (..., N) of the way from the sample before to the one behind, in [0, 1].
        valid: (..., N) whether the ray enters the level set there.
    """

    after: Tensor
    fraction: Tensor
    valid: Tensor

    def at(self, samples: Tensor) -> Tensor:
        """Interpolate what was sampled (..., S, D) along the rays, to (..., N, D)."""
        before, behind = (
            samples.gather(-2, index[..., None].expand(*index.shape, samples.shape[-1]))
            for index in (self.after - 1, self.after)
        )
        return torch.lerp(before, behind, self.fraction[..., None])


def first_brackets(values: Tensor, levels: Tensor, *, flat: float = 0.0, both_ways: bool = False) -> Brackets:
    """Where rays first go down through each level, by one linear (secant) step between samples (GRAM, Sec. 3.1).

    Without a crossing it is the last sample, and invalid.

    Args:
        values: (..., S) along the rays.
        levels: (N,).
        flat: values that differ by no more are not interpolated: the crossing is the sample behind.
        both_ways: look for the first crossing in either direction; one that goes up is invalid (AniFaceGAN).
    """
    before, behind = values.detach()[..., :-1], values.detach()[..., 1:]
    after, valid = [], []
    for level in levels.unbind():  # all at once would be N times the memory
        enters = (before >= level) & (behind <= level)
        crosses = enters | (before <= level) & (behind >= level) if both_ways else enters
        found, interval = crosses.to(torch.uint8).max(-1)
        after.append(torch.where(found > 0, interval + 1, values.shape[-1] - 1))
        valid.append(enters.gather(-1, after[-1][..., None] - 1)[..., 0])
    after, valid = torch.stack(after, -1), torch.stack(valid, -1)
    high, low = values.gather(-1, after - 1), values.gather(-1, after)
    steep = valid & (high - low > flat)
    fraction = torch.where(steep, (high - levels) / torch.where(steep, high - low, 1.0), 1.0)
    return Brackets(after, fraction, valid)


def first_crossings(
    scalar: Callable[[Tensor], Tensor],
    origins: Tensor,
    directions: Tensor,
    levels: Tensor,
    *,
    near: float,
    far: float,
    samples: int = 48,
    flat: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Depth of each ray's first crossing of each level, by sampling and one linear step (GRAM).

    Args:
        scalar: (..., 3) -> (...), larger outside.
        origins, directions: (B, R, 3).
        levels: (N,).
        flat: as :func:`first_brackets`.

    Returns:
        depth (B, R, N) along ``directions`` and valid (B, R, N); depth is ``far`` where there is no crossing.
    """
    steps = torch.linspace(near, far, samples, device=origins.device, dtype=origins.dtype)
    values = scalar(origins[:, :, None] + steps[:, None] * directions[:, :, None])  # (B, R, S)
    found = first_brackets(values, levels, flat=flat)
    return torch.lerp(steps[found.after - 1], steps[found.after], found.fraction), found.valid


def upsample_crossings(depth: Tensor, valid: Tensor, side: int, target: int) -> tuple[Tensor, Tensor]:
    """Bilinearly upsample crossings found on a coarse image grid, one manifold at a time (GRAMInverter, A.3).

    A fine pixel is valid where more than .99 of its bilinear weight is valid (GRAM-HD).

    Args:
        depth, valid: (B, side * side, N).

    Returns:
        the same at (B, target * target, N).
    """
    if side == target:
        return depth, valid

    def resize(x: Tensor) -> Tensor:
        x = x.mT.reshape(len(x), -1, side, side)
        return F.interpolate(x, size=(target, target), mode="bilinear", align_corners=False).flatten(2).mT

    return resize(depth), resize(valid.to(depth.dtype)) > 0.99


@dataclass(frozen=True)
class Crossings:
    """Where the rays of a batch of C cameras meet N manifolds; K is the largest number of rays that meet any.

    Attributes:
        pixel: (C, K) row-major pixel of each ray; the number of pixels where the row is padding.
        depth: (C, K, N) camera-z, world units.
        valid: (C, K, N) whether the ray meets that manifold.
        uv: (C, K, N, 2) canonical chart coordinates; None where nobody asks for them.
    """

    pixel: Tensor
    depth: Tensor
    valid: Tensor
    uv: Tensor | None = None

    def scatter(self, values: Tensor, pixels: int) -> Tensor:
        """Put per-ray values (C, K, D) back into the image: (C, pixels, D), 0 where no manifold is met."""
        image = values.new_zeros(len(values), pixels + 1, values.shape[-1])
        index = self.pixel[..., None].expand_as(values)
        return image.scatter(1, index, values)[:, :-1]

    def points(self, camera: Camera, side: int) -> Tensor:
        """World points (C, K, N, 3) of the crossings in an image of ``side`` pixels."""
        pixel = self.pixel.clamp_max(side * side - 1)  # padding looks anywhere
        uv = torch.stack([pixel % side + 0.5, torch.div(pixel, side, rounding_mode="floor") + 0.5], -1) / side
        origins, directions = camera.rays_at(uv)
        return origins[:, :, None] + self.depth[..., None] * directions[:, :, None]

    @staticmethod
    def stack(items: Sequence[Crossings], pixels: int) -> Crossings:
        """Batch crossings of single cameras, padded to the longest."""

        def pad(name: str, fill: float) -> Tensor:
            return pad_sequence([getattr(c, name)[0] for c in items], batch_first=True, padding_value=fill)

        uv = None if items[0].uv is None else pad("uv", 0.0)
        return Crossings(pad("pixel", pixels), pad("depth", 1.0), pad("valid", 0), uv)


class CrossingCache(Generic[Item]):
    """Crossings of cameras seen before, dropped oldest first beyond a memory budget.

    Training sets and tuning loops look through the same cameras again and again, and crossings depend on nothing
    but the camera and the predictor. An item is a dataclass of tensors.
    """

    def __init__(self, megabytes: int = 256) -> None:
        self.budget, self.used = megabytes * 2**20, 0
        self.items: OrderedDict[Hashable, Item] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Item]) -> Item:
        """The entry of ``key``, made if it is missing."""
        if key in self.items:
            self.items.move_to_end(key)
            return self.items[key]
        made = self.items[key] = make()
        self.used += self._size(made)
        while self.used > self.budget and len(self.items) > 1:
            self.used -= self._size(self.items.popitem(last=False)[1])
        return made

    @staticmethod
    def _size(item: object) -> int:
        return sum(t.numel() * t.element_size() for t in vars(item).values() if isinstance(t, Tensor))

    def __deepcopy__(self, memo: object) -> CrossingCache[Item]:
        return CrossingCache(self.budget >> 20)  # a copy of the generator fills its own


def fit_predictor(
    predictor: ManifoldPredictor,
    points: Tensor,
    values: Tensor,
    *,
    steps: int = 3000,
    batch: int = 4096,
    lr: float = 3e-3,
    generator: torch.Generator | None = None,
) -> float:
    """Regress the predictor to known scalar values, for instance a mean signed distance.

    Args:
        points: (P, 3). values: (P,).

    Returns:
        the root mean square error over the last tenth of the steps, in units of ``values``.
    """
    optimiser = torch.optim.Adam(predictor.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    tail = []
    for step in range(steps):
        pick = torch.randint(len(points), (batch,), generator=generator)
        loss = F.mse_loss(predictor(points[pick]), values[pick])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step >= steps * 9 // 10:
            tail.append(loss.item())
    return (sum(tail) / len(tail)) ** 0.5
