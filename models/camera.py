"""Cameras: axes, units and labels, stated once.

World: the face sits near the origin and looks along +z; y is up; x is the viewer's right
when looking at the face from the front. Camera: OpenCV axes (x right, y down, z forward).
Angles are radians here and degrees on the command line and in YAML. Positive yaw moves the
camera towards +x, positive pitch moves it up. Intrinsics are normalised by the image size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

LABEL_SIZE = 25  # 16 row-major cam2world entries, then 9 row-major intrinsics (EG3D's dataset.json)


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Keep matrix products out of the caller's autocast: rays in half precision miss their pixel."""
    return torch.autocast(tensor.device.type, enabled=False)


@dataclass(frozen=True)
class Camera:
    """A batch of pinhole cameras.

    Attributes:
        cam2world: (B, 4, 4) rigid transform from camera to world coordinates.
        intrinsics: (B, 3, 3) normalised by image size: u = fx * x / z + cx in [0, 1].
    """

    cam2world: Tensor
    intrinsics: Tensor

    def __post_init__(self) -> None:
        if self.cam2world.ndim != 3 or self.cam2world.shape[1:] != (4, 4):
            raise ValueError(f"cam2world must be (B, 4, 4), got {tuple(self.cam2world.shape)}")
        if self.intrinsics.shape != (len(self.cam2world), 3, 3):
            raise ValueError(f"intrinsics must be ({len(self.cam2world)}, 3, 3), got {tuple(self.intrinsics.shape)}")

    def __len__(self) -> int:
        return len(self.cam2world)

    def __getitem__(self, index: int | slice | Tensor) -> Camera:
        if isinstance(index, int):
            index = slice(index, index + 1) if index != -1 else slice(-1, None)
        return Camera(self.cam2world[index], self.intrinsics[index])

    @property
    def device(self) -> torch.device:
        return self.cam2world.device

    @property
    def position(self) -> Tensor:
        """(B, 3) camera centres in the world."""
        return self.cam2world[:, :3, 3]

    @property
    def forward(self) -> Tensor:
        """(B, 3) unit viewing directions in the world."""
        return self.cam2world[:, :3, 2]

    @property
    def yaw(self) -> Tensor:
        """(B,) radians, from the viewing direction."""
        return torch.atan2(-self.forward[:, 0], -self.forward[:, 2])

    @property
    def pitch(self) -> Tensor:
        """(B,) radians, from the viewing direction."""
        return torch.asin((-self.forward[:, 1]).clamp(-1, 1))

    def to(self, *args: object, **kwargs: object) -> Camera:
        """Move or cast both tensors, as ``Tensor.to``."""
        return Camera(self.cam2world.to(*args, **kwargs), self.intrinsics.to(*args, **kwargs))  # type: ignore[arg-type]

    def repeat_interleave(self, repeats: int) -> Camera:
        """Repeat each camera ``repeats`` times in place: (B,) -> (B * repeats,)."""
        return Camera(self.cam2world.repeat_interleave(repeats, 0), self.intrinsics.repeat_interleave(repeats, 0))

    @staticmethod
    def cat(cameras: list[Camera]) -> Camera:
        """Concatenate batches of cameras."""
        return Camera(torch.cat([c.cam2world for c in cameras]), torch.cat([c.intrinsics for c in cameras]))

    def label(self) -> Tensor:
        """(B, 25) EG3D labels: row-major cam2world, then row-major intrinsics."""
        return torch.cat([self.cam2world.flatten(1), self.intrinsics.flatten(1)], 1)

    @staticmethod
    def from_label(label: Tensor) -> Camera:
        """Cameras from (B, 25) labels.

        Raises:
            ValueError: when a label does not have 25 numbers, or its rotation is not orthonormal.
        """
        if label.ndim != 2 or label.shape[1] != LABEL_SIZE:
            raise ValueError(f"a camera label has {LABEL_SIZE} numbers, got shape {tuple(label.shape)}")
        cam2world = label[:, :16].reshape(-1, 4, 4)
        rotation = cam2world[:, :3, :3]
        error = (rotation @ rotation.mT - torch.eye(3, dtype=label.dtype, device=label.device)).abs().max()
        if not error < 1e-2:
            raise ValueError(f"camera label: rotation is not orthonormal (error {float(error):.3g})")
        return Camera(cam2world, label[:, 16:].reshape(-1, 3, 3))

    @staticmethod
    def look_at(position: Tensor, target: Tensor, focal: Tensor | float) -> Camera:
        """Cameras at ``position`` (B, 3) looking at ``target`` (B, 3) or (3,), world y up.

        Args:
            focal: normalised focal length (image widths), a number or (B,).
        """
        forward = F.normalize(target - position, dim=-1)
        up = torch.tensor([0.0, 1.0, 0.0], dtype=position.dtype, device=position.device).expand_as(forward)
        right = F.normalize(torch.linalg.cross(forward, up), dim=-1)
        down = torch.linalg.cross(forward, right)
        batch = len(position)
        cam2world = torch.eye(4, dtype=position.dtype, device=position.device).repeat(batch, 1, 1)
        cam2world[:, :3, :3] = torch.stack([right, down, forward], -1)
        cam2world[:, :3, 3] = position
        intrinsics = torch.eye(3, dtype=position.dtype, device=position.device).repeat(batch, 1, 1)
        intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = torch.as_tensor(focal, dtype=position.dtype, device=position.device)
        intrinsics[:, :2, 2] = 0.5
        return Camera(cam2world, intrinsics)

    def rays(self, height: int, width: int | None = None) -> tuple[Tensor, Tensor]:
        """Rays through pixel centres, row by row.

        Returns:
            origins (B, H*W, 3) and directions (B, H*W, 3). Directions have unit camera-z
            component, NOT unit length: ``origin + depth * direction`` has camera depth ``depth``.
        """
        width = width or height
        options = {"dtype": self.cam2world.dtype, "device": self.cam2world.device}
        v = (torch.arange(height, **options) + 0.5) / height
        u = (torch.arange(width, **options) + 0.5) / width
        v, u = torch.meshgrid(v, u, indexing="ij")
        return self.rays_at(torch.stack([u.flatten(), v.flatten()], -1).expand(len(self), -1, -1))

    def rays_at(self, uv: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`rays`, through image points ``uv`` (B, N, 2) in [0, 1]."""
        k = self.intrinsics
        y = (uv[..., 1] - k[:, None, 1, 2]) / k[:, None, 1, 1]
        x = (uv[..., 0] - k[:, None, 0, 2] - k[:, None, 0, 1] * y) / k[:, None, 0, 0]
        local = torch.stack([x, y, torch.ones_like(x)], -1)
        with _full_precision(local):
            directions = local @ self.cam2world[:, :3, :3].mT
        return self.position[:, None].expand_as(directions), directions

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Project world points (B, N, 3) to image points (B, N, 2) in [0, 1] and depths (B, N)."""
        with _full_precision(points):
            local = (points - self.position[:, None]) @ self.cam2world[:, :3, :3]
            depth = local[..., 2]
            image = (local / depth[..., None]) @ self.intrinsics.mT
        return image[..., :2], depth

    def turn(self, yaw: Tensor | float, pivot: Tensor | tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Camera:
        """The cameras swung around the vertical axis through ``pivot``: yaw grows, pitch and roll stay.

        Args:
            yaw: radians, a number or (B,).
            pivot: (3,) world units.
        """
        yaw = torch.as_tensor(yaw, dtype=self.cam2world.dtype, device=self.device).expand(len(self))
        centre = torch.as_tensor(pivot, dtype=self.cam2world.dtype, device=self.device)
        turned = torch.eye(4, dtype=self.cam2world.dtype, device=self.device).repeat(len(self), 1, 1)
        turned[:, 0, 0] = turned[:, 2, 2] = yaw.cos()
        turned[:, 0, 2], turned[:, 2, 0] = yaw.sin(), -yaw.sin()
        with _full_precision(turned):
            turned[:, :3, 3] = centre - turned[:, :3, :3] @ centre
            return Camera(turned @ self.cam2world, self.intrinsics)

    def mirror(self) -> Camera:
        """The camera that sees the mirrored head (x -> -x) as the mirrored image."""
        flip = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0], dtype=self.cam2world.dtype, device=self.device))
        intrinsics = self.intrinsics.clone()
        intrinsics[:, 0, 2] = 1 - intrinsics[:, 0, 2]
        intrinsics[:, 0, 1] = -intrinsics[:, 0, 1]
        with _full_precision(flip):
            return Camera(flip @ self.cam2world @ flip, intrinsics)


@dataclass(frozen=True)
class Rig:
    """How a generator is looked at: the only way to make an orbit or a random pose for it.

    Attributes:
        radius: distance of the camera from the centre of its sphere, world units.
        focal: normalised focal length (1 / (2 tan(fov / 2))).
        pivot: the point looked at.
        centre: of the sphere of cameras; None is the pivot. EG3D's cameras look at a point before the centre.
        near, far: depth range that holds the subject.
        yaw_std, pitch_std: of the training poses, radians.
        distribution: "gaussian" (truncated at ``yaw_max``/``pitch_max`` from the mean) or "uniform" up to there.
        yaw_max, pitch_max: largest angles from the mean that the generator was trained for, radians.
        yaw_mean, pitch_mean: of the training poses, radians.
    """

    radius: float = 7.0
    focal: float = 2.4038
    pivot: tuple[float, float, float] = (0.0, -0.06, 0.0)
    near: float = 5.25
    far: float = 9.2
    yaw_std: float = 0.3
    pitch_std: float = 0.155
    distribution: str = "gaussian"
    yaw_max: float = math.radians(60)
    pitch_max: float = math.radians(25)
    centre: tuple[float, float, float] | None = None
    yaw_mean: float = 0.0
    pitch_mean: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "pivot", tuple(float(v) for v in self.pivot))
        if self.centre is not None:
            object.__setattr__(self, "centre", tuple(float(v) for v in self.centre))
        if self.distribution not in ("gaussian", "uniform"):
            raise ValueError(f"rig.distribution must be gaussian or uniform, got {self.distribution!r}")
        numbers = (
            "radius",
            "focal",
            "near",
            "far",
            "yaw_std",
            "pitch_std",
            "yaw_max",
            "pitch_max",
            "yaw_mean",
            "pitch_mean",
        )
        for name in numbers:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"rig.{name} must be a finite number, got {value!r}")
        if not (self.radius > 0 and self.focal > 0):
            raise ValueError(f"rig needs a radius and a focal length above 0, got {self.radius} and {self.focal}")
        if not 0 < self.near < self.far:
            raise ValueError(f"rig needs 0 < near < far, got near={self.near}, far={self.far}")

    def camera(self, yaw: Tensor | float, pitch: Tensor | float = 0.0, device: torch.device | str = "cpu") -> Camera:
        """Cameras on the sphere of this rig; ``yaw`` and ``pitch`` in radians, numbers or (B,)."""
        across, up = torch.broadcast_tensors(
            torch.as_tensor(yaw, dtype=torch.float32, device=device).reshape(-1),
            torch.as_tensor(pitch, dtype=torch.float32, device=device).reshape(-1),
        )
        pivot = torch.tensor(self.pivot, device=device)
        centre = pivot if self.centre is None else torch.tensor(self.centre, device=device)
        offset = torch.stack([across.sin() * up.cos(), up.sin(), across.cos() * up.cos()], -1)
        return Camera.look_at(centre + self.radius * offset, pivot, self.focal)

    def angles(self, camera: Camera) -> tuple[Tensor, Tensor]:
        """Where cameras stand around this rig's centre, as :meth:`camera` takes it: yaw and pitch (B,), radians."""
        centre = torch.tensor(self.pivot if self.centre is None else self.centre).to(camera.position)
        across, up, ahead = F.normalize(camera.position - centre, dim=1).unbind(1)
        return torch.atan2(across, ahead), torch.asin(up.clamp(-1, 1))

    def within(self, yaw: Tensor, pitch: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest angles that the generator was trained for, radians."""
        return (
            self.yaw_mean + (yaw - self.yaw_mean).clamp(-self.yaw_max, self.yaw_max),
            self.pitch_mean + (pitch - self.pitch_mean).clamp(-self.pitch_max, self.pitch_max),
        )

    @property
    def frame(self) -> float:
        """What a picture is wide at the pivot, world units."""
        return self.radius / self.focal

    @property
    def scale(self) -> float:
        """World units that are as long beside the head as one is with the default rig."""
        return self.frame / Rig().frame

    def random(self, count: int, generator: torch.Generator | None = None) -> Camera:
        """``count`` cameras from the training pose distribution, drawn on the CPU."""
        if self.distribution == "gaussian":
            yaw, pitch = torch.randn(2, count, generator=generator)
            yaw, pitch = yaw * self.yaw_std, pitch * self.pitch_std
        else:
            yaw, pitch = torch.rand(2, count, generator=generator) * 2 - 1
            yaw, pitch = yaw * self.yaw_max, pitch * self.pitch_max
        yaw, pitch = yaw.clamp(-self.yaw_max, self.yaw_max), pitch.clamp(-self.pitch_max, self.pitch_max)
        return self.camera(self.yaw_mean + yaw, self.pitch_mean + pitch)

    def orbit(self, count: int, yaw_max: float = math.radians(36), pitch: float = 0.0) -> Camera:
        """``count`` cameras at constant pitch, up to ``yaw_max`` to each side of the mean, end points included.

        No farther than the generator was trained for, as in :meth:`turntable`.
        """
        yaw_max = min(yaw_max, self.yaw_max)
        return self.camera(self.yaw_mean + torch.linspace(-yaw_max, yaw_max, count), pitch)

    def turntable(self, count: int, yaw_max: float = math.radians(36), pitch_max: float = math.radians(8)) -> Camera:
        """A closed loop of ``count`` cameras that sways left, right, up and down."""
        phase = torch.arange(count) * (2 * math.pi / count)
        yaw, pitch = min(yaw_max, self.yaw_max) * phase.sin(), min(pitch_max, self.pitch_max) * (2 * phase).sin()
        return self.camera(self.yaw_mean + yaw, self.pitch_mean + pitch)

    def dolly(self, count: int, farthest: float = 4.0) -> Camera:
        """A closed loop of ``count`` cameras that go away and come close, the pivot as large as ever (dolly zoom).

        Args:
            farthest: from the pivot, in radii. The nearest is three times as far as what lies before it reaches.
        """
        front, pivot = self.camera(self.yaw_mean, self.pitch_mean), torch.tensor(self.pivot)
        nearest = 3 * (self.radius - self.near) / self.radius
        phase = (1 - (torch.arange(count) * (2 * math.pi / count)).cos()) / 2
        scale = nearest * (farthest / nearest) ** phase
        return Camera.look_at(pivot + scale[:, None] * (front.position - pivot), pivot, self.focal * scale)

    def replace(self, **changes: object) -> Rig:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]
