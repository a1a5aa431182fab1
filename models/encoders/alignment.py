"""ADA: details of one picture, moved to where another picture of the head would have them.

Source: HFGI (Wang et al., 2022), adaptive distortion alignment; E3DGE (Lan et al., 2023), Sec. 4.3. Submodules are
named as in the official files.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.configurable import Configurable
from models.encoders.irse import Bottleneck
from models.encoders.normalization import BatchNorm2d


def _blocks(channels: Sequence[int], stride: int = 1) -> nn.Sequential:
    """Residual blocks from each number of channels to the next; the first one may halve the side."""
    blocks = enumerate(pairwise(channels))
    return nn.Sequential(*(Bottleneck(a, b, 1 if i else stride, None) for i, (a, b) in blocks))


class ResidualAligner(Configurable):
    """E_ADA: a U-Net of residual blocks, from a residual and a target picture to the residual of the target.

    Args:
        widths: channels at the picture's side, and at 1/2, 1/4 and 1/8 of it.

    Raises:
        ValueError: for another number of widths.
    """

    def __init__(self, widths: Sequence[int] = (16, 32, 48, 64)) -> None:
        super().__init__()
        if len(widths) != 4:
            raise ValueError(f"widths must be 4 numbers of channels, got {len(widths)}")
        full, half, quarter, eighth = widths
        self.conv_layer1 = nn.Sequential(nn.Conv2d(6, full, 3, 1, 1, bias=False), BatchNorm2d(full), nn.PReLU(full))
        self.conv_layer2 = _blocks((full, half, half, half), 2)
        self.conv_layer3 = _blocks((half, quarter, quarter, quarter), 2)
        self.conv_layer4 = _blocks((quarter, eighth, eighth, eighth), 2)
        self.dconv_layer1 = _blocks((eighth + quarter, eighth, half, half))
        self.dconv_layer2 = _blocks((half + half, half, full, full))
        self.dconv_layer3 = _blocks((full + full, full, 3, 3))

    def forward(self, residual: Tensor, target: Tensor) -> Tensor:
        """E_ADA(Delta, I'): the residual (B, 3, S, S) as the target would have it.

        Args:
            residual: (B, 3, S, S) picture less its reconstruction. target: (B, 3, S, S) reconstruction to align it to,
                in [-1, 1]; S is a multiple of 8.

        Raises:
            ValueError: for pictures of two sizes, or of a side that is no multiple of 8.
        """
        if residual.shape != target.shape or residual.shape[1] != 3 or any(side % 8 for side in residual.shape[2:]):
            raise ValueError(
                "residual and target must both be (B, 3, S, S) with S a multiple of 8, "
                f"got {tuple(residual.shape)} and {tuple(target.shape)}"
            )
        full = self.conv_layer1(torch.cat([residual, target], 1))
        half = self.conv_layer2(full)
        quarter = self.conv_layer3(half)
        x = self.conv_layer4(quarter)
        for skip, block in ((quarter, self.dconv_layer1), (half, self.dconv_layer2), (full, self.dconv_layer3)):
            x = block(torch.cat([F.interpolate(x, skip.shape[2:], mode="bilinear", align_corners=False), skip], 1))
        return x
