"""Building blocks shared by all style-based generators and discriminators.

Source: StyleGAN2 (Karras et al., 2020), written from the paper's equations.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAKY_SLOPE = 0.2
LEAKY_GAIN = math.sqrt(2.0)


def leaky(x: Tensor) -> Tensor:
    """Leaky ReLU that keeps the variance of a unit Gaussian."""
    return F.leaky_relu(x, LEAKY_SLOPE) * LEAKY_GAIN


class EqualLinear(nn.Module):
    """Linear layer with an equalised learning rate.

    The weight is stored as N(0, 1) / lr_multiplier and scaled at run time by lr_multiplier / sqrt(fan_in).
    """

    def __init__(self, in_features: int, out_features: int, *, bias: float = 0.0, lr_multiplier: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias / lr_multiplier))
        self.scale = lr_multiplier / math.sqrt(in_features)
        self.lr_multiplier = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return F.linear(x, self.weight * self.scale, self.bias * self.lr_multiplier)


class EqualConv2d(nn.Module):
    """Convolution with an equalised learning rate.

    Args:
        padding: "same" by default.
        gain: factor on the result, folded into weight and bias.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, bias: bool = True,
        padding: int | None = None, gain: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.scale, self.gain = gain / math.sqrt(in_channels * kernel * kernel), gain
        self.stride, self.padding = stride, kernel // 2 if padding is None else padding

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride)."""
        bias = None if self.bias is None else self.bias * self.gain
        return F.conv2d(x, self.weight * self.scale, bias, stride=self.stride, padding=self.padding)


class ModulatedConv2d(nn.Module):
    """Weight-modulated convolution (StyleGAN2, Eq. 1-3).

    Scale-in / scale-out form: with s_i the style of input channel i and w the shared weight, the modulated
    convolution equals conv(s * x, w) / sigma_j, sigma_j^2 = sum_i,k s_i^2 w_ijk^2. No weight is copied per item.

    Args:
        w_dim: size of the style code.
        demodulate: divide by sigma (off for RGB layers).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        w_dim: int,
        *,
        demodulate: bool = True,
        lr_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        self.affine = EqualLinear(w_dim, in_channels, bias=1.0, lr_multiplier=lr_multiplier)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.scale = 1 / math.sqrt(in_channels * kernel * kernel)
        self.demodulate, self.padding = demodulate, kernel // 2

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x (B, in_channels, H, W), w (B, w_dim) -> (B, out_channels, H, W)."""
        style = self.affine(w)
        weight = self.weight * self.scale
        if self.padding == 0 and not self.demodulate:  # 1 x 1: a matrix product per item, several times faster on CPUs
            mixed = (weight[:, :, 0, 0] * style[:, None]).to(x.dtype) @ x.flatten(2)
            return mixed.unflatten(2, x.shape[2:])
        x = F.conv2d(x * style[:, :, None, None].to(x.dtype), weight, padding=self.padding)
        if self.demodulate:
            # Eq. 3 in fp32: the squares underflow in half precision.
            energy = style.float().square() @ weight.float().square().sum((2, 3)).T
            x = x * torch.rsqrt(energy + 1e-8)[:, :, None, None].to(x.dtype)
        return x


class StyledConv(nn.Module):
    """Modulated convolution, optional 2x bilinear upsampling before it, bias and leaky ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        *,
        upsample: bool = False,
        kernel: int = 3,
        lr_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        self.conv = ModulatedConv2d(in_channels, out_channels, kernel, w_dim, lr_multiplier=lr_multiplier)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.upsample = upsample

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x (B, C, H, W), w (B, w_dim) -> (B, C', H or 2H, W or 2W)."""
        if self.upsample:
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        return leaky(self.conv(x, w) + self.bias[:, None, None])


class MappingNetwork(nn.Module):
    """z -> w, a leaky MLP.

    Args:
        normalize: divide z by its root mean square first, as StyleGAN does. Off where the length of z carries
            meaning, as in the embedded world.
        octaves: also feed sin and cos of pi 2^k Phi(z), k < octaves, with Phi the Gaussian's distribution function.
            Where z is a code whose numbers are cut into intervals (a hair style, glasses on or off), an MLP on z
            alone blurs the intervals for a long time.
    """

    def __init__(
        self, z_dim: int, w_dim: int, *, layers: int = 2, hidden: int | None = None, normalize: bool = True,
        lr_multiplier: float = 0.01, octaves: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        widths = [z_dim * (1 + 2 * octaves), *[hidden or w_dim] * (layers - 1), w_dim]
        self.layers = nn.ModuleList(EqualLinear(a, b, lr_multiplier=lr_multiplier) for a, b in pairwise(widths))
        self.normalize, self.octaves = normalize, octaves

    def forward(self, z: Tensor) -> Tensor:
        """(..., z_dim) -> (..., w_dim)."""
        if self.normalize:
            z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-8)
        if self.octaves:
            angle = math.pi * torch.special.ndtr(z.float())
            waves = [wave(angle * 2**k) for k in range(self.octaves) for wave in (torch.sin, torch.cos)]
            z = torch.cat([z, *waves], -1)
        for layer in self.layers:
            z = leaky(layer(z))
        return z
