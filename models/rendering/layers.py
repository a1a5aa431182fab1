"""A baked head as ordered, textured meshes: one transparent layer a manifold, for any viewer that blends.

Source: GRAMInverter (Deng et al., 2023), Sec. 4.1: cached manifolds are alpha-textured meshes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.errors import UserError
from models.files import atomic_write
from models.rendering.atlas import flatten, texel_centres
from models.rendering.baked import BakedHead
from models.rendering.compositing import EMPTY, layer_weights

FAINT = 1 / 255  # an opacity below this is not seen


@dataclass(frozen=True)
class Layer:
    """One manifold.

    Attributes:
        vertices: (V, 3) world points.
        faces: (F, 3) int64 vertex indices, counter-clockwise seen from outside.
        uv: (V, 2) texture coordinates in [0, 1], from the left and from the top.
        texture: (4, S, S) RGB in [-1, 1] and opacity in [0, 1].
        core: whether it is opaque where its opacity is above one half, and hides what lies behind; else it blends.
    """

    vertices: Tensor
    faces: Tensor
    uv: Tensor
    texture: Tensor
    core: bool = False


def layers_of(head: BakedHead, size: int = 96) -> list[Layer]:
    """The layers of a head, from the innermost to the outermost: each is painted over those before it.

    A core comes first: the innermost manifold in the colours of all of them, so that hair on the far side, on a
    manifold outside of the face's own, does not shine through the face. What is transparent throughout is left out.
    Around a head the manifolds are closed at the crown and behind, where the chart ends.

    Args:
        size: vertices along a side of the grid on each manifold.
    """
    textures = head.textures.cpu()
    opacity = textures[None, :, 3:].flatten(3).permute(0, 3, 1, 2)  # (1, S * S, N, 1)
    weights = layer_weights(opacity)[0, :, :, 0].T.reshape(-1, 1, *textures.shape[2:])
    total = weights.sum(0)
    core = torch.cat([(weights * textures[:, :3]).sum(0) / total.clamp_min(EMPTY), total])
    grid = flatten(head.predictor.baked(), head.levels, head.layout, size, extent=head.predictor.extent)
    points, valid = grid.points.cpu(), grid.valid.cpu()
    uv = (texel_centres(size, size) + 1) / 2
    if head.layout.closed:
        points, valid = (torch.cat([x, x[:, :, :1]], 2) for x in (points, valid))
        uv = torch.cat([uv, uv[:, -1:]], 1)  # the border's colours go on
    layers = [_layer(points[-1], valid[-1], uv, core, head.layout.closed, core=True)]
    for n in reversed(range(len(points))):
        layers.append(_layer(points[n], valid[n], uv, textures[n], head.layout.closed))
    return [layer for layer in layers if len(layer.faces)]


def _layer(points: Tensor, valid: Tensor, uv: Tensor, texture: Tensor, closed: bool, core: bool = False) -> Layer:
    """The layer of one manifold's grid: points (H, W, 3), valid (H, W), uv (H, W, 2)."""
    if closed:
        points, valid = _crowned(points, valid)
    height, width = valid.shape
    opacity = F.max_pool2d(texture[None, 3:], 3, 1, 1)
    seen = F.adaptive_max_pool2d(opacity, (height, height))[0, 0] > FAINT
    seen = F.pad(seen.float(), (0, width - height)) > 0
    index = torch.arange(height * width).reshape(height, width)
    quads = torch.stack([index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:]], -1).reshape(-1, 4)
    quads = quads[valid.flatten()[quads].all(1) & seen.flatten()[quads].any(1)]
    faces = quads[:, [[0, 2, 3], [0, 3, 1]]].flatten(0, 1)
    used, faces = faces.unique(return_inverse=True)
    return Layer(points.flatten(0, 1)[used], faces, uv.flatten(0, 1)[used], texture, core)


def _crowned(points: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Close the hole that horizontal lines leave at the top: the row above the highest one is drawn to its middle."""
    if valid[0].any() or not valid.any(0).all():
        return points, valid
    top = valid.int().argmax(0)  # (W,) the highest row of each column
    columns = torch.arange(len(top))
    points, valid = points.clone(), valid.clone()
    points[top - 1, columns] = points[top, columns].mean(0)
    valid[top - 1, columns] = True
    return points, valid


def write_layers(path: str | os.PathLike[str], layers: list[Layer]) -> None:
    """Write layers as one ``.glb``, atomically: unlit, in painting order.

    Viewers that sort transparent parts by distance, as three.js does, keep the order of parts that are equally far.

    Raises:
        UserError: when there are no layers, or the file cannot be written.
    """
    import trimesh  # here: slow to import, and only meshes need it
    from PIL import Image
    from trimesh.exchange.gltf import export_glb
    from trimesh.visual.material import PBRMaterial
    from trimesh.visual.texture import TextureVisuals

    if not layers:
        raise UserError(f"mesh {path}: the manifolds are transparent throughout, there is nothing to write")
    scene = trimesh.Scene()
    for number, layer in enumerate(layers):
        picture = Image.fromarray(_rgba(layer.texture))
        material = PBRMaterial(
            baseColorTexture=picture, metallicFactor=0.0, roughnessFactor=1.0,
            alphaMode="MASK" if layer.core else "BLEND", alphaCutoff=0.5 if layer.core else None,
        )  # fmt: skip
        uv = layer.uv.numpy() * [1, -1] + [0, 1]  # trimesh counts from the bottom
        solid = trimesh.Trimesh(
            layer.vertices.numpy(), layer.faces.numpy(), process=False, visual=TextureVisuals(uv, material=material)
        )
        name = "core" if layer.core else f"manifold_{number:02d}"
        scene.add_geometry(solid, name, name)
    with atomic_write(path) as temporary:
        temporary.write_bytes(export_glb(scene, tree_postprocessor=_unlit))


def _rgba(texture: Tensor) -> np.ndarray:
    colour, alpha = (texture[:3] + 1) / 2, texture[3:] * (texture[3:] > FAINT)
    return (torch.cat([colour, alpha]).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def _unlit(tree: dict[str, Any]) -> None:
    """Colours hold their light already."""
    tree["extensionsUsed"] = [*tree.get("extensionsUsed", []), "KHR_materials_unlit"]
    for material in tree["materials"]:
        material["extensions"] = {"KHR_materials_unlit": {}}
