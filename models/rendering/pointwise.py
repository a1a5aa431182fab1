"""One small network at very many points: its products, made fast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

CPU_NUMBERS, GPU_NUMBERS = 2**19, 2**28  # in an activation: a CPU's caches and allocator like small ones
IMAGES = 16  # from this many on PyTorch leaves a 1 x 1 convolution to oneDNN


def in_chunks(function: Callable[[Tensor], Tensor], points: Tensor, width: int) -> Tensor:
    """``function`` of (B, P, ...), some points at a time; ``width`` numbers per point in an activation."""
    numbers = CPU_NUMBERS if points.device.type == "cpu" else GPU_NUMBERS
    size = max(numbers // (len(points) * width), 16)
    return torch.cat([function(part) for part in points.split(size, 1)], 1)


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """W x + b at every point, W and b being those of the point's row.

    On CPUs the product is a 1 x 1 convolution: oneDNN's uses the widest instructions there are, while the BLAS behind
    ``torch.bmm`` may not, which doubles its time (MKL on AMD). Both can be differentiated twice.

    Args:
        x: (B, P, in). weight: (B, out, in). bias: (B, 1, out).

    Returns:
        (B, P, out).
    """
    if x.device.type != "cpu" or x.shape[1] == 0 or x.shape[1] % IMAGES:
        return torch.baddbmm(bias, x, weight.mT)
    images = x.unflatten(1, (IMAGES, -1, 1)).permute(0, 1, 4, 2, 3)  # (B, images, in, points, 1), channels last
    rows = [F.conv2d(i, w[:, :, None, None], b[0]) for i, w, b in zip(images, weight, bias, strict=True)]
    found = rows[0][None] if len(rows) == 1 else torch.stack(rows)
    return found.permute(0, 1, 3, 4, 2).flatten(1, 3)
