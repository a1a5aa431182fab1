"""Backbones that paint feature maps from style codes: a light one, and StyleGAN2's own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.generators.layers import ModulatedConv2d, StyledConv
from models.generators.stylegan2 import Noise, SynthesisNetwork


class StyleBackbone(nn.Module):
    """Constant -> styled convolutions, doubling in size, with skip outputs (StyleGAN2, Fig. 7b).

    Layer order of the codes: the first block uses codes 0 (convolution) and 1 (output); block k uses
    2k-1, 2k (convolutions) and 2k+1 (output), so that neighbours share a code as in StyleGAN2.

    Args:
        w_dim: size of one code.
        channels: feature channels from the smallest block to the largest.
        out_channels: channels of the painted map.
        start: side of the smallest block.
        lr_multiplier: of the style affines.
        detail_maps: add a learned constant map to the input of each later block's second convolution. Where the map
            is a canonical chart, all items share where the eyes are; without it every sharp edge has to grow out of
            the smallest block.
    """

    def __init__(
        self, w_dim: int, channels: Sequence[int], out_channels: int, *, start: int = 8, lr_multiplier: float = 1.0,
        detail_maps: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sides = [start * 2**k for k in range(len(channels))]
        self.num_ws = 2 * len(channels)
        self.constant = nn.Parameter(torch.randn(1, channels[0], start, start))
        self.first = StyledConv(channels[0], channels[0], w_dim, lr_multiplier=lr_multiplier)
        self.ups = nn.ModuleList(
            StyledConv(a, b, w_dim, upsample=True, lr_multiplier=lr_multiplier) for a, b in pairwise(channels)
        )
        self.convs = nn.ModuleList(StyledConv(c, c, w_dim, lr_multiplier=lr_multiplier) for c in channels[1:])
        self.details = nn.ParameterList(
            nn.Parameter(torch.zeros(1, c, side, side))
            for c, side in zip(channels[1:], self.sides[1:], strict=True)
            if detail_maps
        )
        self.outs = nn.ModuleList(
            ModulatedConv2d(c, out_channels, 1, w_dim, demodulate=False, lr_multiplier=lr_multiplier) for c in channels
        )
        self.out_bias = nn.Parameter(torch.zeros(out_channels))

    @property
    def tap_names(self) -> tuple[str, ...]:
        """One tap a block: its features before the output layer."""
        return tuple(f"block{side}" for side in self.sides)

    def affines(self) -> list[nn.Module]:
        """Style affines in layer order, one list entry a convolution."""
        layers: list[nn.Module] = [self.first.conv.affine]
        for up, conv in zip(self.ups, self.convs, strict=True):
            layers += [up.conv.affine, conv.conv.affine]  # type: ignore[union-attr]
        return layers

    def forward(self, ws: Tensor, noise: Noise = "const") -> tuple[Tensor, dict[str, Tensor]]:
        """Paint.

        Args:
            ws: (B, num_ws, w_dim). noise: there is none.

        Returns:
            the map (B, out_channels, S, S), and every block's features by tap name.
        """
        # channels_last: the CPU convolutions are nearly twice as fast.
        x = self.constant.expand(len(ws), -1, -1, -1)
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.first(x, ws[:, 0])
        painted = self.outs[0](x, ws[:, 1])
        taps = {f"block{self.sides[0]}": x}
        for k, (up, conv) in enumerate(zip(self.ups, self.convs, strict=True), start=1):
            x = up(x, ws[:, 2 * k - 1])
            if self.details:
                x = x + self.details[k - 1]
            x = conv(x, ws[:, 2 * k])
            painted = F.interpolate(painted, scale_factor=2.0, mode="bilinear", align_corners=False)
            painted = painted + self.outs[k](x, ws[:, 2 * k + 1])
            taps[f"block{self.sides[k]}"] = x
        return painted + self.out_bias[:, None, None], taps


class StyleGAN2Backbone(nn.Module):
    """StyleGAN2's synthesis network with its filters and stored noise maps, as EG3D paints its planes (Sec. 4.1).

    Codes are laid out as in :class:`StyleBackbone`.

    Args:
        w_dim: size of one code.
        channels: feature channels from the smallest block to the largest.
        out_channels: channels of the painted map.
        start: side of the smallest block.
    """

    def __init__(self, w_dim: int, channels: Sequence[int], out_channels: int, *, start: int = 4) -> None:
        super().__init__()
        self.network = SynthesisNetwork(w_dim, channels, out_channels, start=start)
        self.sides, self.num_ws = self.network.sides, self.network.num_ws

    @property
    def tap_names(self) -> tuple[str, ...]:
        """One tap a block: its features before the output layer."""
        return tuple(f"block{side}" for side in self.sides)

    def affines(self) -> list[nn.Module]:
        """Style affines of the convolutions in layer order."""
        return [layer.affine for block in self.network.blocks for layer in block.layers]  # type: ignore[union-attr]

    def forward(self, ws: Tensor, noise: Noise = "const") -> tuple[Tensor, dict[str, Tensor]]:
        """As :meth:`StyleBackbone.forward`; ``noise``: the stored maps, or a generator that draws others."""
        blocks = self.network(ws, noise)
        return blocks[-1][1], {name: x for name, (x, _) in zip(self.tap_names, blocks, strict=True)}
