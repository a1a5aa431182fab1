"""Shapes, albedo and light of heads against the truth (Wang et al., Table II; GAN2Shape; Unsup3D)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from models.camera import Camera
from models.metrics.geometry import eroded, relief_errors
from models.metrics.image import masked_mean
from models.relief.shape import Shape
from models.rendering.relief import Relief, rotation_matrix

PROTOCOL, VERSION = "shape", "1"


@dataclass(frozen=True)
class SurfaceTruth:
    """What a picture shows, seen by its camera.

    Attributes:
        depth: (1, 1, S, S) along the camera's axis, world units. mask: (1, 1, S, S) of the head, in [0, 1].
        face: (1, 1, S, S) of the face without hair and glasses, 0 or 1.
        albedo: (1, 3, S, S) in [-1, 1].
        towards: (1, 3) unit vector to the strongest light, in the camera's axes.
        camera: one. distance: of the camera from the point that heads turn around, world units.
    """

    depth: Tensor
    mask: Tensor
    face: Tensor
    albedo: Tensor
    towards: Tensor
    camera: Camera
    distance: float

    def to(self, device: torch.device) -> SurfaceTruth:
        """On another device."""
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if not isinstance(v, float)})


def as_relief(relief: Relief, depth: Tensor, camera: Camera, distance: float) -> Tensor:
    """Depth along a camera's axis (B, 1, S, S), in world units, as a depth map of ``relief``.

    A depth map says nothing of how far away, how large, or how long the lens: d = centre + scale (z - distance), where
    the scale makes the two pictures equally wide at the point that heads turn around. It is exact where the two fields
    of view are the same. Where the camera's is wider, as the embedded world's 23.5 degrees are than the papers' 10,
    a method that reads a picture by its own lens can find this map, and no better one: what the lens alone does to the
    outline counts for neither side.

    Raises:
        ValueError: for maps that are not square.
    """
    size = depth.shape[-1]
    if depth.shape[-2] != size:
        raise ValueError(f"depth maps are square, got {tuple(depth.shape)}")
    reach = 0.5 / camera.intrinsics[:, 0, 0] * (size - 1) / size  # x / z of the last pixel's centre
    scale = relief.reach * relief.centre / (reach * distance)
    return relief.centre + scale.view(-1, 1, 1, 1).to(depth) * (depth - distance)


def albedo_error(albedo: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Root mean square error of the share of light that comes back (B,), after the best common factor.

    How bright the light is and how bright the face, no picture tells.

    Args:
        albedo, truth: (B, 3, S, S) in [-1, 1], which stands for shares in [0, 1]. mask: (B, 1, S, S).
    """
    a, b = (albedo + 1) / 2, (truth + 1) / 2
    factor = masked_mean(a * b, mask) / masked_mean(a.square(), mask)
    return masked_mean((factor.view(-1, 1, 1, 1) * a - b).square(), mask).sqrt()


def surface_errors(relief: Relief, shape: Shape, truth: SurfaceTruth) -> dict[str, Tensor]:
    """Errors (1,) of one head in the view of its picture.

    Returns:
        ``side`` and ``mad`` of :func:`models.metrics.geometry.relief_errors`, of the head and, as ``side_face`` and
        ``mad_face``, of the face alone; ``albedo`` of the face; ``light``, the angle between the strongest lights, in
        degrees. NaN where masks share no pixel.
    """
    depth, mask = relief.turned(shape.depth, shape.view)
    solid = (truth.mask > 0.5).to(depth)
    target = torch.where(solid > 0, as_relief(relief, truth.depth, truth.camera, truth.distance), relief.nothing)
    found = relief_errors(relief, depth, mask, target, solid)
    face = relief_errors(relief, depth, mask, target, truth.face.to(depth))
    albedo = relief.carried(shape.albedo, depth, shape.view)
    towards = (rotation_matrix(shape.view[:, :3]) @ shape.lit.towards[..., None])[..., 0]
    cosine = (F.normalize(towards, dim=1) * F.normalize(truth.towards, dim=1)).sum(1).clamp(-1, 1)
    return {
        **found,
        **{f"{name}_face": value for name, value in face.items()},
        "albedo": albedo_error(albedo, truth.albedo, eroded(mask) * eroded(truth.face.to(mask))),
        "light": torch.rad2deg(torch.acos(cosine)),
    }
