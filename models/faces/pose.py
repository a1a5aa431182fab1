"""How a head is turned, from the 468 points of its mesh and a face that all people share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.camera import Camera
from models.configurable import Configurable
from models.faces.mesh import POINTS

TRIANGLES, BASIS = 898, 33
DEPTH = 1.25
"""By how much the mesh understates depth, chosen between factors tried on the pictures that the recipe was tuned on:
without one the heads of five were seen turned by .85 to 1.09 of the angle, with 1.2 those of ten by .86 to 1.14, with
1.3 those of five by .91 to 1.12."""


class CanonicalFace(Configurable):
    """MediaPipe's mean face.

    Attributes:
        vertices: (468, 3) cm, x to the face's left, which is a viewer's right, y up, z to the front.
        triangles: (898, 3) vertices of each.
        uv: (468, 2) place on a texture, from 0 to 1.
        basis: (33,) the points that move least with expression, by which a pose is fitted.
        weights: (33,) how much each counts.
    """

    vertices: Tensor
    triangles: Tensor
    uv: Tensor
    basis: Tensor
    weights: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("vertices", torch.zeros(POINTS, 3))
        self.register_buffer("triangles", torch.zeros(TRIANGLES, 3, dtype=torch.int64))
        self.register_buffer("uv", torch.zeros(POINTS, 2))
        self.register_buffer("basis", torch.zeros(BASIS, dtype=torch.int64))
        self.register_buffer("weights", torch.zeros(BASIS))

    def head_pose(self, points: Tensor) -> Tensor:
        """Rotation of heads by weighted Procrustes analysis of the basis; differentiable.

        Args:
            points: (B, 468, 3) of meshes: x right, y down, z away from the viewer, in one unit.

        Returns:
            (B, 3, 3) from the canonical face's axes to the viewer's: x right, y up, z towards the viewer.
        """
        there = points[:, self.basis] * points.new_tensor([1.0, -1.0, -1.0])
        here = self.vertices[self.basis].expand_as(there)
        return similarity(here, there, self.weights)[0].to(points.dtype)


def similarity(source: Tensor, target: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The rotation, scale and shift that bring points nearest to others: weighted least squares, in float64.

    Umeyama, "Least-squares estimation of transformation parameters between two point patterns", 1991.

    Args:
        source, target: (B, N, D).
        weights: (N,), equal ones without.

    Returns:
        (B, D, D), (B,), (B, D): target is scale * rotation @ source + shift.
    """
    exact = torch.float32 if source.device.type == "mps" else torch.float64  # which has no other
    source, target = source.to(exact), target.to(exact)
    weights = torch.ones_like(source[0, :, 0]) if weights is None else weights.to(exact)
    weights = (weights / weights.sum())[:, None]
    means = (weights * source).sum(1), (weights * target).sum(1)
    a, b = source - means[0][:, None], target - means[1][:, None]
    u, s, vh = torch.linalg.svd((weights * b).mT @ a)
    signs = torch.ones_like(s)
    signs[:, -1] = torch.linalg.det(u @ vh).detach().sign()  # no mirror images
    rotation = (u * signs[:, None]) @ vh
    scale = (s * signs).sum(1) / (weights * a * a).sum((1, 2))
    return rotation, scale, means[1] - scale[:, None] * (rotation @ means[0][..., None])[..., 0]


def yaw_pitch_roll(rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How a camera sees heads that are turned so, radians; differentiable.

    Yaw and pitch are those of :mod:`models.camera`: positive yaw is a camera on the side of +x (the face looks to the
    picture's left), positive pitch one from above (the face looks down). Roll is what remains, a turn in the picture
    alone, positive clockwise: it is undone by a square turned by the same angle, see :mod:`models.faces.crop`.

    Args:
        rotation: (B, 3, 3) as :meth:`CanonicalFace.head_pose`.

    Returns:
        Three times (B,).
    """
    right, toward = rotation[:, 0], rotation[:, 2]  # the viewer's axes, in the head's
    x, y, z = toward.unbind(1)
    flat = (x * x + z * z).clamp(min=torch.finfo(rotation.dtype).eps).sqrt()
    level = torch.stack([z / flat, torch.zeros_like(x), -x / flat], 1)  # to the right, where there is no roll
    up = torch.linalg.cross(toward, level)
    roll = torch.atan2((right * up).sum(1), (right * level).sum(1))
    return torch.atan2(x, z), torch.atan2(y, flat), roll


def lift(points: Tensor, camera: Camera, depth: Tensor) -> Tensor | None:
    """Points of a mesh where they are in the world, so that other cameras see them too.

    Args:
        points: (468, 3) in units of the picture's side, z away from the viewer.
        camera: of the picture, one.
        depth: (1, 1, H, W) camera-z of the head in the picture; 0 where it is not. It says how far away the mesh is
            as a whole, which the mesh does not know.

    Returns:
        (468, 3); None where the head is nowhere under the face.
    """
    places = points[:, :2]
    there = F.grid_sample(depth, (2 * places - 1)[None, None], mode="nearest", align_corners=False).flatten()
    focal = camera.intrinsics[0, 0, 0]
    hit = there > 0
    if not hit.any():
        return None
    # A picture is depth / focal wide: z in the world grows with the distance, which is nearly the same for all points.
    middle = there[hit].median()
    z = DEPTH * points[:, 2] * middle / focal
    along = z + (there - z)[hit].median()
    origins, directions = camera.rays_at(places[None])
    return (origins + along[:, None] * directions)[0]
