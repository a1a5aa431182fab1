"""StyleGAN2: a constant painted into an image by style-modulated convolutions, and the critic it is trained against.

Everything runs channels_last, which CPU convolutions and depthwise filters like best. EG3D and StyleSDF are made of the
same blocks.

Source: "Analyzing and Improving the Image Quality of StyleGAN" (Karras et al., 2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.camera import Camera, Rig
from models.generators.base import Discriminator, DiscriminatorOutput, Generator
from models.generators.discriminator import minibatch_std
from models.generators.fir import blur, downsample2x, fir_kernel, up_conv, upfirdn2d, upsample2x
from models.generators.layers import LEAKY_GAIN, LEAKY_SLOPE, EqualConv2d, EqualLinear, MappingNetwork, leaky
from models.latents import Latents
from models.rendering.output import Edit, Rendering

LayerNoise = torch.Generator | Tensor | Literal["const", "none"]
"""A layer's per-pixel noise: drawn anew, a map (B or 1, 1, side, side), the stored map, or left out."""

Noise = torch.Generator | list[Tensor] | Literal["const", "none"]
"""The same for several layers, with one map a layer."""


def stylegan2_channels(resolution: int, multiplier: float = 2) -> tuple[int, ...]:
    """The paper's feature channels from side 4 to ``resolution``; multiplier 2 is config F, 1 halves large sides.

    Raises:
        ValueError: when the resolution is no power of two of at least 8.
    """
    if resolution < 8 or resolution & (resolution - 1):
        raise ValueError(f"resolution must be a power of two of at least 8, got {resolution}")
    sides = (4 << k for k in range(resolution.bit_length() - 2))
    return tuple(512 if side <= 32 else int(multiplier * 16384 / side) for side in sides)


def clamp_to(x: Tensor, limit: float | None) -> Tensor:
    """x within [-limit, limit]; None is no limit."""
    return x if limit is None else x.clamp(-limit, limit)


def full_precision(x: Tensor) -> torch.autocast:
    """Keep what follows out of the caller's autocast: squares of styles underflow in half precision."""
    return torch.autocast(x.device.type, enabled=False)


class SynthesisLayer(nn.Module):
    """3x3 modulated convolution, noise, bias and leaky ReLU (StyleGAN2, Fig. 2d).

    Modulation scales what goes in and demodulation what comes out, so that the items of a batch share one weight.
    The lighter :class:`models.generators.layers.StyledConv`, without noise and filters, stands beside it: this layer's
    order of operations would change the last digits of what the embedded prior's shipped weights give.

    Args:
        side: of the output, pixels.
        upsample: double the side, by a transposed convolution and the filter.
        clamp: largest magnitude of an activation; None is no limit.
    """

    noise: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, w_dim: int, side: int, *, upsample: bool, clamp: float | None
    ) -> None:
        super().__init__()
        self.affine = EqualLinear(w_dim, in_channels, bias=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise", torch.randn(side, side))
        self.upsample, self.clamp = upsample, clamp

    def forward(self, x: Tensor, w: Tensor, kernel: Tensor, noise: LayerNoise) -> Tensor:
        """x (B, in_channels, H, W), w (B, w_dim), filter (k, k) -> (B, out_channels, side, side)."""
        weight = self.weight
        with full_precision(x):
            style = self.affine(w.to(weight.dtype))
            # Eq. 3. Summing over the 3x3 taps within the product is faster than before it.
            energy = style.square().repeat_interleave(9, 1) @ weight.square().flatten(1).T
            demodulation = torch.rsqrt(energy + 1e-8)
        x = x * style[:, :, None, None].to(x.dtype)  # Eq. 1
        if self.upsample:
            x = up_conv(x, weight.transpose(0, 1).contiguous())  # a strided weight is slower
            taps = len(kernel)
            x = upfirdn2d(x, kernel, pad=((taps + 1) // 2 - 1, taps // 2 - 1), gain=4.0)
        else:
            x = F.conv2d(x, weight, padding=1)
        # In place, since memory bounds large images. leaky(a x) = a leaky(x) for a > 0: its gain goes into the factors.
        x.mul_((demodulation * LEAKY_GAIN)[:, :, None, None].to(x.dtype))
        if (pixels := self.noise_map(noise, len(x))) is not None:
            x.add_((self.noise_strength * LEAKY_GAIN * pixels).to(x.dtype))
        x.add_((self.bias * LEAKY_GAIN)[:, None, None].to(x.dtype))
        return clamp_to(F.leaky_relu_(x, LEAKY_SLOPE), self.clamp)

    def noise_map(self, noise: LayerNoise, batch: int) -> Tensor | None:
        """The map that ``noise`` means, (side, side) or (B or 1, 1, side, side)."""
        if isinstance(noise, torch.Generator):
            return torch.randn(batch, 1, *self.noise.shape, generator=noise, device=noise.device).to(self.noise)
        if isinstance(noise, str):
            return self.noise if noise == "const" else None
        return noise


class ToImage(nn.Module):
    """1x1 modulated convolution without demodulation (StyleGAN2, Sec. 4.1): one matrix product an item."""

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, *, clamp: float | None) -> None:
        super().__init__()
        self.affine = EqualLinear(w_dim, in_channels, bias=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.scale, self.clamp = 1 / math.sqrt(in_channels), clamp

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x (B, in_channels, H, W), w (B, w_dim) -> (B, out_channels, H, W), fp32 under autocast."""
        with full_precision(x):
            style = self.affine(w.to(self.weight.dtype)) * self.scale
            mixing = self.weight[:, :, 0, 0] * style[:, None]
            pixels = x.permute(0, 2, 3, 1).flatten(1, 2).to(mixing.dtype)
            image = torch.baddbmm(self.bias, pixels, mixing.mT)
        return clamp_to(image.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2), self.clamp)


class SynthesisBlock(nn.Module):
    """Two layers at one resolution, and what they add to the image (StyleGAN2, Fig. 7b).

    Args:
        in_channels: None for the first block, which starts from a learned constant and has one layer.
        upsample: whether features and image arrive at half the side.
    """

    def __init__(
        self, in_channels: int | None, out_channels: int, image_channels: int, w_dim: int, side: int, *,
        upsample: bool = True, clamp: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.upsample = upsample
        if in_channels is None:
            self.const = nn.Parameter(torch.randn(out_channels, side, side))
        else:
            self.conv0 = SynthesisLayer(in_channels, out_channels, w_dim, side, upsample=upsample, clamp=clamp)
        self.conv1 = SynthesisLayer(out_channels, out_channels, w_dim, side, upsample=False, clamp=clamp)
        self.to_image = ToImage(out_channels, image_channels, w_dim, clamp=clamp)

    @property
    def layers(self) -> list[SynthesisLayer]:
        """The convolutions, in order."""
        return [layer for layer in self.children() if isinstance(layer, SynthesisLayer)]

    def forward(
        self, x: Tensor | None, image: Tensor | None, ws: Tensor, kernel: Tensor, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """Features and image of the previous block to those of this one.

        Args:
            ws: (B, layers + 1, w_dim), one code a layer and one for the image.
        """
        noises = noise if isinstance(noise, list) else [noise] * len(self.layers)
        if x is None:
            x = self.const.expand(len(ws), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        for layer, w, given in zip(self.layers, ws.unbind(1), noises, strict=False):
            x = layer(x, w, kernel, given)
        assert x is not None
        added = self.to_image(x, ws[:, -1])
        if image is None:
            return x, added
        with full_precision(x):
            return x, (upsample2x(image, kernel) if self.upsample else image) + added


class SynthesisNetwork(nn.Module):
    """Blocks of doubling side from a learned constant.

    The block of side ``start`` uses codes 0 (layer) and 1 (image); block k uses 2k-1, 2k (layers) and 2k+1 (image):
    neighbours share a code.

    Args:
        channels: of the features, from the smallest block to the largest.
        image_channels: of the image.
        taps: of the separable upsampling filter.
        clamp: see :class:`SynthesisLayer`.
    """

    kernel: Tensor

    def __init__(
        self, w_dim: int, channels: Sequence[int], image_channels: int, *, start: int = 4,
        taps: Sequence[float] = (1, 3, 3, 1), clamp: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sides = [start * 2**k for k in range(len(channels))]
        self.num_ws, self.clamp = 2 * len(channels), clamp
        self.blocks = nn.ModuleList(
            SynthesisBlock(before, width, image_channels, w_dim, side, clamp=clamp)
            for before, width, side in zip([None, *channels], channels, self.sides, strict=False)
        )
        self.register_buffer("kernel", fir_kernel(taps), persistent=False)

    def forward(self, ws: Tensor, noise: Noise = "const") -> list[tuple[Tensor, Tensor]]:
        """Codes (B, num_ws, w_dim) to each block's features (B, C, S, S) and image (B, image_channels, S, S)."""
        found: list[tuple[Tensor, Tensor]] = []
        x = image = None
        for k, block in enumerate(self.blocks):
            first = max(2 * k - 1, 0)
            given = noise[first : 2 * k + 1] if isinstance(noise, list) else noise
            x, image = block(x, image, ws[:, first : 2 * k + 2], self.kernel, given)
            found.append((x, image))
        return found


class StyleGAN2Generator(Generator):
    """StyleGAN2's generator with skip outputs (Fig. 7b).

    Args:
        channels: of the features, from side 4 up; the resolution is 4 * 2**(len - 1). See :func:`stylegan2_channels`.
        style_dim: size of w, and of z unless ``z_dim`` says another.
        mapping_layers: layers from z to w.
        mapping_lr: learning rate of these layers, relative to the others.
        taps: of the separable upsampling filter.
        z_dim: size of z.
        normalize, octaves: of :class:`models.generators.layers.MappingNetwork`.
    """

    is_3d = False
    free_resolution = False
    w_avg: Tensor

    def __init__(
        self,
        channels: Sequence[int] = stylegan2_channels(256),
        *,
        style_dim: int = 512,
        mapping_layers: int = 8,
        mapping_lr: float = 0.01,
        taps: Sequence[float] = (1, 3, 3, 1),
        z_dim: int | None = None,
        normalize: bool = True,
        octaves: int = 0,
    ) -> None:
        super().__init__()
        self.z_dim, self.w_dim = z_dim or style_dim, style_dim
        self.rig = Rig()
        self.map_network = MappingNetwork(
            self.z_dim, style_dim, layers=mapping_layers, normalize=normalize, lr_multiplier=mapping_lr, octaves=octaves
        )
        self.backbone = SynthesisNetwork(style_dim, channels, 3, taps=taps)
        self.num_ws, self.resolution = self.backbone.num_ws, self.backbone.sides[-1]
        self.register_buffer("w_avg", torch.zeros(style_dim))

    # -- codes ---------------------------------------------------------------------------------------------------

    def mapping(
        self, z: Tensor, *, camera: Camera | None = None, truncation: float = 1.0, cutoff: int | None = None
    ) -> Latents:
        self._refuse_camera(camera)
        if z.shape[1:] not in ((self.z_dim,), (self.num_ws, self.z_dim)):
            raise ValueError(f"z must be (B, {self.z_dim}) or (B, {self.num_ws}, {self.z_dim}), got {tuple(z.shape)}")
        w = self.map_network(z)
        latents = Latents({"ws": w if w.ndim == 3 else w[:, None].expand(-1, self.num_ws, -1)})
        return latents if truncation == 1 else latents.truncate(self.mean_latents, truncation, cutoff)

    @property
    def mean_latents(self) -> Latents:
        return Latents({"ws": self.w_avg.expand(1, self.num_ws, -1)})

    @torch.no_grad()
    def update_mean(self, count: int = 10_000, seed: int = 0) -> None:
        """Set the mean code from ``count`` random z."""
        z = self.sample_z(count, torch.Generator().manual_seed(seed)).to(self.w_avg)
        self.w_avg.copy_(self.map_network(z).mean(0))

    def affine_weights(self, layers: Sequence[int] | None = None) -> Tensor:
        """As :meth:`Generator.affine_weights`, of the 3x3 convolutions: layer i reads code i."""
        found = [layer.affine for block in self.backbone.blocks for layer in block.layers]  # type: ignore[union-attr]
        chosen = found if layers is None else [found[i] for i in layers]
        return torch.cat([affine.weight * affine.scale for affine in chosen])

    # -- images --------------------------------------------------------------------------------------------------

    @property
    def tap_names(self) -> tuple[str, ...]:
        """Each block's features, and the image so far."""
        return tuple(f"{kind}{side}" for side in self.backbone.sides for kind in ("block", "image"))

    @property
    def noise_sides(self) -> list[int]:
        """Sides of the noise maps, one a convolution."""
        return [len(layer.noise) for block in self.backbone.blocks for layer in block.layers]  # type: ignore[union-attr]

    def synthesis(
        self,
        ws: Latents,
        camera: Camera | None = None,
        *,
        expression: Tensor | None = None,
        edit: Edit | None = None,
        randomness: torch.Generator | Tensor | Sequence[Tensor] | None = None,
        taps: Sequence[str] = (),
        resolution: int | None = None,
    ) -> Rendering:
        """As :meth:`Generator.synthesis`, at the native resolution. Nothing clamps the image.

        Args:
            randomness: per-pixel noise: a generator draws it anew; maps (B or 1, 1, side, side), one for each of
                ``noise_sides``, or all of them flattened end to end in one tensor (B or 1, P); None takes the stored
                maps.

        Raises:
            ValueError: for what a 2D generator cannot use, codes or noise of another shape, unknown taps.
        """
        self._refuse_camera(camera)
        self.check_taps(taps)
        self.check_expression(expression, len(ws))
        if edit is not None:
            raise ValueError("a 2D generator has no radiance field to edit")
        if resolution not in (None, self.resolution):
            raise ValueError(f"the resolution is {self.resolution}, not {resolution}")
        if ws.ws.shape[1:] != (self.num_ws, self.w_dim):
            raise ValueError(f"codes must be (B, {self.num_ws}, {self.w_dim}), got {tuple(ws.ws.shape)}")
        found = {}
        for side, (x, image) in zip(self.backbone.sides, self.backbone(ws.ws, self._noise(randomness)), strict=True):
            found |= {f"block{side}": x, f"image{side}": image}
        return Rendering(found[f"image{self.resolution}"], taps={name: found[name] for name in taps})

    def _noise(self, randomness: torch.Generator | Tensor | Sequence[Tensor] | None) -> Noise:
        if randomness is None or isinstance(randomness, torch.Generator):
            return "const" if randomness is None else randomness
        sides = self.noise_sides
        if isinstance(randomness, Tensor):
            if randomness.ndim != 2 or randomness.shape[1] != sum(side**2 for side in sides):
                raise ValueError(f"noise must be (B, {sum(side**2 for side in sides)}), got {tuple(randomness.shape)}")
            flat = randomness.split([side**2 for side in sides], 1)
            randomness = [maps.unflatten(1, (1, side, side)) for maps, side in zip(flat, sides, strict=True)]
        if [tuple(maps.shape[1:]) for maps in randomness] != [(1, side, side) for side in sides]:
            raise ValueError(f"noise must be {len(sides)} maps (B, 1, side, side) of sides {sides}")
        return list(randomness)

    @staticmethod
    def _refuse_camera(camera: Camera | None) -> None:
        if camera is not None:
            raise ValueError("a 2D generator takes no camera")


class ResidualBlock(nn.Module):
    """Two convolutions and a skip, both filtered before they halve the side (Fig. 7c)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        # The sum is divided by sqrt(2) to keep its variance, which cancels the gain of the activation before it.
        self.first = EqualConv2d(in_channels, in_channels, 3, gain=LEAKY_GAIN)
        self.second = EqualConv2d(in_channels, out_channels, 3, stride=2, padding=0)
        self.skip = EqualConv2d(in_channels, out_channels, 1, bias=False, gain=1 / math.sqrt(2))

    def forward(self, x: Tensor, kernel: Tensor) -> Tensor:
        """(B, C, H, W), filter (k, k) -> (B, C', H/2, W/2)."""
        skip = self.skip(downsample2x(x, kernel))
        x = F.leaky_relu_(self.first(x), LEAKY_SLOPE)
        size = len(kernel)
        x = blur(x, kernel, ((size + 1) // 2, size // 2))
        return skip.add_(F.leaky_relu_(self.second(x), LEAKY_SLOPE))


class StyleGAN2Discriminator(Discriminator):
    """StyleGAN2's residual discriminator.

    Args:
        channels: of the features, from the full resolution down to side 4.
        minibatch_group: items compared with one another by :func:`minibatch_std`.
        taps: of the separable downsampling filter.
        pose: "regress" answers yaw and pitch too (GRAM's pose regularisation), "none" knows no pose.

    Raises:
        ValueError: when ``pose`` is neither.
    """

    kernel: Tensor

    def __init__(
        self,
        channels: Sequence[int] = stylegan2_channels(256)[::-1],
        *,
        minibatch_group: int = 4,
        taps: Sequence[float] = (1, 3, 3, 1),
        pose: str = "none",
    ) -> None:
        super().__init__()
        if pose not in ("none", "regress"):
            raise ValueError(f"pose must be none or regress, got {pose!r}")
        self.resolution, self.minibatch_group = 4 * 2 ** (len(channels) - 1), minibatch_group
        self.channels, self.taps = tuple(channels), tuple(taps)
        width = channels[-1]
        self.stem = EqualConv2d(3, channels[0], 1, gain=LEAKY_GAIN)
        self.blocks = nn.ModuleList(ResidualBlock(a, b) for a, b in pairwise(channels))
        self.conv = EqualConv2d(width + 1, width, 3, gain=LEAKY_GAIN)
        self.dense = EqualLinear(width * 16, width)
        self.logit = EqualLinear(width, 1)
        self.pose = pose
        self.angles = EqualLinear(width, 2) if pose == "regress" else None
        self.register_buffer("kernel", fir_kernel(taps), persistent=False)

    def forward(self, image: Tensor, camera: Camera | None = None) -> DiscriminatorOutput:
        """Judge images (B, 3, resolution, resolution) in [-1, 1].

        Raises:
            ValueError: when the size is wrong, or a camera would be ignored.
        """
        if camera is not None:
            raise ValueError("this discriminator takes no camera")
        if image.shape[1:] != (3, self.resolution, self.resolution):
            raise ValueError(f"images must be (B, 3, {self.resolution}, {self.resolution}), got {tuple(image.shape)}")
        x = F.leaky_relu_(self.stem(image.contiguous(memory_format=torch.channels_last)), LEAKY_SLOPE)
        features = []
        for block in self.blocks:
            x = block(x, self.kernel)
            features.append(x)
        x = F.leaky_relu_(self.conv(minibatch_std(x, self.minibatch_group)), LEAKY_SLOPE)
        x = leaky(self.dense(x.flatten(1)))
        logits = self.logit(x)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        angles = None if self.angles is None else self.angles(x).to(dtype)
        return DiscriminatorOutput(logits.to(dtype), angles, tuple(features))

    def narrowed(self, side: int) -> Discriminator:
        left_out = max((self.resolution // side).bit_length() - 1, 0)
        if self.resolution != side << left_out or left_out >= len(self.blocks):
            return super().narrowed(side)
        found = StyleGAN2Discriminator(
            self.channels[left_out:], minibatch_group=self.minibatch_group, taps=self.taps, pose=self.pose
        ).to(self.logit.weight)
        own = {name: t for name, t in self.state_dict().items() if not name.startswith(("stem.", "blocks."))}
        for i, block in enumerate(list(self.blocks)[left_out:]):
            own |= {f"blocks.{i}.{name}": tensor for name, tensor in block.state_dict().items()}
        found.load_state_dict(found.state_dict() | own)  # all but the first layer
        return found
