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
_CHUNK = 1 << 18  # pixels of triangles' boxes at once
_LEAST_AREA = 1e-9  # twice that of a triangle in square pixels: smaller ones are seen from the edge
_OWNER = (1 << 32) - 1
_NOTHING = (1 << 63) - 1


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
    face, depth = (found[0] for found in nearest_faces(corners[None], inverse[None], size))
    rows = torch.arange(size * size)
    at = torch.stack([rows % size, rows // size], -1).to(corners.dtype)
    seen = face.flatten().clamp_min(0)
    weights = edge_weights(corners[seen], at) / doubled_area(corners[seen])[:, None] * inverse[seen]
    weights = torch.where((face >= 0).flatten()[:, None], weights / weights.sum(1, keepdim=True), 0.0)
    return face, weights.reshape(size, size, 3), depth


@torch.no_grad()
def nearest_faces(corners: Tensor, inverse: Tensor, size: int, slack: float = 0.0) -> tuple[Tensor, Tensor]:
    """Which triangle is the nearest at each pixel's centre, in several images at once, on any device.

    Both sides of a triangle are seen. Of several at the same depth, in fp32, it is the first.

    Args:
        corners: (B, F, 3, 2) in pixels, centres at whole numbers.
        inverse: (B, F, 3) 1 / camera-z of the corners, above 0.
        size: of the images.
        slack: how far, in pixels and in weights of a corner, a triangle reaches beyond its edges.

    Returns:
        face (B, size, size) int64, -1 = background; depth (B, size, size) fp32 camera-z, 0 = background.
    """
    count, number = corners.shape[:2]
    corners, inverse = corners.flatten(0, 1), inverse.flatten(0, 1)
    low = (corners.amin(1) - slack).ceil().clamp(0, size)
    high = (corners.amax(1) + slack).floor().clamp(-1, size - 1)
    area = doubled_area(corners)
    faces = ((high >= low).all(1) & (area.abs() > _LEAST_AREA)).nonzero()[:, 0]
    left, top = low[faces].long().unbind(1)
    across, down = (high - low + 1)[faces].long().unbind(1)
    ends = (across * down).cumsum(0)  # of each triangle's box in a list of all boxes' pixels
    # The upper half of a key is the depth, whose bits as an integer are in the same order, the lower half the triangle.
    keys = torch.full((count * size * size,), _NOTHING, device=corners.device)
    for start in range(0, int(ends[-1]) if len(ends) else 0, _CHUNK):
        pixel = torch.arange(start, min(start + _CHUNK, int(ends[-1])), device=corners.device)
        row = torch.searchsorted(ends, pixel, right=True)
        inside = pixel - (ends - across * down)[row]
        y = inside.div(across[row], rounding_mode="floor")
        x = left[row] + inside - y * across[row]
        y, owner = top[row] + y, faces[row]
        weights = edge_weights(corners[owner], torch.stack([x, y], 1).to(corners.dtype)) / area[owner, None]
        hit = (weights >= -slack).all(1).nonzero()[:, 0]
        owner = owner[hit]
        depth = (1 / (weights[hit] * inverse[owner]).sum(1)).float()
        key = (depth.view(torch.int32).long() << 32) | owner
        keys.scatter_reduce_(0, (owner // number * size + y[hit]) * size + x[hit], key, "amin")
    seen = keys != _NOTHING
    face = torch.where(seen, (keys & _OWNER) % max(number, 1), -1)
    depth = torch.where(seen, (keys >> 32).int().view(torch.float32), 0.0)
    return face.reshape(count, size, size), depth.reshape(count, size, size)


def edge_weights(corners: Tensor, at: Tensor) -> Tensor:
    """Weights (P, 3) of the corners (P, 3, 2) at image points (P, 2), times :func:`doubled_area`."""
    a, b, c = (corner - at for corner in corners.unbind(1))
    return torch.stack([_cross(b, c), _cross(c, a), _cross(a, b)], 1)


def doubled_area(corners: Tensor) -> Tensor:
    """Twice the area (P,) of triangles (P, 3, 2), negative for those whose corners turn the other way."""
    return _cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


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
