"""One head from many cameras."""

from __future__ import annotations

import torch
from torch import Tensor

from models.camera import Camera
from models.generators.base import Generator
from models.latents import Latents
from models.rendering.output import Rendering


@torch.no_grad()
def render_views(
    generator: Generator,
    latents: Latents,
    camera: Camera | None,
    expression: Tensor | None = None,
    resolution: int | None = None,
    chunk: int = 12,
) -> Rendering:
    """One head from many cameras or with many expressions, a chunk at a time to bound memory; without taps.

    Args:
        latents: a batch of one.
        camera: V cameras; ``None`` for a 2D generator, where V is the number of expressions.
        expression: (1, E) or (V, E); ``None`` or E = 0 is neutral.
        resolution: image side, where it is free; native when ``None``.
        chunk: cameras rendered together: they share one backbone pass.

    Returns:
        fields (V, ., H, W).
    """
    if expression is not None and expression.shape[1] == 0:
        expression = None
    if not generator.free_resolution:
        resolution = None
    if camera is None and expression is not None:
        latents = latents.repeat_interleave(len(expression))
    parts = []
    for start in range(0, len(latents) if camera is None else len(camera), chunk):
        some = slice(start, start + chunk)
        ws, seen = (latents[some], None) if camera is None else (latents, camera[some])
        code = expression if expression is None or len(expression) == 1 else expression[some]
        parts.append(generator.synthesis(ws, seen, expression=code, resolution=resolution))
    return Rendering.cat(parts)
