"""The one protocol every generator follows, and the containers that travel through it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from models.camera import Camera, Rig
from models.configurable import Configurable
from models.errors import shown

Edit = Callable[[Tensor, Tensor], Tensor]
"""(points (B, P, 3), features (B, P, C)) -> features (B, P, C), differentiable."""


@dataclass(frozen=True)
class Latents:
    """Ordered named groups of style codes.

    Attributes:
        groups: name -> (B, num_ws, w_dim). Most generators have one group, "ws".
    """

    groups: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.groups.values())))

    def __getitem__(self, index: int | slice | Tensor) -> Latents:
        if isinstance(index, int):
            index = slice(index, index + 1) if index != -1 else slice(-1, None)
        return self.map(lambda t: t[index])

    @property
    def ws(self) -> Tensor:
        """(B, num_ws, w_dim) of a generator with a single group.

        Raises:
            ValueError: when there are several groups.
        """
        if len(self.groups) != 1:
            raise ValueError(f"these latents have the groups {list(self.groups)}; name one")
        return next(iter(self.groups.values()))

    def map(self, function: Callable[[Tensor], Tensor]) -> Latents:
        """Apply a function to every group."""
        return Latents({name: function(t) for name, t in self.groups.items()})

    def _zip(self, other: Latents, function: Callable[[Tensor, Tensor], Tensor]) -> Latents:
        if list(self.groups) != list(other.groups):
            raise ValueError(f"latent groups differ: {list(self.groups)} and {list(other.groups)}")
        return Latents({name: function(t, other.groups[name]) for name, t in self.groups.items()})

    def lerp(self, other: Latents, amount: float | Tensor) -> Latents:
        """self + amount * (other - self), group by group."""
        return self._zip(other, lambda a, b: a + amount * (b - a))

    def mix(self, other: Latents, layer: int) -> Latents:
        """Style mixing: codes before ``layer`` from self, from ``layer`` on from ``other``.

        Layers are counted through the groups in order.
        """
        mixed, start = {}, 0
        for name, ours in self.groups.items():
            theirs = other.groups[name]
            keep = min(max(layer - start, 0), ours.shape[1])
            mixed[name] = torch.cat([ours[:, :keep], theirs[:, keep:]], 1)
            start += ours.shape[1]
        return Latents(mixed)

    def mean(self) -> Latents:
        """The mean code of the batch, as a batch of one."""
        return self.map(lambda t: t.mean(0, keepdim=True))

    def truncate(self, centre: Latents, psi: float, cutoff: int | None = None) -> Latents:
        """Truncation trick: codes before layer ``cutoff`` (all by default) pulled to ``centre`` by ``psi``."""
        truncated = centre.lerp(self, psi)
        return truncated if cutoff is None else truncated.mix(self, cutoff)

    def repeat_interleave(self, repeats: int) -> Latents:
        """Repeat each item ``repeats`` times in place."""
        return self.map(lambda t: t.repeat_interleave(repeats, 0))

    def detach(self) -> Latents:
        """Detached from the graph."""
        return self.map(Tensor.detach)

    def to(self, *args: object, **kwargs: object) -> Latents:
        """Move or cast every group, as ``Tensor.to``."""
        return self.map(lambda t: t.to(*args, **kwargs))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Rendering:
    """What a synthesis returns. Fields a generator cannot give are None."""

    image: Tensor
    """(B, 3, H, W) RGB in [-1, 1]."""
    raw: Tensor | None = None
    """(B, 3, h, w) image before super-resolution."""
    depth: Tensor | None = None
    """(B, 1, h, w) expected camera-z of the subject where alpha > 0, world units; background excluded."""
    alpha: Tensor | None = None
    """(B, 1, h, w) coverage of the subject in [0, 1]."""
    spread: Tensor | None = None
    """(B, 1, h, w) variance of the visible depth, squared world units: 0 for a crisp surface, more for fog."""
    normals: Tensor | None = None
    """(B, 3, h, w) unit normals on world axes, facing the camera; 0 where alpha = 0."""
    features: Tensor | None = None
    """(B, C, h, w) rendered features, where the generator has them."""
    taps: dict[str, Tensor] = field(default_factory=dict)
    """Requested block outputs by name."""

    def replace(self, **changes: object) -> Rendering:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class FieldSample:
    """Radiance at points."""

    colour: Tensor
    """(B, P, 3) RGB in [-1, 1]."""
    density: Tensor | None = None
    """(B, P, 1) volume density, 1 / world unit."""
    sdf: Tensor | None = None
    """(B, P, 1) signed distance, world units, negative inside."""
    occupancy: Tensor | None = None
    """(B, P, 1) opacity of one surface layer, in [0, 1]."""


class Generator(Configurable):
    """A generator: latent codes and a camera in, a :class:`Rendering` out.

    Attributes:
        z_dim: size of z.
        num_ws, w_dim: of the group "ws" (sums over groups where there are several).
        resolution: native image side in pixels.
        is_3d: False for a 2D generator, which refuses a camera.
        free_resolution: whether it renders at other resolutions than the native one.
        rig: how to look at it.
        expressions: names of the expression coefficients; empty when it cannot animate.
    """

    z_dim: int
    num_ws: int
    w_dim: int
    resolution: int
    is_3d: bool = True
    free_resolution: bool = True
    rig: Rig
    expressions: tuple[str, ...] = ()

    def validate(self) -> None:
        for name, least in {"resolution": 1, "z_dim": 0, "w_dim": 0}.items():
            value = getattr(self, name, least)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {shown(value)}")
        if not isinstance(getattr(self, "rig", Rig()), Rig):
            raise ValueError(f"rig must be a models.camera.Rig, got {shown(self.rig)}")
        if not all(isinstance(name, str) for name in self.expressions):
            raise ValueError(f"expressions must be names, got {shown(self.expressions)}")

    @abstractmethod
    def mapping(
        self, z: Tensor, *, camera: Camera | None = None, truncation: float = 1.0, cutoff: int | None = None
    ) -> Latents:
        """z (B, z_dim), or Z+ (B, num_ws, z_dim), to style codes."""

    @abstractmethod
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
        """Render style codes.

        Args:
            camera: as many cameras as codes, or V times as many: code i is seen by cameras i*V .. i*V+V-1,
                at the cost of one backbone pass.
            expression: (B, E) coefficients per code, or per camera; None is neutral.
            edit: runs between ``features`` and ``decode`` of a radiance generator.
            randomness: the caller's generator or tensors for any random draw; None is deterministic.
            taps: names of block outputs to return; see ``tap_names``.
            resolution: image side where it is free; the native one by default.
        """

    def forward(self, z: Tensor, camera: Camera | None = None, **options: object) -> Rendering:
        """``synthesis(mapping(z), camera, **options)``."""
        return self.synthesis(self.mapping(z), camera, **options)  # type: ignore[arg-type]

    def sample_z(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """(count, z_dim) from N(0, I), drawn on the CPU."""
        return torch.randn(count, self.z_dim, generator=generator)

    @property
    @abstractmethod
    def mean_latents(self) -> Latents:
        """The mean style code, a batch of one."""

    @property
    def tap_names(self) -> tuple[str, ...]:
        """Names that ``synthesis(taps=...)`` accepts."""
        return ()

    def check_taps(self, taps: Sequence[str]) -> None:
        """Refuse names that are not in ``tap_names``.

        Raises:
            ValueError: naming the unknown taps and the known ones.
        """
        unknown = sorted(set(taps) - set(self.tap_names))
        if unknown:
            raise ValueError(f"unknown taps {unknown}; {type(self).__name__} has {self.tap_names}")

    def affine_weights(self, layers: Sequence[int] | None = None) -> Tensor:
        """Stacked style-affine weights (rows, w_dim) of the chosen layers (SeFa; V space)."""
        raise NotImplementedError(f"{type(self).__name__} has no style affines")

    def check_expression(self, expression: Tensor | None, batch: int) -> Tensor | None:
        """Validate an expression code.

        Raises:
            ValueError: when this generator cannot animate, or the size is wrong.
        """
        if expression is None:
            return None
        if not self.expressions:
            raise ValueError(f"{type(self).__name__} cannot animate: it has no expressions")
        if expression.ndim != 2 or expression.shape[1] != len(self.expressions) or len(expression) != batch:
            raise ValueError(
                f"expression must be ({batch}, {len(self.expressions)}) for {self.expressions}, "
                f"got {tuple(expression.shape)}"
            )
        return expression

    def check_views(self, ws: Latents, camera: Camera | None, expression: Tensor | None) -> tuple[Camera, int]:
        """The cameras, and how many rows the field is asked in.

        Returns:
            the camera; and B, so that one lookup serves all views of a code, or the number of cameras where
            each has its own expression.

        Raises:
            ValueError: without a camera, when their number is no multiple of B, or the expression does not fit.
        """
        if camera is None:
            raise ValueError("a 3D generator needs a camera")
        if len(camera) % len(ws):
            raise ValueError(f"{len(camera)} cameras for {len(ws)} codes: their number must be a multiple")
        rows = len(camera) if expression is not None and len(expression) == len(camera) else len(ws)
        self.check_expression(expression, rows)
        return camera, rows


class RadianceGenerator(Generator):
    """A generator with a radiance field that can be asked at any point."""

    @abstractmethod
    def features(self, ws: Latents, points: Tensor, expression: Tensor | None = None) -> Tensor:
        """Field features (B, P, C) at world points (B, P, 3)."""

    @abstractmethod
    def decode(self, features: Tensor, directions: Tensor | None = None) -> FieldSample:
        """Radiance from features (B, P, C) seen along unit directions (B, P, 3)."""


@dataclass(frozen=True)
class Verdict:
    """A discriminator's answer."""

    logits: Tensor
    """(B, 1)."""
    pose: Tensor | None = None
    """(B, 2) regressed yaw and pitch, radians."""
    features: tuple[Tensor, ...] = ()
    """Block outputs, fine to coarse."""


class Discriminator(Configurable):
    """``(image, camera=None) -> Verdict``."""

    resolution: int

    @abstractmethod
    def forward(self, image: Tensor, camera: Camera | None = None) -> Verdict:
        """Judge images (B, 3, H, W) in [-1, 1]."""
