"""A small software rasteriser: exact visibility of a triangle mesh, for previews and checks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from models.camera import Camera
from models.rendering.layers import Layer
from models.rendering.mesh import Mesh
from models.rendering.output import Rendering

CLAY = (0.55, 0.48, 0.42)  # RGB in [-1, 1] of an uncoloured mesh
_TILE = 8  # pixels


def rasterise(mesh: Mesh, camera: Camera, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which triangle each pixel's centre sees, through one camera.

    Args:
        mesh: cost grows with the area in pixels of its triangles' bounding boxes.
        camera: one camera, in front of which the whole mesh lies.

    Returns:
        face (size, size) int64, -1 = background; barycentric (size, size, 3) perspective-correct weights of its
        corners; depth (size, size) camera-z, 0 = background.

    Raises:
        ValueError: for several cameras, or a mesh behind the camera.
    """
    uv, z = camera.project(mesh.vertices[None].expand(len(camera), -1, -1))
    if len(camera) != 1 or not (z > 0).all():
        raise ValueError("one camera at a time is rasterised, and the mesh must lie in front of it")
    corners = (uv[0] * size - 0.5)[mesh.faces]  # (F, 3, 2) in pixels, centres at whole numbers
    inverse = 1 / z[0][mesh.faces]  # 1 / z is linear over the image
    low = corners.amin(1).ceil().clamp_min(0)
    high = corners.amax(1).floor().clamp_max(size - 1)
    area = _cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    faces = ((high >= low).all(1) & (area.abs() > 1e-9)).nonzero()[:, 0]
    faces, low, high = _tiles(faces, low[faces], high[faces])
    extent = (high - low + 1).amax(1)

    pixels, depths, owners = [], [], []
    # Tiles of equal extent together, so that small ones do not pay for large ones.
    for side in range(1, _TILE + 1):
        chosen = extent == side
        first, last, of = low[chosen], high[chosen], faces[chosen]
        for dy in range(side if len(of) else 0):
            for dx in range(side):
                at = first + torch.tensor([dx, dy])
                weights = _barycentric(corners[of], at, area[of])
                inside = (weights >= 0).all(1) & (at <= last).all(1)
                at, owner = at[inside].long(), of[inside]
                pixels.append(at[:, 1] * size + at[:, 0])
                depths.append(1 / (weights[inside] * inverse[owner]).sum(1))
                owners.append(owner)
    face = torch.full((size * size,), -1, dtype=torch.int64)
    depth = torch.zeros(size * size)
    if pixels:
        pixel, distance, owner = torch.cat(pixels), torch.cat(depths), torch.cat(owners)
        order = distance.argsort(descending=True, stable=True)  # the nearest is written last
        nearest = torch.full((size * size,), math.inf).scatter_reduce(0, pixel, distance, "amin")
        order = order[distance[order] == nearest[pixel[order]]]
        face[pixel[order]] = owner[order]
        depth = torch.where(nearest.isfinite(), nearest, 0.0)
    rows = torch.arange(size * size)
    at = torch.stack([rows % size, rows // size], -1).to(corners.dtype)
    seen = face.clamp_min(0)
    weights = _barycentric(corners[seen], at, area[seen]) * inverse[seen]
    weights = torch.where((face >= 0)[:, None], weights / weights.sum(1, keepdim=True), 0.0)
    return face.reshape(size, size), weights.reshape(size, size, 3), depth.reshape(size, size)


def _tiles(faces: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (F, 2) of faces (F,) in parts of at most 8 pixels a side: whose each is, and its first and last pixel."""
    across, down = ((high - low + _TILE) / _TILE).floor().long().unbind(1)
    count = across * down
    row = torch.arange(len(faces)).repeat_interleave(count)
    number = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
    first = low[row] + _TILE * torch.stack([number % across[row], number // across[row]], 1)
    return faces[row], first, torch.minimum(first + _TILE - 1, high[row])


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _barycentric(corners: Tensor, at: Tensor, area: Tensor) -> Tensor:
    """Weights (P, 3) of the corners (P, 3, 2) at image points (P, 2); ``area`` (P,) is signed and doubled."""
    a, b, c = (corner - at for corner in corners.unbind(1))
    return torch.stack([_cross(b, c), _cross(c, a), _cross(a, b)], 1) / area[:, None]


def draw(mesh: Mesh, camera: Camera, size: int, *, coloured: bool = True, supersample: int = 2) -> Rendering:
    """Pictures of a mesh on white: its colours as they are, or grey clay under a light beside the camera.

    Args:
        camera: B cameras.
        supersample: samples per pixel and axis.

    Returns:
        image, depth, alpha and normals, (B, ., size, size).
    """
    images, depths, alphas, normals = [], [], [], []
    for i in range(len(camera)):
        one = camera[i]
        face, weights, depth = rasterise(mesh, one, size * supersample)
        corners = mesh.faces[face.clamp_min(0)]
        normal = F.normalize((mesh.normals[corners] * weights[..., None]).sum(2), dim=-1, eps=1e-12)
        hit = (face >= 0)[..., None].float()
        if coloured:
            colour = (mesh.colours[corners] * weights[..., None]).sum(2)
        else:
            right, down, forward = one.cam2world[0, :3, :3].unbind(1)
            light = F.normalize(-forward - 0.5 * down - 0.45 * right, dim=0)
            shade = 0.25 + 0.75 * (normal @ light).clamp_min(0)
            colour = (torch.tensor(CLAY) + 1) * shade[..., None] - 1
        layers = torch.cat([colour * hit, depth[..., None], hit, normal], -1).movedim(-1, 0)[None]
        mean = F.avg_pool2d(layers, supersample)
        rgb, distance, alpha, normal = mean.split((3, 1, 1, 3), 1)
        images.append(rgb + (1 - alpha))
        depths.append(distance / alpha.clamp_min(1e-6))
        alphas.append(alpha)
        normals.append(F.normalize(normal, dim=1, eps=1e-12))
    return Rendering(
        image=torch.cat(images), depth=torch.cat(depths), alpha=torch.cat(alphas), normals=torch.cat(normals)
    )


def draw_layers(layers: Sequence[Layer], camera: Camera, size: int, *, supersample: int = 2) -> Rendering:
    """Pictures of layers as a viewer blends them: each over those before it, on white; without depth.

    Args:
        layers: in painting order; of each its front is drawn, where it is nearest to the camera.
        camera: B cameras. supersample: as of :func:`draw`.
    """
    images, alphas = [], []
    side = size * supersample
    for i in range(len(camera)):
        image, alpha = torch.ones(3, side, side), torch.zeros(1, side, side)
        hidden = torch.full((side, side), math.inf)  # depth behind which the core hides all
        for layer in layers:
            a, b, c = layer.vertices[layer.faces].unbind(1)
            towards = camera.position[i] - a
            faces = layer.faces[(torch.linalg.cross(b - a, c - a) * towards).sum(1) > 0]  # the others show their back
            if not len(faces):
                continue
            shape = Mesh(layer.vertices, faces, layer.vertices, layer.vertices)  # neither colours nor normals
            face, weights, depth = rasterise(shape, camera[i], side)
            uv = (layer.uv[faces[face.clamp_min(0)]] * weights[..., None]).sum(2)
            texels = F.grid_sample(layer.texture[None], 2 * uv[None] - 1, align_corners=False, padding_mode="border")[0]
            opacity = texels[3:] * ((face >= 0) & (depth <= hidden))
            if layer.core:
                opacity = (opacity > 0.5).float()
                hidden = torch.where(opacity[0] > 0, depth, hidden)
            image, alpha = torch.lerp(image, texels[:3], opacity), torch.lerp(alpha, torch.ones(()), opacity)
        images.append(image)
        alphas.append(alpha)
    image, alpha = (F.avg_pool2d(torch.stack(maps), supersample) for maps in (images, alphas))
    return Rendering(image=image, alpha=alpha)
