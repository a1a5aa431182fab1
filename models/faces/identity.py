"""Who a face is: dlib's residual network of 128 numbers, on a square that five points of the mesh lay straight.

King, "High quality face recognition with deep metric learning", 2017 (dlib's dlib_face_recognition_resnet_model_v1).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import artifact
from models.configurable import Configurable
from models.errors import UserError
from models.faces.crop import cut
from models.faces.pose import similarity

IDENTITY_FOLDER = "runs/face_identity"
IDENTITY_COMMAND = f"galatea zoo import faces vladmandic-face-api-1.7.15.tgz --out {IDENTITY_FOLDER}"
"""Where the network is looked for, and what puts it there: it is not shipped."""
_MEANS = (122.782, 117.001, 104.298)  # of dlib's training pictures, from 0 to 255
_CORNERS = (263, 362, 33, 133, 2)
"""Points of the mesh where dlib has its five: the left eye's corners, the right eye's, each outer first, and below the
nose."""
_PLACES = (
    (0.8595674595992, 0.2134981538014),
    (0.6460604764104, 0.2289674387677),
    (0.1205750620789, 0.2137274526848),
    (0.3340850613712, 0.2290642403242),
    (0.4901123135679, 0.6277975316475),
)
"""Where they lie on dlib's mean face, in units of its box."""
_MARGIN = 0.25  # of dlib's box, on every side


class DlibIdentity(Configurable):
    """Descriptors whose Euclidean distance tells persons apart: dlib takes what is nearer than .6 for one."""

    size = 150
    dim = 128

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 7, 2)
        self.blocks = nn.Sequential(
            *(_Residual(32, 32) for _ in range(3)),
            _Residual(32, 64, 2),
            *(_Residual(64, 64) for _ in range(3)),
            _Residual(64, 128, 2),
            *(_Residual(128, 128) for _ in range(2)),
            _Residual(128, 256, 2),
            *(_Residual(256, 256) for _ in range(2)),
            _Residual(256, 256, 2),
        )
        self.last = nn.Linear(256, 128, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, 150, 150) squares of :func:`chip` in [-1, 1] -> (B, 128) descriptors, not of unit length."""
        means = image.new_tensor(_MEANS)[:, None, None]
        x = F.relu(self.stem(((image + 1) * 127.5 - means) / 256))
        return self.last(self.blocks(F.max_pool2d(x, 3, 2)).mean((2, 3)))


def load_identity(folder: Path) -> DlibIdentity:
    """dlib's network out of an artifact.

    Raises:
        UserError: when there is no artifact, or one of something else.
    """
    network = artifact.load(folder).module("identity")
    if not isinstance(network, DlibIdentity):
        raise UserError(f"{folder} holds a {type(network).__name__} as identity, not dlib's network")
    return network


class _Residual(nn.Module):
    """Two convolutions; with a stride of 2 the shortcut is averaged, and filled up with empty channels."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1 if stride == 1 else 0)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(F.relu(self.first(x)))
        if self.stride == 1:
            return F.relu(x + y)
        x = F.avg_pool2d(x, 2)
        # The two are of different sides: the smaller one is filled up with zeros, right and below.
        height, width = (max(a, b) for a, b in zip(x.shape[-2:], y.shape[-2:], strict=True))
        x = F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2], 0, self.more))
        return F.relu(x + F.pad(y, (0, width - y.shape[-1], 0, height - y.shape[-2])))


def chip(image: Tensor, points: Tensor, size: int = DlibIdentity.size) -> Tensor:
    """The square that dlib cuts out of a picture for a face; differentiable with respect to the picture.

    Args:
        image: (B, 3, H, W) in [-1, 1].
        points: (468, 2) or (468, 3) of its mesh, pixels.

    Returns:
        (B, 3, size, size).
    """
    points = points[list(_CORNERS), :2].detach().double().cpu()
    places = (torch.tensor(_PLACES, dtype=torch.float64) + _MARGIN) / (1 + 2 * _MARGIN)
    rotation, scale, shift = similarity(places[None], points[None])
    centre = shift[0] + scale[0] * (rotation[0] @ torch.full((2,), 0.5, dtype=torch.float64))
    return cut(image, centre, float(scale[0]), math.atan2(float(rotation[0, 1, 0]), float(rotation[0, 0, 0])), size)
