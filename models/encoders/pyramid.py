"""The encoders of pSp and e4e: a feature pyramid on an IR-SE trunk, and one small network a style code.

Sources: "Encoding in Style" (Richardson et al., 2021, Section 3), "Designing an Encoder for StyleGAN Image
Manipulation" (Tov et al., 2021, Section 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.encoders.base import Encoder
from models.encoders.irse import DEPTHS, REDUCTION, WIDTHS, IRTrunk
from models.generators.base import Latents
from models.generators.layers import EqualLinear

MEDIUM, FINE = 3, 7  # first style codes that look at the second and at the third level of the pyramid


class MapToStyle(nn.Module):
    """(B, C, side, side) -> (B, w_dim) by strided convolutions down to one pixel, then a linear layer."""

    def __init__(self, channels: int, w_dim: int, side: int) -> None:
        super().__init__()
        self.convs = nn.Sequential()
        for before in (channels, *[w_dim] * (side.bit_length() - 2)):
            self.convs.extend([nn.Conv2d(before, w_dim, 3, 2, 1), nn.LeakyReLU(0.01)])
        self.linear = EqualLinear(w_dim, w_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.convs(x).flatten(1))


class GradualStyleEncoder(Encoder):
    """pSp: coarse, medium and fine style codes from three levels of a feature pyramid.

    Args:
        num_ws, w_dim: codes of the generator.
        resolution: image side in pixels, a power of two of at least 32.
        channels: of the image: 3, or the number of labels of a segmentation.
        widths, depths, reduction: of the trunk's four stages, see :class:`models.encoders.irse.IRTrunk`.

    Attributes:
        latent_avg: (num_ws, w_dim) buffer: the mean code it was trained with, zeros where it predicts codes themselves.
    """

    latent_avg: Tensor

    def __init__(
        self,
        num_ws: int,
        w_dim: int = 512,
        resolution: int = 256,
        channels: int = 3,
        widths: Sequence[int] = WIDTHS,
        depths: Sequence[int] = DEPTHS,
        reduction: int | None = REDUCTION,
    ) -> None:
        super().__init__()
        if resolution < 32 or resolution & (resolution - 1):
            raise ValueError(f"resolution must be a power of two of at least 32, got {resolution}")
        self.num_ws, self.w_dim, self.resolution, self.channels = num_ws, w_dim, resolution, channels
        self.trunk = IRTrunk(channels, widths, depths, reduction)
        _, fine, medium, coarse = widths
        side = resolution // 16  # of the coarsest map
        self.styles = nn.ModuleList(
            MapToStyle(coarse, w_dim, side * (1 if i < MEDIUM else 2 if i < FINE else 4)) for i in range(num_ws)
        )
        self.latlayer1 = nn.Conv2d(medium, coarse, 1)
        self.latlayer2 = nn.Conv2d(fine, coarse, 1)
        self.register_buffer("latent_avg", torch.zeros(num_ws, w_dim))

    def forward(self, image: Tensor) -> Latents:
        return Latents({"ws": self.predict(image, self.num_ws)})

    def codes(self, image: Tensor, latent_avg: Latents | None = None) -> Latents:
        """Codes for ``Generator.synthesis``: ``latent_avg``, by default the encoder's own, + offsets."""
        return super().codes(image, latent_avg or Latents({"ws": self.latent_avg[None]}))

    def predict(self, image: Tensor, count: int) -> Tensor:
        """(B, count, w_dim): what the first ``count`` style networks say. Levels that none of them sees are not built.

        Raises:
            ValueError: for images of another size.
        """
        self.check_image(image)
        _, fine, medium, level = self.trunk(image)
        found = []
        for i, style in enumerate(self.styles[:count]):
            if i == MEDIUM:
                level = upsample_add(level, self.latlayer1(medium))
            elif i == FINE:
                level = upsample_add(level, self.latlayer2(fine))
            found.append(style(level))
        return torch.stack(found, 1)


class Encoder4Editing(GradualStyleEncoder):
    """e4e: one code, and what the others differ from it by: close to W, hence easy to edit.

    Training starts with equal codes and lets them differ one after the other; :meth:`set_progressive_stage` says how
    far that went. A new instance is at the last stage. Arguments as of :class:`GradualStyleEncoder`.
    """

    stage: int | None = None

    def set_progressive_stage(self, stage: int | None) -> None:
        """Let codes 1 to ``stage`` differ from code 0: none at 0, all for None.

        Raises:
            ValueError: when it is negative.
        """
        if stage is not None and stage < 0:
            raise ValueError(f"a progressive stage is 0 or more, got {stage}")
        self.stage = stage

    def forward(self, image: Tensor) -> Latents:
        count = self.num_ws if self.stage is None else min(self.stage + 1, self.num_ws)
        found = self.predict(image, count)
        # E(x) = (w, w + delta_1, ..., w + delta_(N-1)), deltas that are not trained yet being 0.
        deltas = F.pad(found[:, 1:], (0, 0, 1, self.num_ws - count))
        return Latents({"ws": found[:, :1] + deltas})


def upsample_add(coarse: Tensor, lateral: Tensor) -> Tensor:
    """``coarse`` (B, C, h, w) at the size of ``lateral`` (B, C, H, W), added to it."""
    return F.interpolate(coarse, lateral.shape[-2:], mode="bilinear", align_corners=True) + lateral
