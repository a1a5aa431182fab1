"""A radiance field stored as three orthogonal feature planes.

Source: EG3D (Chan et al., 2022), Sec. 4; GRAMInverter (Deng et al., 2023), Sec. 3.1, takes the same planes. The
decoder sees no viewing direction: colours are Lambertian.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.configurable import Configurable
from models.generators.layers import EqualLinear
from models.rendering.output import FieldSample

Axes = tuple[tuple[int, int], ...]
"""Which axes of a point run along the columns and the rows of each plane."""

PLANES: Axes = ((0, 1), (0, 2), (2, 1))  # xy, xz, zy


def sample_planes(planes: Tensor, points: Tensor, axes: Axes = PLANES) -> Tensor:
    """Bilinear lookups of points in every plane (EG3D, Sec. 4.1), at least in fp32; 0 outside.

    Args:
        planes: (B, N, C, H, W), spanning [-1, 1].
        points: (B, P, 3), in the same units.
        axes: of each of the N planes.

    Returns:
        (B, N, C, P).
    """
    along = points.unbind(-1)
    grid = torch.stack([torch.stack([along[i] for i in pair], -1) for pair in axes], 1).flatten(0, 1)[:, :, None]
    dtype = torch.promote_types(planes.dtype, torch.float32)
    found = F.grid_sample(planes.flatten(0, 1).to(dtype), grid.to(dtype), align_corners=False, padding_mode="zeros")
    return found[..., 0].unflatten(0, (-1, len(axes)))


class TriPlaneField(Configurable):
    """Tri-plane lookup and the small network that decodes it.

    Args:
        features: channels of one plane, and of the field.
        hidden: width of the decoder's hidden layer.
        extent: half side of the cube that the planes span, world units; outside of it the features are 0.
        density_scale: density = density_scale * softplus(.); the reciprocal of the thickness of a surface.
        density_bias: inside the softplus; negative, so that training starts from a thin fog.
    """

    def __init__(
        self,
        features: int = 24,
        hidden: int = 32,
        extent: float = 1.8,
        density_scale: float = 10.0,
        density_bias: float = -4.0,
    ) -> None:
        super().__init__()
        self.features, self.extent, self.width = features, extent, max(features, hidden)
        self.density_scale, self.density_bias = density_scale, density_bias
        self.hidden = EqualLinear(features, hidden)
        self.out = EqualLinear(hidden, 4)

    @property
    def channels(self) -> int:
        """Channels of the painted map that holds the three planes."""
        return len(PLANES) * self.features

    def at(self, painted: Tensor, points: Tensor) -> Tensor:
        """Features at any point: the mean of three bilinear lookups.

        Args:
            painted: (B, 3 * features, S, S). points: (B, P, 3), in world units from the centre of the cube.

        Returns:
            (B, P, features), fp32.
        """
        planes = painted.unflatten(1, (len(PLANES), self.features))
        return sample_planes(planes, points / self.extent).mean(1).mT

    def decode(self, features: Tensor) -> FieldSample:
        """(..., features) -> colour (..., 3) in [-1, 1] and density (..., 1), 1 / world unit; both fp32."""
        raw = self.out(F.softplus(self.hidden(features))).float()
        density = self.density_scale * F.softplus(raw[..., 3:] + self.density_bias)
        return FieldSample(colour=torch.tanh(raw[..., :3] / 2), density=density)
