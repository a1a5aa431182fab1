"""What every encoder offers."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

from torch import Tensor

from models.configurable import Configurable
from models.generators.base import Generator
from models.image import resized
from models.latents import Latents


class Encoder(Configurable):
    """Images in, style codes of one generator out.

    Attributes:
        resolution: image side in pixels.
        channels: of the image: 3, or the number of labels of a segmentation.
        expressions: how many expression coefficients it predicts beside the codes.
        mean_latents: the mean code it was trained with, a batch of one, where it knows it.
        space: where its codes are: "w", as the generator's synthesis takes them, or "z", one for each layer in a group
            of that name, which the generator's mapping makes into the former.
    """

    resolution: int
    channels: int = 3
    expressions: int = 0
    mean_latents: Latents | None = None
    space: Literal["w", "z"] = "w"

    @abstractmethod
    def forward(self, image: Tensor) -> Latents:
        """Offsets from a mean code, in the groups of the generator.

        Args:
            image: (B, channels, resolution, resolution), pictures in [-1, 1].
        """

    def start(self, mean: Latents) -> None:
        """Make a new encoder ready to learn codes around a generator's mean code, a batch of one."""

    def set_progressive_stage(self, stage: int | None) -> None:
        """Let so many codes differ from one another, all for None; nothing where training has no such stages."""

    def codes(self, image: Tensor, latent_avg: Latents) -> Latents:
        """Codes for ``Generator.synthesis``: ``latent_avg`` + offsets.

        Args:
            latent_avg: the mean code the encoder was trained with, of one item or as many as images.
        """
        offsets = self(image).groups
        return Latents({name: latent_avg.groups[name] + offset for name, offset in offsets.items()})

    def invert(self, image: Tensor, latent_avg: Latents) -> tuple[Latents, Tensor | None]:
        """As :meth:`codes`, with the expression (B, E) beside them where the encoder predicts one."""
        return self.codes(image, latent_avg), None

    def check_image(self, image: Tensor) -> None:
        """Refuse images of another size.

        Raises:
            ValueError: saying which size is expected.
        """
        expected = (self.channels, self.resolution, self.resolution)
        if image.ndim != 4 or tuple(image.shape[1:]) != expected:
            raise ValueError(f"images must be (B, {', '.join(map(str, expected))}), got {tuple(image.shape)}")


def inverted(image: Tensor, encoder: Encoder, generator: Generator) -> tuple[Latents, Tensor | None]:
    """All codes that a generator takes, of pictures (B, 3, H, W) of any size, and expressions (B, E) where the encoder
    tells them; codes that it does not tell are :meth:`Generator.complete`'s."""
    mean = encoder.mean_latents or generator.mean_latents
    codes, expression = encoder.invert(resized(image, encoder.resolution), mean)
    if encoder.space == "z":
        return generator.mapping(codes.groups["z"]), expression
    return generator.complete(codes), expression
