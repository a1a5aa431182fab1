"""E3DGE: codes of a picture for StyleSDF, and pixel-aligned details that are fused into its field.

E0 (:class:`GlobalEncoder`) sees the picture, E1 (:class:`LocalEncoder`) what the picture has beyond its reconstruction.
A point of the field finds its details where it projects to in that picture (:func:`pixel_features`), and
:class:`TextureFusion` modulates the field's features with them, as an ``edit`` of ``synthesis``.

Sources: E3DGE (Lan et al., 2023); PIFu (Saito et al., 2019) and stacked hourglasses (Newell et al., 2016) for E1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.camera import Camera
from models.configurable import Configurable
from models.encoders.base import Encoder
from models.encoders.irse import DEPTHS, REDUCTION, WIDTHS, IRTrunk
from models.encoders.normalization import BatchNorm2d
from models.encoders.pyramid import MapToStyle, upsample_add
from models.errors import UserError
from models.latents import Latents

NORMS = ("group", "batch")

# -- E0 ----------------------------------------------------------------------------------------------------------------


class GlobalEncoder(Encoder):
    """E0: offsets of renderer codes, and of decoder codes, from a feature pyramid (supplement B.2).

    The first codes of the renderer shape the geometry and read the pyramid at 1/8 of the picture's side, those after
    them texture, at 1/4 or 1/8. All decoder codes are one, read at 1/2.

    Args:
        geometry, texture: how many renderer codes; w_dim: their size.
        geometry_side, texture_side: sides that the codes' networks, of log2(side) strided convolutions, were made for;
            with 64, texture codes read 1/4.
        decoder_heads: networks for decoder codes; 0 for none.
        decoder_shared: whether the first of them tells all decoder codes, as in the released encoder, which owns ten;
            otherwise there is one for each code (B.2).
        decoder_ws, decoder_dim, decoder_side: decoder codes, their size, and the side as above.
        resolution: image side in pixels. channels: of the image.
        widths, depths, reduction: of the trunk's four stages, see :class:`models.encoders.irse.IRTrunk`.
        style_width: channels inside of the networks that make codes; the size of the code by default.
    """

    def __init__(
        self,
        geometry: int = 6,
        texture: int = 3,
        w_dim: int = 256,
        geometry_side: int = 32,
        texture_side: int = 64,
        decoder_heads: int = 1,
        decoder_shared: bool = True,
        decoder_ws: int = 10,
        decoder_dim: int = 512,
        decoder_side: int = 128,
        resolution: int = 256,
        channels: int = 3,
        widths: Sequence[int] = WIDTHS,
        depths: Sequence[int] = DEPTHS,
        reduction: int | None = REDUCTION,
        style_width: int | None = None,
    ) -> None:
        super().__init__()
        self.geometry, self.decoder_ws, self.resolution, self.channels = geometry, decoder_ws, resolution, channels
        self.fine_texture, self.decoder_shared = texture_side == 64, decoder_shared
        if not decoder_shared and decoder_heads not in (0, decoder_ws):
            raise UserError(f"encoder.decoder_heads is {decoder_heads}: {decoder_ws} codes take one each, or share one")
        self.trunk = IRTrunk(channels, widths, depths, reduction)
        finest, fine, medium, coarse = widths
        sides = [geometry_side] * geometry + [texture_side] * texture
        self.styles_pigan = nn.ModuleList(MapToStyle(coarse, w_dim, side, style_width) for side in sides)
        self.styles_stylegan = nn.ModuleList(
            MapToStyle(coarse, decoder_dim, decoder_side, style_width) for _ in range(decoder_heads)
        )
        self.latlayer64 = nn.Conv2d(finest, coarse, 1)
        self.latlayer128 = nn.Conv2d(fine, coarse, 1)
        self.latlayer256 = nn.Conv2d(medium, coarse, 1)

    def forward(self, image: Tensor) -> Latents:
        """As :meth:`Encoder.forward`; larger images are averaged down.

        Raises:
            ValueError: for images of another shape.
        """
        if min(image.shape[2:]) > self.resolution:
            image = F.adaptive_avg_pool2d(image, self.resolution)
        self.check_image(image)
        finest, fine, medium, coarse = self.trunk(image)
        eighth = upsample_add(coarse, self.latlayer256(medium))
        quarter = upsample_add(eighth, self.latlayer128(fine))
        seen = quarter if self.fine_texture else eighth
        renderer = [style(eighth if i < self.geometry else seen) for i, style in enumerate(self.styles_pigan)]
        groups = {"renderer": torch.stack(renderer, 1)}
        if len(self.styles_stylegan):
            half = upsample_add(quarter, self.latlayer64(finest))
            if self.decoder_shared:
                groups["decoder"] = self.styles_stylegan[0](half)[:, None].expand(-1, self.decoder_ws, -1)
            else:
                groups["decoder"] = torch.stack([style(half) for style in self.styles_stylegan], 1)
        return Latents(groups)


# -- E1 ----------------------------------------------------------------------------------------------------------------


def make_norm(norm: str, channels: int) -> nn.Module:
    """Group normalisation with 32 groups, or as many as divide fewer channels; or batch normalisation."""
    return nn.GroupNorm(math.gcd(32, channels), channels) if norm == "group" else BatchNorm2d(channels)


class ConvBlock(nn.Module):
    """Three convolutions of 1/2, 1/4 and 1/4 of the channels, one after the other, and side by side in the result."""

    def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
        super().__init__()
        half, quarter = out_channels // 2, out_channels // 4
        self.bn1, self.conv1 = make_norm(norm, in_channels), nn.Conv2d(in_channels, half, 3, 1, 1, bias=False)
        self.bn2, self.conv2 = make_norm(norm, half), nn.Conv2d(half, quarter, 3, 1, 1, bias=False)
        self.bn3, self.conv3 = make_norm(norm, quarter), nn.Conv2d(quarter, quarter, 3, 1, 1, bias=False)
        self.downsample = nn.Sequential()
        if in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
            self.downsample.extend([make_norm(norm, in_channels), nn.ReLU(), conv])

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv1(F.relu(self.bn1(x)))
        second = self.conv2(F.relu(self.bn2(first)))
        third = self.conv3(F.relu(self.bn3(second)))
        return torch.cat([first, second, third], 1) + self.downsample(x)


class Hourglass(nn.Module):
    """A map processed at its size and, ``depth`` times halved, at smaller ones."""

    def __init__(self, depth: int, channels: int, norm: str) -> None:
        super().__init__()
        self.same, self.down, self.up = (ConvBlock(channels, channels, norm) for _ in range(3))
        self.inner = Hourglass(depth - 1, channels, norm) if depth > 1 else ConvBlock(channels, channels, norm)

    def forward(self, x: Tensor) -> Tensor:
        low = self.up(self.inner(self.down(F.avg_pool2d(x, 2))))
        return self.same(x) + F.interpolate(low, scale_factor=2, mode="bicubic", align_corners=True)


class Stack(nn.Module):
    """One hourglass, what it says, and what the next one starts from."""

    def __init__(self, depth: int, channels: int, features: int, norm: str, *, last: bool) -> None:
        super().__init__()
        self.hourglass = Hourglass(depth, channels, norm)
        self.top = ConvBlock(channels, channels, norm)
        self.mix = nn.Sequential(nn.Conv2d(channels, channels, 1), make_norm(norm, channels), nn.ReLU())
        self.out = nn.Conv2d(channels, features, 1)
        self.last = last
        if not last:
            self.back, self.back_out = nn.Conv2d(channels, channels, 1), nn.Conv2d(features, channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A map to what the hourglass says (B, features, H, W), and the next one's input, itself after the last."""
        mixed = self.mix(self.top(self.hourglass(x)))
        out = self.out(mixed)
        return out, x if self.last else x + self.back(mixed) + self.back_out(out)


class ReflectBlock(nn.Module):
    """Residual block, normalised per picture first, with reflected borders."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential()
        for _ in range(2):
            conv = nn.Conv2d(channels, channels, 3, 1, 1, bias=False, padding_mode="reflect")
            self.conv.extend([nn.InstanceNorm2d(channels, affine=True), nn.ReLU(), conv])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def make_stem(in_channels: int, channels: int) -> nn.Sequential:
    """Features of a picture at its size."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False, padding_mode="reflect"),
        ReflectBlock(channels),
        nn.Conv2d(channels, channels, 1, bias=False),
    )


class LocalEncoder(Configurable):
    """E1: details of a picture, pixel by pixel at a quarter of its side: stacked hourglasses (Eq. 7).

    Args:
        stem: channels made of the residual, and as many of the depth.
        features: channels of the result; channels: of the hourglasses.
        stacks, depth: hourglasses, one after the other, and how often each halves its map.
        norm: "group" or "batch".
        strided: channels of the strided convolution that halves the second time; 0 averages instead.
        width: channels before the hourglasses.

    Raises:
        ValueError: when ``norm`` is unknown.
    """

    def __init__(
        self, stem: int = 32, features: int = 256, channels: int = 256, stacks: int = 4, depth: int = 2,
        norm: str = "group", strided: int = 0, width: int = 128,
    ) -> None:  # fmt: skip
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
        self.features = features
        self.residual_conv, self.depth_conv = make_stem(3, stem), make_stem(1, stem)
        self.stem = nn.Sequential(nn.Conv2d(2 * stem, 64, 7, 2, 3), make_norm(norm, 64), nn.ReLU())
        self.block1 = ConvBlock(64, strided or width, norm)
        self.halve = nn.Conv2d(strided, width, 3, 2, 1) if strided else nn.AvgPool2d(2)
        self.block2, self.block3 = ConvBlock(width, width, norm), ConvBlock(width, channels, norm)
        self.stacks = nn.ModuleList(Stack(depth, channels, features, norm, last=i == stacks - 1) for i in range(stacks))

    def forward(self, residual: Tensor, depth: Tensor) -> Tensor:
        """(B, features, S / 4, S / 4).

        Args:
            residual: (B, 3, S, S) picture less its reconstruction, both in [-1, 1].
            depth: (B, 1, S, S) of the reconstruction, camera-z, world units.
        """
        x = self.stem(torch.cat([self.residual_conv(residual), self.depth_conv(depth)], 1))
        x = self.block3(self.block2(self.halve(self.block1(x))))
        found = x
        for stack in self.stacks:
            found, x = stack(x)
        return found


def within(points: Tensor, camera: Camera) -> Tensor:
    """Whether world points (B, P, 3) project into the pictures that B cameras took: (B, P, 1)."""
    uv, _ = camera.project(points)
    return ((2 * uv - 1).abs() <= 1).all(-1, keepdim=True)


def pixel_features(feature_map: Tensor, camera: Camera, points: Tensor) -> Tensor:
    """Features of the pixels that points project to, F_L(pi(x)) (Eq. 8).

    Args:
        feature_map: (B, C, H, W) of the picture that ``camera`` took. points: (B, P, 3), world.

    Returns:
        features (B, P, C), 0 outside of the picture.
    """
    uv, _ = camera.project(points)
    grid = (2 * uv - 1)[:, :, None]
    return F.grid_sample(feature_map, grid.to(feature_map.dtype), align_corners=False)[..., 0].mT


# -- fusion ------------------------------------------------------------------------------------------------------------


def positional_encoding(points: Tensor, frequencies: int) -> Tensor:
    """PE(x): points (..., 3), then sines and cosines of 2^k x for each k: (..., 3 + 6 * frequencies)."""
    waves = [wave(2.0**k * points) for k in range(frequencies) for wave in (torch.sin, torch.cos)]
    return torch.cat([points, *waves], -1)


class ResidualMLP(nn.Module):
    """Two layers that each start with a ReLU, beside a linear shortcut. It starts as the shortcut."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        hidden = min(in_features, out_features)
        self.fc_0, self.fc_1 = nn.Linear(in_features, hidden), nn.Linear(hidden, out_features)
        self.shortcut = (
            nn.Identity() if in_features == out_features else nn.Linear(in_features, out_features, bias=False)
        )
        nn.init.zeros_(self.fc_1.weight)
        nn.init.zeros_(self.fc_1.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return self.shortcut(x) + self.fc_1(F.relu(self.fc_0(F.relu(x))))


class TextureFusion(Configurable):
    """Local features modulate those of the field, after distances are read: details paint, they do not move (Sec. 4.2).

    Args:
        width: features of the field that are modulated, its first.
        channels: local features. frequencies: of the positional encoding that follows them; None for no encoding.
    """

    def __init__(self, width: int = 256, channels: int = 256, frequencies: int | None = 7) -> None:
        super().__init__()
        self.width, self.frequencies = width, frequencies
        encoding = 0 if frequencies is None else 3 + 6 * frequencies
        self.film = ResidualMLP(channels + encoding, 2 * width)

    def silence(self) -> None:
        """From here on gamma and beta are 0, until they learn."""
        for parameter in (*self.film.fc_1.parameters(), *self.film.shortcut.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor, local: Tensor) -> Tensor:
        """(1 + gamma) f + beta for the first ``width`` of the features (B, P, C >= width), with gamma and beta from
        ``local`` (B, P, channels and positional encoding)."""
        gamma, beta = self.film(local).chunk(2, -1)
        modulated = (1 + gamma) * features[..., : self.width] + beta
        return torch.cat([modulated, features[..., self.width :]], -1)

    def local(self, found: Tensor, points: Tensor) -> Tensor:
        """f_L(x) = F_L(pi(x)) and PE(x) side by side (Eq. 8): (B, P, channels), (B, P, 3) -> (B, P, C)."""
        if self.frequencies is None:
            return found
        return torch.cat([found, positional_encoding(points, self.frequencies)], -1)


class AlignmentFusion(Configurable):
    """Details aligned in 3D, modulated with those aligned in the novel view (Eq. 9).

    Args:
        channels: details of each kind. visibility: whether the novel view's come with one more: seen or not.
    """

    def __init__(self, channels: int = 256, visibility: bool = True) -> None:
        super().__init__()
        self.encode = ResidualMLP(2 * channels + visibility, channels)
        self.scale, self.shift = (
            nn.Sequential(nn.Linear(channels, channels), nn.LeakyReLU(0.2), nn.Linear(channels, channels))
            for _ in range(2)
        )

    def silence(self) -> None:
        """From here on f_ADA changes nothing, until scale and shift learn."""
        for network in (self.scale, self.shift):
            for parameter in network[-1].parameters():
                nn.init.zeros_(parameter)

    def forward(self, local: Tensor, aligned: Tensor, weight: float = 1.0) -> Tensor:
        """f_L + weight (scale f_L + shift): (B, P, channels).

        Args:
            local: f_L (B, P, channels). aligned: f_ADA (B, P, channels, and visibility).
        """
        found = self.encode(torch.cat([aligned, local], -1))
        return local + weight * (local * self.scale(found) + self.shift(found))
