"""Expressions: a deformation of the canonical chart plus ambient channels for the radiance decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.generators.layers import leaky


class ExpressionField(nn.Module):
    """Chart shift and ambient features from an identity's features and an expression code.

    Every path passes through the code without a bias, so the zero code gives exactly zero: neutral costs nothing
    and means nothing. A pure warp cannot open a mouth or close a lid: the ambient channels carry what appears.

    Args:
        expressions: size of the code.
        in_channels: channels of the identity's feature map.
        hidden: channels per expression before they are summed.
        ambient: ambient channels.
        max_shift: largest shift, chart units.
    """

    def __init__(
        self, expressions: int, in_channels: int, *, hidden: int = 24, ambient: int = 24, max_shift: float = 0.3
    ) -> None:
        super().__init__()
        self.expressions, self.hidden, self.max_shift = expressions, hidden, max_shift
        self.bases = nn.Conv2d(in_channels, expressions * hidden, 3, padding=1)
        self.mix = nn.Conv2d(hidden, hidden, 3, padding=1, bias=False)
        self.shift = nn.Conv2d(hidden, 2, 3, padding=1, bias=False)
        self.ambient = nn.Conv2d(hidden, ambient, 3, padding=1, bias=False)
        nn.init.normal_(self.shift.weight, std=1e-3)

    def forward(self, features: Tensor, expression: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Fields over the chart.

        Args:
            features: (B, in_channels, S, S) of the identities.
            expression: (B * V, expressions): V codes per identity.
            side: side of the returned maps.

        Returns:
            shift (B * V, 2, side, side) in chart units, ambient (B * V, ambient, side, side).
        """
        batch, views = len(features), len(expression) // len(features)
        bases = self.bases(features).reshape(batch, 1, self.expressions, self.hidden, *features.shape[2:])
        code = expression.reshape(batch, views, self.expressions, 1, 1, 1).to(bases.dtype)
        x = leaky((bases * code).sum(2).flatten(0, 1))
        x = leaky(self.mix(x))
        both = torch.cat([torch.tanh(self.shift(x)) * self.max_shift, self.ambient(x)], 1)
        both = F.interpolate(both, size=(side, side), mode="bilinear", align_corners=False)
        return both[:, :2], both[:, 2:]
