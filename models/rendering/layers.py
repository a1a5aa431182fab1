"""A baked head as ordered, textured layers: a transparent one for each manifold, for any viewer that blends.

Source: GRAMInverter (Deng et al., 2023), Sec. 4.1: cached manifolds are alpha-textured meshes.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.errors import UserError
from models.files import atomic_write
from models.rendering.mesh import textured, unlit

FAINT = 1 / 255  # an opacity below this is not seen
BORDER = 4  # texels around each texture, in a picture of several


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


def write_layers(path: str | os.PathLike[str], layers: list[Layer]) -> None:
    """Write layers as one ``.glb``, atomically, unlit: the core as a mesh, and the others, in order, as a second one.

    Viewers sort transparent meshes in ways of their own, but draw the triangles of one as they come: so what is to be
    painted from the inside out is one mesh, with all textures in one picture.

    Raises:
        UserError: when there are no layers, or the file cannot be written.
    """
    import trimesh  # here: slow to import, and only meshes need it
    from PIL import Image
    from trimesh.exchange.gltf import export_glb

    if not layers:
        raise UserError(f"mesh {path}: the manifolds are transparent throughout, there is nothing to write")
    scene = trimesh.Scene()
    for core, name in ((True, "core"), (False, "manifolds")):
        parts = [layer for layer in layers if layer.core == core]
        if not parts:
            continue
        layer = _joined(parts)
        picture, mode = Image.fromarray(_rgba(layer.texture)), "MASK" if core else "BLEND"
        visual = textured(layer.uv, picture, alphaMode=mode, alphaCutoff=0.5 if core else None)
        solid = trimesh.Trimesh(layer.vertices.numpy(), layer.faces.numpy(), process=False, visual=visual)
        scene.add_geometry(solid, name, name)
    with atomic_write(path) as temporary:
        temporary.write_bytes(export_glb(scene, tree_postprocessor=unlit))


def _joined(layers: list[Layer]) -> Layer:
    """Layers as one, their textures side by side with borders that go on, so that filters mix no two of them."""
    size = layers[0].texture.shape[1]
    columns = math.ceil(math.sqrt(len(layers)))
    rows, tile = math.ceil(len(layers) / columns), size + 2 * BORDER
    tiles = F.pad(torch.stack([layer.texture for layer in layers]), (BORDER,) * 4, mode="replicate")
    tiles = F.pad(tiles, (0, 0, 0, 0, 0, 0, 0, rows * columns - len(layers)))
    texture = tiles.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).reshape(4, rows * tile, columns * tile)
    places, faces, start = [], [], 0
    for number, layer in enumerate(layers):
        corner = torch.tensor([number % columns, number // columns]) * tile + BORDER
        places.append((layer.uv * size + corner) / torch.tensor([columns * tile, rows * tile]))
        faces.append(layer.faces + start)
        start += len(layer.vertices)
    vertices = torch.cat([layer.vertices for layer in layers])
    return Layer(vertices, torch.cat(faces), torch.cat(places), texture, layers[0].core)


def _rgba(texture: Tensor) -> np.ndarray:
    colour, alpha = (texture[:3] + 1) / 2, texture[3:] * (texture[3:] > FAINT)
    return (torch.cat([colour, alpha]).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
