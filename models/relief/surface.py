"""The surface of a shape as a mesh that ends where the head does."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.relief.shape import Shape
from models.rendering.mesh import Mesh
from models.rendering.relief import BORDER, Relief, grid_triangles
from models.rendering.sheets import enlarge

FINE = 2  # vertices along a side of a pixel
EDGE = 0.5  # of the mask
TEXELS = 4  # of the texture along a side of a pixel


def surface(shape: Shape, relief: Relief) -> Mesh:
    """The surface of one head, in the world (:meth:`models.rendering.relief.Relief.world`), on the CPU.

    Its colours are the albedo's. It is cut off along the mask's contour, and where the maps lie back at their border;
    of several parts the largest is kept.

    Raises:
        ValueError: for several heads.
    """
    if len(shape) != 1:
        raise ValueError(f"one surface at a time, got {len(shape)} heads")
    shape = shape.to("cpu", torch.float32)
    size = shape.depth.shape[-1]
    mask = torch.ones_like(shape.depth) if shape.mask is None else shape.mask.clone()
    mask[..., :BORDER] = mask[..., -BORDER:] = 0
    depth, albedo, mask = (_finer(maps) for maps in (shape.depth, shape.albedo, mask))
    fine = depth.shape[-1]
    at = (torch.arange(fine) / (fine - 1) * (size - 1) + 0.5) / size
    places = torch.stack(torch.meshgrid(at, at, indexing="xy"))  # in the texture
    maps = torch.cat([relief.world(relief.points(depth))[0], albedo[0].clamp(-1, 1), places])
    corners, faces = cut(maps.flatten(1).T, grid_triangles(fine, maps.device), mask.flatten() - EDGE)
    vertices, colours, uv = (part.contiguous() for part in corners.split((3, 3, 2), 1))
    bare = Mesh.of(vertices, faces, colours)
    return Mesh(vertices, faces, colours, bare.normals, uv)


def painted(mesh: Mesh, shape: Shape, relief: Relief) -> Mesh:
    """A surface in the light of its picture, with a texture, to be taken along to other viewers."""
    picture = relief.shaded(shape.depth, shape.albedo, shape.lit)[0].clamp(-1, 1).float().cpu()
    texture = enlarge(picture, TEXELS * picture.shape[-1])
    assert mesh.uv is not None
    grid = (2 * mesh.uv - 1)[None, None]
    colours = F.grid_sample(picture[None], grid, padding_mode="border", align_corners=False)[0, :, 0].T.contiguous()
    return Mesh(mesh.vertices, mesh.faces, colours, mesh.normals, mesh.uv, texture)


def cut(corners: Tensor, faces: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """The part of a triangle mesh where a level is above 0, cut along the line where it is 0; its largest piece.

    Args:
        corners: (V, C) what the vertices hold. faces: (F, 3). level: (V,) linear on each triangle.

    Returns:
        (W, C) and (G, 3); none where the level is above 0 nowhere.
    """
    held = level > 0
    inside = held[faces]
    count = inside.sum(1)
    whole = faces[count == 3]
    one, two = faces[count == 1], faces[count == 2]
    # The corner that is alone on its side comes first; the order around stays.
    one = _from(one, inside[count == 1].int().argmax(1))
    two = _from(two, inside[count == 2].int().argmin(1))
    edges = torch.cat([one[:, :2], one[:, ::2], two[:, :2], two[:, ::2]])
    low, high = edges.sort(1).values.unbind(1)
    keys, number = torch.unique(low * len(level) + high, return_inverse=True)
    a, b = keys // len(level), keys % len(level)
    share = (level[a] / (level[a] - level[b]))[:, None]
    number = number + len(corners)
    p, q, r, s = number.split([len(one), len(one), len(two), len(two)])
    parts = [whole, torch.stack([one[:, 0], p, q], 1)]
    parts += [torch.stack([r, two[:, 1], two[:, 2]], 1), torch.stack([r, two[:, 2], s], 1)]
    return _largest(torch.cat([corners, torch.lerp(corners[a], corners[b], share)]), torch.cat(parts))


def _from(faces: Tensor, first: Tensor) -> Tensor:
    """Triangles that begin with another of their corners."""
    return faces.gather(1, (first[:, None] + torch.arange(3)) % 3)


def _largest(corners: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    """The piece of a mesh with most triangles, without the vertices of none."""
    from scipy.sparse import coo_array  # here: only meshes need it
    from scipy.sparse.csgraph import connected_components

    if not len(faces):
        return corners[:0], faces
    a, b, c = faces.numpy().T
    ends = np.concatenate([a, b]), np.concatenate([b, c])
    joined = coo_array((np.ones(len(ends[0]), np.int8), ends), shape=(len(corners),) * 2)
    piece = torch.from_numpy(connected_components(joined, directed=False)[1]).long()
    own = piece[faces[:, 0]]
    faces = faces[own == own.bincount().argmax()]
    used, index = torch.unique(faces, return_inverse=True)
    return corners[used], index


def _finer(maps: Tensor) -> Tensor:
    """(1, C, S, S) with more vertices, the outermost in their places."""
    fine = FINE * (maps.shape[-1] - 1) + 1
    return F.interpolate(maps, (fine, fine), mode="bicubic", align_corners=True)
