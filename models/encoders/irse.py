"""IR-SE: the residual network with squeeze-and-excitation behind ArcFace and the encoders of pSp and e4e.

Sources: ArcFace (Deng et al., 2019, improved residual units), SENet (Hu et al., 2018). Submodules are named as in the
official ``model_ir_se50.pth``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor, nn
from torch.nn import functional as F

from models.configurable import Configurable
from models.encoders.normalization import BatchNorm2d

WIDTHS = (64, 128, 256, 512)
DEPTHS = (3, 4, 14, 3)  # of the 50-layer network
REDUCTION = 16


class SqueezeExcitation(nn.Module):
    """Scales each channel of (B, C, H, W) by what all channels' means say about it."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class Bottleneck(nn.Module):
    """BN, conv, PReLU, strided conv, BN, squeeze-excitation unless ``reduction`` is None, plus the (strided) input."""

    def __init__(self, channels_in: int, channels: int, stride: int, reduction: int | None) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module
        if channels_in == channels:
            self.shortcut_layer = nn.Identity() if stride == 1 else nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), BatchNorm2d(channels)
            )
        self.res_layer = nn.Sequential(
            BatchNorm2d(channels_in),
            nn.Conv2d(channels_in, channels, 3, 1, 1, bias=False),
            nn.PReLU(channels),
            nn.Conv2d(channels, channels, 3, stride, 1, bias=False),
            BatchNorm2d(channels),
        )
        if reduction is not None:
            self.res_layer.append(SqueezeExcitation(channels, reduction))

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class IRTrunk(nn.Module):
    """The convolutional part: each stage halves the image and ends in one feature map.

    Args:
        channels: of the image.
        widths, depths: channels and blocks of each stage.
        reduction: of squeeze-and-excitation; None for a network without it.
    """

    def __init__(
        self,
        channels: int = 3,
        widths: Sequence[int] = WIDTHS,
        depths: Sequence[int] = DEPTHS,
        reduction: int | None = REDUCTION,
    ) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False), BatchNorm2d(widths[0]), nn.PReLU(widths[0])
        )
        blocks: list[Bottleneck] = []
        for before, width, depth in zip((widths[0], *widths), widths, depths, strict=False):
            blocks.append(Bottleneck(before, width, 2, reduction))
            blocks += [Bottleneck(width, width, 1, reduction) for _ in range(depth - 1)]
        self.body = nn.Sequential(*blocks)
        self.ends = tuple(accumulate(depths))

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, channels, H, W) -> (B, widths[i], H / 2^(i+1), W / 2^(i+1)) for each stage i."""
        x, maps = self.input_layer(image), []
        for count, block in enumerate(self.body, 1):
            x = block(x)
            if count in self.ends:
                maps.append(x)
        return maps


class ArcFace(Configurable):
    """Aligned faces (B, 3, resolution, resolution) in [-1, 1] -> (B, dim) unit vectors.

    Args:
        resolution: image side in pixels, a multiple of 2 to the power of the number of stages.
        dim: size of the embedding.
        widths, depths, reduction: see :class:`IRTrunk`.
        affine: whether the last normalisation has a scale and a bias.
    """

    def __init__(
        self,
        resolution: int = 112,
        dim: int = 512,
        widths: Sequence[int] = WIDTHS,
        depths: Sequence[int] = DEPTHS,
        reduction: int | None = REDUCTION,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.resolution, self.dim = resolution, dim
        self.trunk = IRTrunk(3, widths, depths, reduction)
        side = resolution >> len(widths)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(widths[-1]),
            nn.Dropout(0.6),
            nn.Flatten(),
            nn.Linear(widths[-1] * side * side, dim),
            nn.BatchNorm1d(dim, affine=affine),
        )

    def forward(self, image: Tensor) -> Tensor:
        return F.normalize(self.output_layer(self.trunk(image)[-1]), dim=1)


def crop_face(image: Tensor, resolution: int = 112) -> Tensor:
    """The face of FFHQ-aligned pictures, as the identity loss of pSp cuts it: rows 35-222, columns 32-219 of 256.

    Args:
        image: (B, 3, H, W); resized to 256 x 256 first where it has another size.

    Returns:
        (B, 3, resolution, resolution).
    """
    if image.shape[-2:] != (256, 256):
        image = F.interpolate(image, (256, 256), mode="bilinear", align_corners=False, antialias=True)
    return F.adaptive_avg_pool2d(image[:, :, 35:223, 32:220], resolution)
