"""One small network at very many points: its products, made fast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CPU_NUMBERS, GPU_NUMBERS = 2**19, 2**28  # in an activation: a CPU's caches and allocator like small ones
KEPT = 2**26  # numbers in an activation of all points; for a gradient a network keeps some 25 of them, 6 GiB
GPU_AGAIN = 2**25  # in an activation that is computed again
IMAGES = 16  # from this many on PyTorch leaves a 1 x 1 convolution to oneDNN


def in_chunks(
    function: Callable[[Tensor], Tensor], points: Tensor, width: int, network: nn.Module | None = None
) -> Tensor:
    """``function`` of (B, P, ...), some points at a time.

    Args:
        width: numbers per point in an activation.
        network: whose parameters ``function`` uses. With it, activations of very many points are not kept for the
            gradient but computed again, chunk by chunk: a third more work, and memory for one chunk.
    """
    numbers = CPU_NUMBERS if points.device.type == "cpu" else GPU_NUMBERS
    if network is not None and torch.is_grad_enabled() and len(points) * points.shape[1] * width > KEPT:
        function, numbers = _again(function, network), min(numbers, GPU_AGAIN)
    size = max(numbers // (len(points) * width), 16)
    return torch.cat([function(part) for part in points.split(size, 1)], 1)


class _Borrowed(nn.Module):
    """Calls a function; to give ``network`` other parameters meanwhile, by ``functional_call``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, function: Callable[[Tensor], Tensor], part: Tensor) -> Tensor:
        return function(part)


def _again(function: Callable[[Tensor], Tensor], network: nn.Module) -> Callable[[Tensor], Tensor]:
    """``function``, whose activations are computed again for the gradient: with the parameters of now.

    ``functional_call`` lends a network parameters for one call, which has ended when the gradient is asked for.
    """
    borrowed = _Borrowed(network)
    parameters: dict[str, Tensor] = {f"network.{name}": value for name, value in network.named_parameters()}

    def call(part: Tensor) -> Tensor:
        return functional_call(borrowed, parameters, (function, part))

    return lambda part: checkpoint(call, part, use_reentrant=False, preserve_rng_state=False)


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
