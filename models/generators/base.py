"""The one protocol every generator follows, and the containers that travel through it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.camera import Camera, Rig
from models.configurable import Configurable
from models.errors import shown
from models.latents import Latents
from models.rendering.mesh import Mesh
from models.rendering.output import Edit, FieldSample, Rendering

if TYPE_CHECKING:
    from models.generators.baked import BakedHead


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that learn at a rate of their own.

    Attributes:
        parameters: the members.
        lr_scale: their usual learning rate, relative to that of the whole.
    """

    parameters: list[nn.Parameter]
    lr_scale: float = 1.0


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
        relightable: whether its renderings have albedo and normals, so that they can be lit anew.
    """

    z_dim: int
    num_ws: int
    w_dim: int
    resolution: int
    is_3d: bool = True
    free_resolution: bool = True
    rig: Rig
    expressions: tuple[str, ...] = ()
    relightable: bool = False

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

    def complete(self, ws: Latents) -> Latents:
        """Codes of which whole groups are missing, with all groups; where nothing tells a group, it is the mean one.

        Args:
            ws: of an encoder, say, that predicts some groups only.
        """
        mean = self.mean_latents.groups
        return Latents({name: ws.groups.get(name, code.expand(len(ws), -1, -1)) for name, code in mean.items()})

    def update_mean(self, count: int = 10_000, seed: int = 0) -> None:
        """Set ``mean_latents`` from ``count`` random z; nothing where it is not such a mean."""

    def parameter_groups(self) -> dict[str, ParameterGroup]:
        """What is trained, by name; parameters of no group are not."""
        return {"main": ParameterGroup(list(self.parameters()))}

    def bake(
        self,
        ws: Latents,
        size: int,
        *,
        expression: Tensor | None = None,
        edit: Edit | None = None,
        stride: int = 4,
    ) -> BakedHead | None:
        """One head's radiance laid down on its surfaces, to be seen without a network; None where it has none.

        Args:
            ws: a batch of one.
            size: side of a texture, pixels.
            expression: (1, E). edit: as of ``synthesis``.
            stride: of :class:`models.generators.baked.BakedHead`.

        Raises:
            ValueError: for several codes.
        """
        return None

    def mesh(self, ws: Latents, expression: Tensor | None = None) -> Mesh | None:
        """One head's surface; None where it is not known as such, and :func:`models.rendering.mesh.fuse` makes it.

        Args:
            ws: a batch of one. expression: (1, E).
        """
        return None

    @property
    def noise_sides(self) -> list[int]:
        """Sides of the noise maps that ``synthesis`` takes as ``randomness``; empty where there are none."""
        return []

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
class DiscriminatorOutput:
    """A discriminator's answer."""

    logits: Tensor
    """(B, 1)."""
    pose: Tensor | None = None
    """(B, 2) regressed yaw and pitch, radians."""
    features: tuple[Tensor, ...] = ()
    """Block outputs, fine to coarse."""


class Discriminator(Configurable):
    """``(image, camera=None) -> DiscriminatorOutput``.

    Attributes:
        resolution: side of the images, pixels.
        camera_conditioned: whether it judges an image together with its camera; otherwise it takes none.
    """

    resolution: int
    camera_conditioned: bool = False

    @abstractmethod
    def forward(self, image: Tensor, camera: Camera | None = None) -> DiscriminatorOutput:
        """Judge images (B, 3, H, W) in [-1, 1]."""

    def narrowed(self, side: int) -> Discriminator:
        """A copy that judges smaller images: its layers from ``side`` on, behind a new first one.

        Raises:
            ValueError: when it has no layers for that.
        """
        raise ValueError(f"a {type(self).__name__} for {self.resolution} px has no layers that judge {side} px alone")
