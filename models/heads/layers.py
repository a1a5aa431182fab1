"""A baked head as layers: a mesh with a texture for each manifold, for any viewer that blends.

Source: GRAMInverter (Deng et al., 2023), Sec. 4.1: cached manifolds are alpha-textured meshes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.generators.baked import BakedHead
from models.rendering.atlas import flatten, texel_centres
from models.rendering.compositing import EMPTY, layer_weights
from models.rendering.layers import FAINT, Layer


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
