"""Who is in front of the background, by MediaPipe's selfie segmentation.

A MobileNetV3 (Howard et al., "Searching for MobileNetV3", 2019) whose maps are gated on the way back up.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from models.configurable import Configurable
from models.faces.layers import Convolution, Depthwise


class PersonMask(Configurable):
    """A mask of persons with their hair and clothes."""

    size = 256

    def __init__(self) -> None:
        super().__init__()
        self.stem = Convolution(3, 16, 3, 2)
        fine = _Inverted(16, 16, 16, 2, squeezed=8)
        middle = nn.Sequential(_Inverted(16, 72, 24, 2), _Inverted(24, 88, 24))
        coarse = nn.Sequential(
            _Inverted(24, 96, 32, 2, 5, 24, F.hardswish),
            _Inverted(32, 128, 32, 1, 5, 32, F.hardswish),
            _Inverted(32, 128, 32, 1, 5, 32, F.hardswish),
            _Inverted(32, 96, 32, 1, 5, 24, F.hardswish),
            _Inverted(32, 96, 32, 1, 5, 24, F.hardswish),
        )
        self.down = nn.ModuleList([fine, middle, coarse])
        self.values = Convolution(32, 128)
        self.gate = Convolution(32, 128)
        self.up = nn.ModuleList([_Up(128, 24), _Up(24, 16), _Up(16, 16)])
        self.last = nn.ConvTranspose2d(16, 1, 2, 2)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, 256, 256) in [-1, 1] -> (B, 1, 256, 256) from 0, background, to 1, person."""
        x = F.hardswish(self.stem((image + 1) / 2))
        maps = []
        for down in self.down:
            maps.append(x)
            x = down(x)
        x = F.relu(self.values(x)) * self.gate(_mean(x)).sigmoid()
        for up, beside in zip(self.up, reversed(maps), strict=True):
            x = up(x, beside)
        return self.last(x).sigmoid()


class _Gate(nn.Module):
    """Squeeze and excitation: how much of each channel passes, from its mean."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.down, self.up = Convolution(channels, squeezed), Convolution(squeezed, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.relu(self.down(_mean(x)))).sigmoid()


class _Inverted(nn.Module):
    """MobileNetV3's inverted residual; the shortcut is there where input and output have one shape."""

    def __init__(
        self,
        inputs: int,
        middle: int,
        outputs: int,
        stride: int = 1,
        kernel: int = 3,
        squeezed: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        super().__init__()
        self.widen = Convolution(inputs, middle)
        self.depthwise = Depthwise(middle, kernel, stride)
        self.gate = None if squeezed is None else _Gate(middle, squeezed)
        self.narrow = Convolution(middle, outputs)
        self.activation = activation
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.depthwise(self.activation(self.widen(x))))
        y = self.narrow(y if self.gate is None else y * self.gate(y))
        return x + y if self.residual else y


class _Up(nn.Module):
    """A map of twice the side: the coarser one enlarged, and as much of the finer one as both let pass."""

    def __init__(self, coarse: int, channels: int) -> None:
        super().__init__()
        self.coarse = Convolution(coarse, channels)
        self.gate = _Gate(channels, channels)
        self.mix = Convolution(channels, channels)
        self.depthwise = Depthwise(channels)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        coarse = self.coarse(F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False))
        x = F.relu(self.mix(fine * self.gate(fine + coarse) + coarse))
        return x + F.relu(self.depthwise(x))


def _mean(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)
