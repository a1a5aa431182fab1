"""StyleGAN2 synthesis as EG3D uses it: filtered upsampling, per-pixel noise, clamped activations, skip outputs.

Everything runs channels_last, which CPU convolutions and depthwise filters like best.

Source: StyleGAN2 (Karras et al., 2020), Sec. 2-4; EG3D (Chan et al., 2022), Sec. 4.1 and 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from models.generators.fir import fir_kernel, upfirdn2d, upsample2x
from models.generators.layers import LEAKY_GAIN, LEAKY_SLOPE, EqualLinear

LayerNoise = torch.Generator | Tensor | Literal["const", "none"]
"""A layer's per-pixel noise: drawn anew, a map (B or 1, 1, side, side), the stored map, or left out."""

Noise = torch.Generator | list[Tensor] | Literal["const", "none"]
"""The same for several layers, with one map a layer."""

NOISE_MODES = ("none", "const", "random")


def clamp_to(x: Tensor, limit: float | None) -> Tensor:
    """x within [-limit, limit]; None is no limit."""
    return x if limit is None else x.clamp(-limit, limit)


def full_precision(x: Tensor) -> torch.autocast:
    """Keep what follows out of the caller's autocast: squares of styles underflow in half precision."""
    return torch.autocast(x.device.type, enabled=False)


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


class SynthesisLayer(nn.Module):
    """3x3 modulated convolution, noise, bias and leaky ReLU (StyleGAN2, Fig. 2d).

    Modulation scales what goes in and demodulation what comes out, so that the items of a batch share one weight.
    The lighter :class:`models.generators.layers.StyledConv`, without noise and filters, stands beside it: this layer's
    order of operations would change the last digits of what the embedded prior's shipped weights give.

    Args:
        side: of the output, pixels.
        upsample: double the side, by a transposed convolution and the filter.
        clamp: largest magnitude of an activation; None is no limit.
    """

    noise: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, w_dim: int, side: int, *, upsample: bool, clamp: float | None
    ) -> None:
        super().__init__()
        self.affine = EqualLinear(w_dim, in_channels, bias=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise", torch.randn(side, side))
        self.upsample, self.clamp = upsample, clamp

    def forward(self, x: Tensor, w: Tensor, kernel: Tensor, noise: LayerNoise) -> Tensor:
        """x (B, in_channels, H, W), w (B, w_dim), filter (k, k) -> (B, out_channels, side, side)."""
        weight = self.weight
        with full_precision(x):
            style = self.affine(w.to(weight.dtype))
            # Eq. 3. Summing over the 3x3 taps within the product is faster than before it.
            energy = style.square().repeat_interleave(9, 1) @ weight.square().flatten(1).T
            demodulation = torch.rsqrt(energy + 1e-8)
        x = x * style[:, :, None, None].to(x.dtype)  # Eq. 1
        if self.upsample:
            x = up_conv(x, weight.transpose(0, 1).contiguous())  # a strided weight is slower
            taps = len(kernel)
            x = upfirdn2d(x, kernel, pad=((taps + 1) // 2 - 1, taps // 2 - 1), gain=4.0)
        else:
            x = F.conv2d(x, weight, padding=1)
        # In place, since memory bounds large images. leaky(a x) = a leaky(x) for a > 0: its gain goes into the factors.
        x.mul_((demodulation * LEAKY_GAIN)[:, :, None, None].to(x.dtype))
        if (pixels := self.noise_map(noise, len(x))) is not None:
            x.add_((self.noise_strength * LEAKY_GAIN * pixels).to(x.dtype))
        x.add_((self.bias * LEAKY_GAIN)[:, None, None].to(x.dtype))
        return clamp_to(F.leaky_relu_(x, LEAKY_SLOPE), self.clamp)

    def noise_map(self, noise: LayerNoise, batch: int) -> Tensor | None:
        """The map that ``noise`` means, (side, side) or (B or 1, 1, side, side)."""
        if isinstance(noise, torch.Generator):
            return torch.randn(batch, 1, *self.noise.shape, generator=noise, device=noise.device).to(self.noise)
        if isinstance(noise, str):
            return self.noise if noise == "const" else None
        return noise


class ToImage(nn.Module):
    """1x1 modulated convolution without demodulation (StyleGAN2, Sec. 4.1): one matrix product an item."""

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, *, clamp: float | None) -> None:
        super().__init__()
        self.affine = EqualLinear(w_dim, in_channels, bias=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.scale, self.clamp = 1 / math.sqrt(in_channels), clamp

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x (B, in_channels, H, W), w (B, w_dim) -> (B, out_channels, H, W), fp32 under autocast."""
        with full_precision(x):
            style = self.affine(w.to(self.weight.dtype)) * self.scale
            mixing = self.weight[:, :, 0, 0] * style[:, None]
            pixels = x.permute(0, 2, 3, 1).flatten(1, 2).to(mixing.dtype)
            image = torch.baddbmm(self.bias, pixels, mixing.mT)
        return clamp_to(image.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2), self.clamp)


class SynthesisBlock(nn.Module):
    """Two layers at one resolution, and what they add to the image (StyleGAN2, Fig. 7b).

    Args:
        in_channels: None for the first block, which starts from a learned constant and has one layer.
        upsample: whether features and image arrive at half the side.
    """

    def __init__(
        self, in_channels: int | None, out_channels: int, image_channels: int, w_dim: int, side: int, *,
        upsample: bool = True, clamp: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.upsample = upsample
        if in_channels is None:
            self.const = nn.Parameter(torch.randn(out_channels, side, side))
        else:
            self.conv0 = SynthesisLayer(in_channels, out_channels, w_dim, side, upsample=upsample, clamp=clamp)
        self.conv1 = SynthesisLayer(out_channels, out_channels, w_dim, side, upsample=False, clamp=clamp)
        self.to_image = ToImage(out_channels, image_channels, w_dim, clamp=clamp)

    @property
    def layers(self) -> list[SynthesisLayer]:
        """The convolutions, in order."""
        return [layer for layer in self.children() if isinstance(layer, SynthesisLayer)]

    def forward(
        self, x: Tensor | None, image: Tensor | None, ws: Tensor, kernel: Tensor, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """Features and image of the previous block to those of this one.

        Args:
            ws: (B, layers + 1, w_dim), one code a layer and one for the image.
        """
        noises = noise if isinstance(noise, list) else [noise] * len(self.layers)
        if x is None:
            x = self.const.expand(len(ws), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        for layer, w, given in zip(self.layers, ws.unbind(1), noises, strict=False):
            x = layer(x, w, kernel, given)
        assert x is not None
        added = self.to_image(x, ws[:, -1])
        if image is None:
            return x, added
        with full_precision(x):
            return x, (upsample2x(image, kernel) if self.upsample else image) + added


class SynthesisNetwork(nn.Module):
    """Blocks of doubling side from a learned constant.

    The block of side ``start`` uses codes 0 (layer) and 1 (image); block k uses 2k-1, 2k (layers) and 2k+1 (image):
    neighbours share a code.

    Args:
        channels: of the features, from the smallest block to the largest.
        image_channels: of the image.
        taps: of the separable upsampling filter.
        clamp: see :class:`SynthesisLayer`.
    """

    kernel: Tensor

    def __init__(
        self, w_dim: int, channels: Sequence[int], image_channels: int, *, start: int = 4,
        taps: Sequence[float] = (1, 3, 3, 1), clamp: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sides = [start * 2**k for k in range(len(channels))]
        self.num_ws, self.clamp = 2 * len(channels), clamp
        self.blocks = nn.ModuleList(
            SynthesisBlock(before, width, image_channels, w_dim, side, clamp=clamp)
            for before, width, side in zip([None, *channels], channels, self.sides, strict=False)
        )
        self.register_buffer("kernel", fir_kernel(taps), persistent=False)

    def forward(self, ws: Tensor, noise: Noise = "const") -> list[tuple[Tensor, Tensor]]:
        """Codes (B, num_ws, w_dim) to each block's features (B, C, S, S) and image (B, image_channels, S, S)."""
        found: list[tuple[Tensor, Tensor]] = []
        x = image = None
        for k, block in enumerate(self.blocks):
            first = max(2 * k - 1, 0)
            given = noise[first : 2 * k + 1] if isinstance(noise, list) else noise
            x, image = block(x, image, ws[:, first : 2 * k + 2], self.kernel, given)
            found.append((x, image))
        return found


class SuperResolution(nn.Module):
    """Two blocks that turn a small picture and its features into a large one (EG3D, Sec. 4.3).

    Args:
        in_channels: of the rendered features.
        channels: of the two blocks.
        resolution: of the result, pixels.
        factor: from the blocks' input to the result: 2 or 4, of which the second block does 2.
        antialias: when the input is resized to the blocks' side.
        noise: "none", "const" or "random": drawn wherever the caller draws.
        taps, clamp: see :class:`SynthesisNetwork`.

    Raises:
        ValueError: for another factor or noise.
    """

    kernel: Tensor

    def __init__(
        self, w_dim: int, in_channels: int, *, channels: Sequence[int] = (256, 128), resolution: int = 512,
        factor: int = 4, antialias: bool = True, noise: str = "none", taps: Sequence[float] = (1, 3, 3, 1),
        clamp: float | None = 256.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if factor not in (2, 4):
            raise ValueError(f"superresolution.factor must be 2 or 4, got {factor}")
        if noise not in NOISE_MODES:
            raise ValueError(f"superresolution.noise must be one of {NOISE_MODES}, got {noise!r}")
        self.channels = first, second = int(channels[0]), int(channels[1])
        self.resolution, self.side = resolution, resolution // factor
        self.antialias, self.noise, self.clamp = antialias, noise, clamp
        small = SynthesisBlock(in_channels, first, 3, w_dim, resolution // 2, upsample=factor == 4, clamp=clamp)
        self.blocks = nn.ModuleList([small, SynthesisBlock(first, second, 3, w_dim, resolution, clamp=clamp)])
        self.register_buffer("kernel", fir_kernel(taps), persistent=False)

    def forward(self, features: Tensor, w: Tensor, noise: Noise = "const") -> list[tuple[Tensor, Tensor]]:
        """Features and image after each block.

        Args:
            features: (B, in_channels, h, w); the first three are the small picture.
            w: (B, w_dim), for every layer.
            noise: where ``random`` noise comes from.
        """
        if features.shape[-1] != self.side:
            features = F.interpolate(
                features, (self.side, self.side), mode="bilinear", align_corners=False, antialias=self.antialias
            )
        x, image, ws = features, features[:, :3], w[:, None].expand(-1, 3, -1)
        found: list[tuple[Tensor, Tensor]] = []
        for block in self.blocks:
            x, image = block(x, image, ws, self.kernel, noise if self.noise == "random" else self.noise)
            found.append((x, image))
        return found
