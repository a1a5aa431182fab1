"""Finite impulse response filters: blurring and anti-aliased resampling of feature maps.

Each is one depthwise (transposed) convolution. Separating the kernels does not pay at 4 taps; channels_last does,
several times over.

Source: StyleGAN2 (Karras et al., 2020), Sec. 4 and App. B; Zhang, "Making Convolutional Networks Shift-Invariant
Again" (2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

Padding = tuple[int, int] | tuple[int, int, int, int]
"""Zeros (before, after) on both axes, or (x before, x after, y before, y after); negative numbers crop."""


def fir_kernel(taps: Sequence[float] | Tensor) -> Tensor:
    """The outer product of ``taps`` (k,) with themselves, of sum 1: (k, k)."""
    taps = torch.as_tensor(taps, dtype=torch.float32)
    kernel = torch.outer(taps, taps)
    return kernel / kernel.sum()


def upfirdn2d(
    x: Tensor, kernel: Tensor, *, up: int = 1, down: int = 1, pad: Padding = (0, 0), gain: float = 1.0
) -> Tensor:
    """Insert zeros, pad, convolve with ``kernel``, keep every ``down``-th pixel.

    Args:
        x: (B, C, H, W).
        kernel: (kh, kw); a true convolution, so the kernel is flipped over the image.
        up: every pixel is followed by ``up - 1`` zeros on both axes.
        pad: zeros around the upsampled image.
        gain: factor on the kernel; ``up**2`` keeps the brightness.

    Returns:
        (B, C, H', W') with H' = (H * up + before + after - kh) // down + 1.
    """
    channels, (height, width) = x.shape[1], kernel.shape
    left, right, top, bottom = pad if len(pad) == 4 else (*pad, *pad)
    weight = (kernel * gain).to(x.dtype).expand(channels, 1, height, width)
    if up == 1:
        even = left == right >= 0 and top == bottom >= 0
        if not even:
            x = F.pad(x, (left, right, top, bottom))
        padding = (top, left) if even else 0
        return F.conv2d(x, weight.flip(2, 3), stride=down, padding=padding, groups=channels)
    # A transposed convolution never multiplies the inserted zeros. It returns all that the kernel touches: the margins
    # that the padding does not ask for are cut.
    left, right, top, bottom = width - 1 - left, width - up - right, height - 1 - top, height - up - bottom
    cut = (max(min(top, bottom), 0), max(min(left, right), 0))
    x = F.conv_transpose2d(x, weight, stride=up, padding=cut, groups=channels)
    margins = (cut[1] - left, cut[1] - right, cut[0] - top, cut[0] - bottom)
    if any(margins):
        x = F.pad(x, margins)
    return x if down == 1 else x[..., ::down, ::down]


def blur(x: Tensor, kernel: Tensor, pad: Padding, gain: float = 1.0) -> Tensor:
    """Filter at constant rate: (B, C, H, W) -> (B, C, H + before + after - kh + 1, ...)."""
    return upfirdn2d(x, kernel, pad=pad, gain=gain)


def upsample2x(x: Tensor, kernel: Tensor) -> Tensor:
    """Double the side: (B, C, H, W) -> (B, C, 2H, 2W), for a square kernel of at least 2 taps."""
    size = len(kernel)
    return upfirdn2d(x, kernel, up=2, pad=((size + 1) // 2, size // 2 - 1), gain=4.0)


def downsample2x(x: Tensor, kernel: Tensor) -> Tensor:
    """Halve the side: (B, C, 2H, 2W) -> (B, C, H, W), for a square kernel of at least 2 taps."""
    size = len(kernel)
    return upfirdn2d(x, kernel, down=2, pad=((size - 1) // 2, size // 2 - 1))


class _UpConv(torch.autograd.Function):
    """``F.conv_transpose2d(x, weight, stride=2)`` whose weight gradient does not run channels_last.

    oneDNN takes up to four times as long for that of channels_last tensors as for that of plain copies.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv_transpose2d(x, weight, stride=2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad
        # It is the transpose of this convolution, and shares its weight gradient.
        return (
            F.conv2d(grad, weight, stride=2) if of_x else None,
            conv2d_weight(grad.contiguous(), weight.shape, x.contiguous(), stride=2) if of_weight else None,
        )


def up_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Transposed 3x3 convolution of stride 2: x (B, C, H, W), weight (C, C', 3, 3) -> (B, C', 2H + 1, 2W + 1)."""
    if x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        return cast(Tensor, _UpConv.apply(x, weight))
    return F.conv_transpose2d(x, weight, stride=2)
