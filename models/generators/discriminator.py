"""The discriminator of the adversarial stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.camera import LABEL_SIZE, Camera
from models.generators.base import Discriminator, DiscriminatorOutput
from models.generators.layers import EqualConv2d, EqualLinear, leaky

POSES = ("none", "regress", "condition")


class ResidualBlock(nn.Module):
    """Two convolutions and a skip, halving the side (StyleGAN2, Fig. 7c).

    The halving is a 2x2 mean on both paths: the second convolution then runs at the lower resolution.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first = EqualConv2d(in_channels, in_channels, 3)
        self.second = EqualConv2d(in_channels, out_channels, 3)
        self.skip = EqualConv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H/2, W/2)."""
        skip = self.skip(F.avg_pool2d(x, 2))
        x = leaky(self.second(F.avg_pool2d(leaky(self.first(x)), 2)))
        return (x + skip) * math.sqrt(0.5)  # keeps the variance of the sum of two


def minibatch_std(x: Tensor, group: int) -> Tensor:
    """Append the standard deviation over groups of the batch as one constant channel (ProGAN, Sec. 3).

    Args:
        x: (B, C, H, W).
        group: items compared with one another; the largest divisor of B up to this is taken.

    Returns:
        (B, C + 1, H, W).
    """
    batch, _, height, width = x.shape
    group = max(size for size in range(1, group + 1) if batch % size == 0)
    grouped = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(0, (group, batch // group))
    deviation = (grouped.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
    channel = deviation.repeat(group)[:, None, None, None].expand(batch, 1, height, width)
    return torch.cat([x, channel.to(x.dtype)], 1)


class ImageDiscriminator(Discriminator):
    """StyleGAN2's residual discriminator, with a head that reads the pose.

    Everything in it can be differentiated twice (R1).

    Args:
        channels: feature channels from the full resolution down to 4 x 4; the resolution is 4 * 2**(len - 1).
        minibatch_group: items per group of the minibatch standard deviation; 0 leaves it out, which makes every
            verdict independent of the rest of the batch.
        pose: "regress" answers yaw and pitch (GRAM's pose regularisation), "condition" judges the image together
            with its camera (projection, as EG3D), "none" knows no pose.

    Raises:
        ValueError: when ``pose`` is none of these.
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 64, 128, 256, 256),
        *,
        minibatch_group: int = 4,
        pose: str = "regress",
    ) -> None:
        super().__init__()
        if pose not in POSES:
            raise ValueError(f"pose must be one of {POSES}, got {pose!r}")
        self.resolution = 4 * 2 ** (len(channels) - 1)
        self.minibatch_group, self.pose = minibatch_group, pose
        self.camera_conditioned = pose == "condition"
        width = channels[-1]
        self.stem = EqualConv2d(3, channels[0], 1)
        self.blocks = nn.ModuleList(ResidualBlock(a, b) for a, b in pairwise(channels))
        self.conv = EqualConv2d(width + bool(minibatch_group), width, 3)
        self.dense = EqualLinear(width * 16, width)
        self.logit = EqualLinear(width, width if pose == "condition" else 1)
        self.angles = EqualLinear(width, 2) if pose == "regress" else None
        self.embed = EqualLinear(LABEL_SIZE, width) if pose == "condition" else None

    def forward(self, image: Tensor, camera: Camera | None = None) -> DiscriminatorOutput:
        """Judge images (B, 3, resolution, resolution) in [-1, 1].

        Raises:
            ValueError: when the size is wrong, or a camera is missing or would be ignored.
        """
        if image.shape[1:] != (3, self.resolution, self.resolution):
            raise ValueError(f"images must be (B, 3, {self.resolution}, {self.resolution}), got {tuple(image.shape)}")
        if (camera is None) == self.camera_conditioned:
            need = "needs a" if camera is None else "takes no"
            raise ValueError(f"a discriminator with pose={self.pose!r} {need} camera")
        x = leaky(self.stem(image))
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        if self.minibatch_group:
            x = minibatch_std(x, self.minibatch_group)
        x = leaky(self.dense(leaky(self.conv(x)).flatten(1)))
        logits = self.logit(x).float()
        if camera is not None and self.embed is not None:
            label = F.normalize(self.embed(camera.label()).float(), dim=1)
            logits = (logits * label).sum(1, keepdim=True)
        return DiscriminatorOutput(logits, None if self.angles is None else self.angles(x).float(), tuple(features))
