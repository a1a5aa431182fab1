"""Meshes of anything that renders depth: fuse many views into a distance grid, then march through it.

A view knows two things about a point: whether it lies before or behind the surface the view sees (a truncated
signed distance along the ray), and whether it lies within the silhouette. The first is averaged over the views, the
second holds for all of them, so that parts no view sees from the front, as the back of a head, are closed by the
visual hull.

Sources: volumetric fusion (Curless and Levoy, 1996); marching cubes (Lewiner et al., 2003) of scikit-image.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from models.camera import Camera, Rig
from models.errors import UserError
from models.files import atomic_write
from models.image import to_uint8
from models.rendering.compositing import depth_normals
from models.rendering.output import Rendering

if TYPE_CHECKING:
    from trimesh import Trimesh
    from trimesh.visual.texture import TextureVisuals

REFINE = 4  # fine voxels along a coarse one: only those near the coarse surface are computed
BAND = 4.0  # truncation distance, in voxels
SMOOTHING = 1 / 128  # standard deviation, in sides of the cube: noise of the rendered depth below this vanishes
_COLOURS = "_COLOURS"  # as an attribute of our own, which trimesh writes as it is
OUTVOTED = 2  # silhouettes that must agree before a point is carved away: one view may have a hole


@dataclass(frozen=True)
class Mesh:
    """A triangle mesh with vertex colours.

    Attributes:
        vertices: (V, 3) world points.
        faces: (F, 3) int64 vertex indices, counter-clockwise seen from outside.
        colours: (V, 3) RGB in [-1, 1].
        normals: (V, 3) unit, outwards.
        uv: (V, 2) places in the texture in [0, 1], from the left and from the top; None where there is none.
        texture: (3, H, W) in [-1, 1], which a glTF shows in place of the colours.
    """

    vertices: Tensor
    faces: Tensor
    colours: Tensor
    normals: Tensor
    uv: Tensor | None = None
    texture: Tensor | None = None

    @staticmethod
    def of(vertices: Tensor, faces: Tensor, colours: Tensor) -> Mesh:
        """A mesh whose normals are the area-weighted means of its faces' normals."""
        a, b, c = vertices[faces].unbind(1)
        sides = torch.linalg.cross(b - a, c - a)
        normals = torch.zeros_like(vertices)
        for corner in faces.unbind(1):
            normals.index_add_(0, corner, sides)
        return Mesh(vertices, faces, colours, F.normalize(normals, dim=1, eps=1e-20))

    @property
    def closed(self) -> bool:
        """Whether every edge is between two faces: watertight."""
        return bool(_trimesh(self).is_watertight)


def mesh_cameras(rig: Rig, columns: int = 11, rows: int = 3) -> Camera:
    """Views to fuse: the whole range of poses that the generator was trained for, ``rows`` x ``columns``."""
    yaw = torch.linspace(-rig.yaw_max, rig.yaw_max, columns)
    pitch = torch.linspace(-rig.pitch_max, rig.pitch_max, rows) if rows > 1 else torch.zeros(1)
    return rig.camera(rig.yaw_mean + yaw.repeat(rows), rig.pitch_mean + pitch.repeat_interleave(columns))


def fuse(views: Rendering, camera: Camera, rig: Rig, size: int = 160) -> Mesh:
    """The surface that many views of one subject agree on, as one closed and coloured mesh.

    The mesh fills the cube around the rig's pivot that a frontal view frames; what leaves it is cut off flat.

    Args:
        views: image (V, 3, H, W), depth and alpha (V, 1, h, w) of one subject.
        camera: the V cameras.
        rig: gives the cube.
        size: voxels along a side of the cube.

    Raises:
        UserError: when the views have no depth, or show nothing solid.
        ValueError: when there are not as many cameras as views, or ``size`` is too small.
    """
    if views.depth is None or views.alpha is None:
        raise UserError("a mesh needs depth and opacity, which this generator does not render")
    if len(camera) != len(views.depth) or size < 4 * REFINE:
        raise ValueError(f"{len(camera)} cameras for {len(views.depth)} views, {size} voxels (at least {4 * REFINE})")
    evidence = _Evidence(views.depth.float().cpu(), views.alpha.float().cpu(), camera.to("cpu", torch.float32))
    half = rig.radius / (2 * rig.focal)
    grid = _solid(_distance_grid(evidence, torch.tensor(rig.pivot), half, size))
    if not (grid < 0).any():
        raise UserError("a mesh cannot be made: the views show nothing solid")
    from skimage.measure import marching_cubes  # here: slow to import, and only meshes need it

    # A layer of outside around the cube closes what the cube cuts.
    padded = np.pad(grid, 1, constant_values=1.0)
    found, faces, _, _ = marching_cubes(padded, 0.0, gradient_direction="descent")
    step = 2 * half / (size - 1)
    vertices = torch.from_numpy(found - 1.0).float() * step - half + torch.tensor(rig.pivot)
    mesh = Mesh.of(vertices, torch.from_numpy(faces.astype(np.int64)), torch.zeros_like(vertices))
    colours = evidence.colours(mesh, views.image.float().cpu(), tolerance=BAND * step)
    return Mesh(mesh.vertices, mesh.faces, colours, mesh.normals)


class _Evidence:
    """What the views say about points in space.

    Maps (V, 4, h, w): opacity-weighted depth, opacity, trust, and the signed distance to the silhouette in image
    widths, negative within.
    """

    def __init__(self, depth: Tensor, alpha: Tensor, camera: Camera) -> None:
        self.camera = camera
        facing = _facing(depth, alpha, camera)
        self.maps = torch.cat([depth * alpha, alpha, facing.square(), _outline(alpha)], 1)

    def _look(self, view: int, points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sampled maps (P, 4), z (P,), image points (1, P, 1, 2) in [-1, 1], and whether they are in the frame."""
        uv, z = self.camera[view].project(points[None])
        grid = (2 * uv - 1)[:, :, None]
        sampled = F.grid_sample(self.maps[view : view + 1], grid, align_corners=False, padding_mode="border")
        return sampled[0, :, :, 0].T, z[0], grid, (grid.abs() <= 1).all(-1)[0, :, 0]

    def distance(self, points: Tensor, truncation: float) -> Tensor:
        """Signed distance (P,) to the surface in units of ``truncation``, within [-1, 1], negative inside."""
        total, weight, looks = points.new_zeros(3, len(points)).unbind()
        outside = points.new_full((OUTVOTED, len(points)), -1.0)  # the largest distances to silhouettes
        for view in range(len(self.camera)):
            maps, z, _, framed = self._look(view, points)
            depth = maps[:, 0] / maps[:, 1].clamp_min(1e-4)
            before = (depth - z) / truncation
            known = framed & (maps[:, 1] > 0.5) & (before > -1)
            trust = maps[:, 1] * (maps[:, 2] + 0.02) * known
            total += trust * before.clamp(-1, 1)
            weight += trust
            looks += framed
            width = z / self.camera.intrinsics[view, 0, 0]  # world units of one image width at this depth
            hull = torch.where(framed, (maps[:, 3] * width / truncation).clamp(-1, 1), -1.0)
            outside = torch.cat([outside, hull[None]]).topk(OUTVOTED, 0).values
        surface = torch.where(weight > 0, total / weight.clamp_min(1e-12), -1.0)
        return torch.where(looks < OUTVOTED, 1.0, torch.maximum(surface, outside[-1]))

    def colours(self, mesh: Mesh, images: Tensor, tolerance: float) -> Tensor:
        """Colours (V, 3) of the vertices: views blended by how squarely they see them; hidden ones are filled in."""
        total, weight = torch.zeros_like(mesh.vertices), mesh.vertices.new_zeros(len(mesh.vertices))
        pixel = 1 / self.maps.shape[-1]
        for view in range(len(self.camera)):
            maps, z, grid, framed = self._look(view, mesh.vertices)
            depth = maps[:, 0] / maps[:, 1].clamp_min(1e-4)
            towards = F.normalize(self.camera.position[view] - mesh.vertices, dim=1)
            square = (mesh.normals * towards).sum(1).clamp_min(0) ** 4
            # A pixel at the outline holds some background.
            seen = framed & (maps[:, 1] > 0.9) & (maps[:, 3] < -1.5 * pixel) & ((depth - z).abs() < tolerance)
            trust = square * seen
            colour = F.grid_sample(images[view : view + 1], grid, align_corners=False, padding_mode="border")
            total += trust[:, None] * colour[0, :, :, 0].T
            weight += trust
        known = weight > 1e-3
        if not known.any():
            return total  # grey
        return _spread(mesh, (total / weight.clamp_min(1e-12)[:, None]).clamp(-1, 1), known)


def _facing(depth: Tensor, alpha: Tensor, camera: Camera) -> Tensor:
    """Cosine (V, 1, h, w) between viewing ray and surface normal; small at the edges of occlusions."""
    height, width = depth.shape[-2:]
    directions = F.normalize(camera.rays(height, width)[1], dim=-1).mT.unflatten(2, (height, width))
    return (depth_normals(depth, alpha, camera) * directions).sum(1, keepdim=True).neg().clamp_min(0)


def _outline(alpha: Tensor) -> Tensor:
    """Signed distance (V, 1, h, w) to where the opacity is one half, in image widths, negative within."""
    from scipy.ndimage import distance_transform_edt, gaussian_filter  # here: only meshes need it

    distances = []
    for mask in (alpha[:, 0] > 0.5).numpy():
        far = np.full(mask.shape, float(max(mask.shape)))  # of an image without any outline
        outer = np.asarray(distance_transform_edt(~mask)) if mask.any() else far
        inner = np.asarray(distance_transform_edt(mask)) if not mask.all() else far
        # Whole pixels are counted from their centres; smoothing hides the stairs.
        distances.append(gaussian_filter(np.where(mask, 0.5 - inner, outer - 0.5), 0.8))
    return torch.from_numpy(np.stack(distances)).float()[:, None] / alpha.shape[-1]


def _distance_grid(evidence: _Evidence, centre: Tensor, half: float, size: int) -> np.ndarray:
    """Distances (size, size, size), in voxels of the truncation, indexed x, y, z; computed near the surface only."""
    coarse_size = -(-size // REFINE) + 1
    coarse = _axes(centre, half, coarse_size)
    points = torch.stack(torch.meshgrid(*coarse, indexing="ij"), -1).reshape(-1, 3)
    wide = 2 * half / (coarse_size - 1)
    rough = evidence.distance(points, 2.5 * wide).reshape(1, 1, coarse_size, coarse_size, coarse_size)
    grid = F.interpolate(rough, (size, size, size), mode="trilinear", align_corners=True)[0, 0]
    near = (grid.abs() < 0.95).nonzero()
    points = torch.stack([axis[near[:, i]] for i, axis in enumerate(_axes(centre, half, size))], -1)
    step = 2 * half / (size - 1)
    grid = grid.sign()
    grid[near.unbind(1)] = torch.cat([evidence.distance(chunk, BAND * step) for chunk in points.split(2**18)])
    return grid.numpy()


def _axes(centre: Tensor, half: float, size: int) -> list[Tensor]:
    return [torch.linspace(float(c) - half, float(c) + half, size) for c in centre]


def _solid(grid: np.ndarray) -> np.ndarray:
    """Smooth the grid, keep its largest body and fill the hollows inside."""
    from scipy.ndimage import gaussian_filter  # here: only meshes need it

    grid = gaussian_filter(grid, SMOOTHING * len(grid))
    bodies = _regions(grid < 0)
    if bodies.max() > 1:
        largest = np.bincount(bodies.ravel())[1:].argmax() + 1
        grid[(bodies > 0) & (bodies != largest)] = 1.0
    airs = _regions(np.pad(grid >= 0, 1, constant_values=True))  # the padding joins all air that is outside
    if airs.max() > 1:
        inner = airs[1:-1, 1:-1, 1:-1]
        grid[(inner > 0) & (inner != airs[0, 0, 0])] = -1.0
    return grid


def _regions(mask: np.ndarray) -> np.ndarray:
    """Connected parts of the mask, numbered from 1."""
    from scipy.ndimage import label  # here: only meshes need it

    numbers = np.zeros(mask.shape, np.int32)
    label(mask, output=numbers)
    return numbers


def _spread(mesh: Mesh, colours: Tensor, known: Tensor, rounds: int = 40) -> Tensor:
    """Fill unknown vertices from the nearest known one, then even them out along the surface."""
    if known.all():
        return colours
    from scipy.sparse import coo_array  # here: only meshes need it
    from scipy.spatial import KDTree

    values, hidden = colours.numpy().copy(), ~known.numpy()
    points = mesh.vertices.numpy()
    values[hidden] = values[~hidden][KDTree(points[~hidden]).query(points[hidden])[1]]
    a, b, c = mesh.faces.numpy().T
    rows, columns = np.concatenate([a, b, c, b, c, a]), np.concatenate([b, c, a, a, b, c])
    neighbours = coo_array((np.ones(len(rows), np.float32), (rows, columns)), shape=(len(points),) * 2).tocsr()[hidden]
    degree = np.asarray(neighbours.sum(1)).reshape(-1, 1)
    for _ in range(rounds):
        values[hidden] = neighbours @ values / np.maximum(degree, 1)
    return torch.from_numpy(values)


def write_mesh(path: str | os.PathLike[str], mesh: Mesh) -> None:
    """Write a mesh as ``.glb`` (see :func:`to_glb`) or ``.ply`` (8-bit sRGB), with colours and normals, atomically.

    Raises:
        UserError: for another suffix, or when the file cannot be written.
    """
    writers = {".glb": to_glb, ".ply": _to_ply}
    if (writer := writers.get(Path(path).suffix.lower())) is None:
        raise UserError(f"mesh {path}: the suffix must be .glb or .ply")
    content = writer(mesh)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def to_glb(mesh: Mesh) -> bytes:
    """A mesh as binary glTF that a viewer shows in the colours of the pictures: with its texture, where it has one.

    The standard wants colours linear; 16 bits, as 8 would show bands where it is dark. They hold their light already:
    unlit, and matt where a viewer does not know that.

    Source: glTF 2.0, 3.7.2.1 (COLOR_0) and 3.9 (materials); IEC 61966-2-1 (sRGB).
    """
    from trimesh.exchange.gltf import export_glb
    from trimesh.visual.material import PBRMaterial
    from trimesh.visual.texture import TextureVisuals

    if mesh.uv is not None and mesh.texture is not None:
        visual = textured(mesh.uv, Image.fromarray(to_uint8(mesh.texture)))
        return export_glb(_trimesh(mesh, visual=visual), include_normals=True, tree_postprocessor=unlit)
    encoded = ((mesh.colours.double() + 1) / 2).clamp(0, 1)
    linear = torch.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    solid = _trimesh(mesh, visual=TextureVisuals(material=PBRMaterial(metallicFactor=0.0, roughnessFactor=1.0)))
    solid.vertex_attributes[_COLOURS] = np.rint(F.pad(linear, (0, 1), value=1.0).numpy() * 65535).astype(np.uint16)

    def finish(tree: dict[str, Any]) -> None:  # trimesh writes colours in 8 bits only
        attributes = tree["meshes"][0]["primitives"][0]["attributes"]
        attributes["COLOR_0"] = attributes.pop(_COLOURS)
        tree["accessors"][attributes["COLOR_0"]]["normalized"] = True
        unlit(tree)

    return export_glb(solid, include_normals=True, tree_postprocessor=finish)


def textured(uv: Tensor, picture: Image.Image, **options: Any) -> TextureVisuals:
    """What trimesh calls a matt material with a texture.

    Args:
        uv: (V, 2) in [0, 1], from the left and from the top. options: of the material.
    """
    from trimesh.visual.material import PBRMaterial
    from trimesh.visual.texture import TextureVisuals

    material = PBRMaterial(baseColorTexture=picture, metallicFactor=0.0, roughnessFactor=1.0, **options)
    return TextureVisuals(uv.numpy() * [1, -1] + [0, 1], material=material)  # trimesh counts from the bottom


def unlit(tree: dict[str, Any]) -> None:
    """Tell viewers of a glTF that its colours hold their light already."""
    tree["extensionsUsed"] = [*tree.get("extensionsUsed", []), "KHR_materials_unlit"]
    for material in tree["materials"]:
        material["extensions"] = {"KHR_materials_unlit": {}}


def _to_ply(mesh: Mesh) -> bytes:
    colours = ((mesh.colours + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    content = _trimesh(mesh, vertex_colors=colours.numpy()).export(file_type="ply", vertex_normal=True)
    assert isinstance(content, bytes)
    return content


def _trimesh(mesh: Mesh, **options: Any) -> Trimesh:
    import trimesh  # here: slow to import, and only meshes need it

    vertices, faces, normals = mesh.vertices.numpy(), mesh.faces.numpy(), mesh.normals.numpy()
    return trimesh.Trimesh(vertices, faces, vertex_normals=normals, process=False, **options)
