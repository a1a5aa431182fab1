"""Convolutions and blocks of the face networks, which were made for TensorFlow: "same" padding pads an odd pixel last.

BlazeFace: Bazarevsky et al., "BlazeFace: sub-millisecond neural face detection on mobile GPUs", 2019.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Convolution(nn.Conv2d):
    """A convolution whose output has 1 / stride of the input's side, rounded up.

    What is missing for that is padded with zeros, half of it on either side; of an odd number the larger half to the
    right and below. With a stride of 2 that differs from torch's symmetrical padding.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups)

    def forward(self, input: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        height, width = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in input.shape[-2:])
        if height or width:
            input = F.pad(input, (width // 2, width - width // 2, height // 2, height - height // 2))
        return super().forward(input)


class Depthwise(Convolution):
    """Every channel by itself."""

    def __init__(self, channels: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(channels, channels, kernel, stride, groups=channels)


class Separable(nn.Sequential):
    """Every channel by itself, then every pixel by itself."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(Depthwise(inputs, 3, stride), Convolution(inputs, outputs))


class BlazeBlock(nn.Module):
    """Residual block of separable convolutions; the shortcut is pooled and filled up with empty channels.

    Args:
        middle: channels between two separable convolutions, for the paper's double block; one alone without it.
        leaky: PReLU in place of ReLU.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int = 1, middle: int | None = None, leaky: bool = False
    ) -> None:
        super().__init__()
        if middle is None:
            self.body = Separable(inputs, outputs, stride)
        else:
            self.body = nn.Sequential(Separable(inputs, middle, stride), nn.ReLU(), Separable(middle, outputs))
        self.pool = nn.Identity() if stride == 1 else nn.MaxPool2d(stride)
        self.activation = nn.PReLU(outputs) if leaky else nn.ReLU()
        self.more = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(F.pad(self.pool(x), (0, 0, 0, 0, 0, self.more)) + self.body(x))
