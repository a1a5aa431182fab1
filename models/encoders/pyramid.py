"""The encoders of pSp and e4e: a feature pyramid on an IR-SE trunk, and one small network a style code.

Sources: "Encoding in Style" (Richardson et al., 2021, Section 3), "Designing an Encoder for StyleGAN Image
Manipulation" (Tov et al., 2021, Section 4).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.encoders.base import Encoder
from models.encoders.irse import DEPTHS, REDUCTION, WIDTHS, IRTrunk
from models.generators.layers import EqualLinear
from models.latents import Latents

MEDIUM, FINE = 3, 7  # first style codes that look at the second and at the third level of the pyramid


class MapToStyle(nn.Module):
    """(B, C, side, side) -> (B, w_dim) by strided convolutions down to one pixel, then a linear layer.

    Args:
        width: channels of the convolutions; w_dim by default.
    """

    def __init__(self, channels: int, w_dim: int, side: int, width: int | None = None) -> None:
        super().__init__()
        width = width or w_dim
        self.convs = nn.Sequential()
        for before in (channels, *[width] * (side.bit_length() - 2)):
            self.convs.extend([nn.Conv2d(before, width, 3, 2, 1), nn.LeakyReLU(0.01)])
        self.linear = EqualLinear(width, w_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.convs(x).flatten(1))


class GradualStyleEncoder(Encoder):
    """pSp: coarse, medium and fine style codes from three levels of a feature pyramid.

    Args:
        num_ws, w_dim: codes of the generator.
        resolution: image side in pixels, a power of two of at least 32.
        channels: of the image: 3, or the number of labels of a segmentation.
        widths, depths, reduction: of the trunk's four stages, see :class:`models.encoders.irse.IRTrunk`.
        groups: number and size of the codes in each latent group, where the generator does not have one group of
            ``num_ws`` codes. Codes are counted through the groups.
        expressions: coefficients of an animatable generator that one more network tells from the finest level; 0 for
            a still face.
        style_width: channels inside of the networks that make codes; the size of the code by default.

    Attributes:
        latent_avg: (num_ws, w_dim) buffer: the mean code it was trained with, zeros where it predicts codes themselves.
            With ``groups`` one of each, ``latent_avg_NAME``.
    """

    latent_avg: Tensor

    def __init__(
        self,
        num_ws: int = 0,
        w_dim: int = 512,
        resolution: int = 256,
        channels: int = 3,
        widths: Sequence[int] = WIDTHS,
        depths: Sequence[int] = DEPTHS,
        reduction: int | None = REDUCTION,
        groups: dict[str, Sequence[int]] | None = None,
        expressions: int = 0,
        style_width: int | None = None,
    ) -> None:
        super().__init__()
        if resolution < 32 or resolution & (resolution - 1):
            raise ValueError(f"resolution must be a power of two of at least 32, got {resolution}")
        if (num_ws > 0) == bool(groups):
            raise ValueError("give either num_ws or groups")
        sizes = {name: (count, size) for name, (count, size) in (groups or {"ws": (num_ws, w_dim)}).items()}
        self.groups, self.num_ws = sizes, sum(count for count, _ in sizes.values())
        self.w_dim, self.resolution, self.channels, self.expressions = w_dim, resolution, channels, expressions
        self.trunk = IRTrunk(channels, widths, depths, reduction)
        _, fine, medium, coarse = widths
        side = resolution // 16  # of the coarsest map
        self.styles = self.heads(coarse, side, style_width)
        self.latlayer1 = nn.Conv2d(medium, coarse, 1)
        self.latlayer2 = nn.Conv2d(fine, coarse, 1)
        if expressions:
            self.expression = MapToStyle(coarse, expressions, side << 2, style_width or coarse)
        self._averages = {name: f"latent_avg_{name}" if groups else "latent_avg" for name in sizes}
        for name, (count, size) in sizes.items():
            self.register_buffer(self._averages[name], torch.zeros(count, size))

    def heads(self, channels: int, side: int, width: int | None) -> nn.ModuleList:
        """The networks that make codes, of maps with so many channels, the coarsest of which have this side."""
        sizes = [size for count, size in self.groups.values() for _ in range(count)]
        return nn.ModuleList(MapToStyle(channels, size, side << level_of(i), width) for i, size in enumerate(sizes))

    @property
    def mean_latents(self) -> Latents:
        """The mean code it was trained with, a batch of one."""
        return Latents({name: getattr(self, buffer)[None] for name, buffer in self._averages.items()})

    @mean_latents.setter
    def mean_latents(self, mean: Latents) -> None:
        for name, buffer in self._averages.items():
            getattr(self, buffer).copy_(mean.groups[name][0])

    def start(self, mean: Latents) -> None:
        self.mean_latents = mean

    def forward(self, image: Tensor) -> Latents:
        return self.offsets(image)[0]

    def codes(self, image: Tensor, latent_avg: Latents | None = None) -> Latents:
        """Codes for ``Generator.synthesis``: ``latent_avg``, by default the encoder's own, + offsets."""
        return super().codes(image, latent_avg or self.mean_latents)

    def invert(self, image: Tensor, latent_avg: Latents | None = None) -> tuple[Latents, Tensor | None]:
        """As :meth:`Encoder.invert`, from ``latent_avg``, by default the encoder's own."""
        offsets, expression = self.offsets(image)
        mean = (latent_avg or self.mean_latents).groups
        return Latents({name: mean[name] + offset for name, offset in offsets.groups.items()}), expression

    def offsets(self, image: Tensor) -> tuple[Latents, Tensor | None]:
        """Offsets from the mean code, and the expression (B, expressions) or None.

        Raises:
            ValueError: for images of another size.
        """
        found, expression = self.predict(image, range(self.num_ws))
        return self.grouped([found[i] for i in range(self.num_ws)]), expression

    def grouped(self, codes: Sequence[Tensor]) -> Latents:
        """All codes, each (B, size), in their groups."""
        rest = iter(codes)
        return Latents({n: torch.stack([next(rest) for _ in range(count)], 1) for n, (count, _) in self.groups.items()})

    def predict(self, image: Tensor, chosen: Collection[int]) -> tuple[dict[int, Tensor], Tensor | None]:
        """What the chosen style networks say, (B, size) each, and the expression where there is one.

        Levels of the pyramid that none of them sees are not built.

        Raises:
            ValueError: for images of another size.
        """
        self.check_image(image)
        _, fine, medium, coarse = self.trunk(image)
        levels, laterals = [coarse], [(self.latlayer1, medium), (self.latlayer2, fine)]

        def level(number: int) -> Tensor:
            while len(levels) <= number:
                layer, features = laterals[len(levels) - 1]
                levels.append(upsample_add(levels[-1], layer(features)))
            return levels[number]

        found = {i: self.styles[i](level(self.level_of(i))) for i in chosen}
        return found, self.expression(level(2)) if self.expressions else None

    def level_of(self, code: int) -> int:
        """Which level of the pyramid a code's network looks at."""
        return level_of(code)


class Encoder4Editing(GradualStyleEncoder):
    """e4e: one code, and what the others differ from it by: close to W, hence easy to edit.

    Training starts with equal codes and lets them differ one after the other; :meth:`set_progressive_stage` says how
    far that went. A new instance is at the last stage. With several latent groups each has a code that its others
    differ from.

    Args:
        silent: let the differences start at 0, so that none disturbs whose turn a short run does not reach; e4e's start
            at random.

    Other arguments are those of :class:`GradualStyleEncoder`.
    """

    stage: int | None = None

    def __init__(
        self,
        num_ws: int = 0,
        w_dim: int = 512,
        resolution: int = 256,
        channels: int = 3,
        widths: Sequence[int] = WIDTHS,
        depths: Sequence[int] = DEPTHS,
        reduction: int | None = REDUCTION,
        groups: dict[str, Sequence[int]] | None = None,
        expressions: int = 0,
        style_width: int | None = None,
        silent: bool = True,
    ) -> None:
        super().__init__(
            num_ws, w_dim, resolution, channels, widths, depths, reduction, groups, expressions, style_width
        )
        self.silent = silent

    @property
    def bases(self) -> list[int]:
        """The first code of each group."""
        counts = [count for count, _ in self.groups.values()]
        return [sum(counts[:i]) for i in range(len(counts))]

    def start(self, mean: Latents) -> None:
        super().start(mean)
        for i, style in enumerate(self.styles):
            if self.silent and i not in self.bases:
                nn.init.zeros_(style.get_parameter("linear.weight"))

    def set_progressive_stage(self, stage: int | None) -> None:
        """Let the first ``stage`` codes that are no group's first differ from it: none at 0, all for None.

        Raises:
            ValueError: when it is negative.
        """
        if stage is not None and stage < 0:
            raise ValueError(f"a progressive stage is 0 or more, got {stage}")
        self.stage = stage

    def offsets(self, image: Tensor) -> tuple[Latents, Tensor | None]:
        bases = self.bases
        differing = [i for i in range(self.num_ws) if i not in bases][: self.stage]
        found, expression = self.predict(image, sorted([*bases, *differing]))
        # E(x) = (w, w + delta_1, ..., w + delta_(N-1)), deltas that are not trained yet being 0.
        codes: list[Tensor] = []
        for i in range(self.num_ws):
            base = found[max(b for b in bases if b <= i)]
            codes.append(base if i in bases or i not in found else base + found[i])
        return self.grouped(codes), expression


class SharedStyleEncoder(GradualStyleEncoder):
    """pSp to W: one network makes codes, so that all of a group are equal (pseudo-paired stylization,
    Lu and Zhou, Sec. 3.1).

    It looks at the finest level of the pyramid, which has the others in it. Arguments as of
    :class:`GradualStyleEncoder`.
    """

    def heads(self, channels: int, side: int, width: int | None) -> nn.ModuleList:
        return nn.ModuleList(MapToStyle(channels, size, side << 2, width) for _, size in self.groups.values())

    def offsets(self, image: Tensor) -> tuple[Latents, Tensor | None]:
        found, expression = self.predict(image, range(len(self.groups)))
        groups = zip(self.groups.items(), found.values(), strict=True)
        codes = {name: code[:, None].expand(-1, count, -1) for (name, (count, _)), code in groups}
        return Latents(codes), expression

    def level_of(self, code: int) -> int:
        return 2


class MappedStyleEncoder(GradualStyleEncoder):
    """pSp to Z+: codes of z, one a layer, which the generator's mapping makes into codes of w (as before, Sec. 3.2).

    Its one group is "z", of as many codes as the generator has layers: ``groups={"z": [num_ws, z_dim]}``. Other
    arguments as of :class:`GradualStyleEncoder`.
    """

    space = "z"

    def start(self, mean: Latents) -> None:
        """Around 0, the mean of z."""


def level_of(code: int) -> int:
    """Which level of the pyramid a code looks at: 0 coarse, 1 medium, 2 fine."""
    return (code >= MEDIUM) + (code >= FINE)


def upsample_add(coarse: Tensor, lateral: Tensor) -> Tensor:
    """``coarse`` (B, C, h, w) at the size of ``lateral`` (B, C, H, W), added to it."""
    return F.interpolate(coarse, lateral.shape[-2:], mode="bilinear", align_corners=True) + lateral
