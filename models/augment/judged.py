"""Random changes of what a discriminator sees, real and generated alike: few pictures are not learnt by heart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from models.checks import check_not_negative

_GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class JudgedAugmentation:
    """Colour, shift and cutout of each picture, differentiable twice (DiffAugment, Zhao et al. 2020).

    Attributes:
        brightness: largest change, of pictures in [-1, 1].
        saturation, contrast: largest relative changes.
        shift: farthest, as a share of the side; what comes in is 0, as there.
        cutout: side of the square that is blanked, as a share of the picture's; 0 leaves it out.
    """

    brightness: float = 0.5
    saturation: float = 1.0
    contrast: float = 0.5
    shift: float = 0.125
    cutout: float = 0.5

    def __post_init__(self) -> None:
        check_not_negative(self, "brightness", "saturation", "contrast", "shift", "cutout", where="augment.")

    def __call__(self, image: Tensor, generator: Generator) -> Tensor:
        """Pictures (B, 3, H, W), each changed by draws of its own, made on the CPU."""
        count, _, height, width = image.shape
        light, colour, contrast, down, across, top, left = (
            2 * torch.rand(7, count, 1, 1, 1, generator=generator) - 1
        ).to(image)
        image = image + self.brightness * light
        grey = (image * image.new_tensor(_GREY)[:, None, None]).sum(1, keepdim=True)
        image = grey + (image - grey) * (1 + self.saturation * colour)
        mean = image.mean((1, 2, 3), keepdim=True)
        image = mean + (image - mean) * (1 + self.contrast * contrast)
        rows, columns = (torch.arange(side, device=image.device) for side in (height, width))
        if self.shift:
            image = _shifted(image, rows, (self.shift * height * down).round().long(), 2)
            image = _shifted(image, columns, (self.shift * width * across).round().long(), 3)
        if self.cutout:
            inside = [
                ((places + 0.5) / side - (1 + centre.flatten()[:, None]) / 2).abs() < self.cutout / 2
                for places, side, centre in ((rows, height, top), (columns, width, left))
            ]
            image = image * ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])
        return image


def _shifted(image: Tensor, places: Tensor, by: Tensor, dim: int) -> Tensor:
    """Along one dimension, by whole pixels (B, 1, 1, 1), zeros coming in: gathered from a padded copy."""
    side = len(places)
    source = (places - by.flatten()[:, None] + 1).clamp(0, side + 1)
    padded = F.pad(image, (0, 0, 1, 1) if dim == 2 else (1, 1))
    shape = [len(image), 1, 1, 1]
    shape[dim] = side
    size = list(image.shape)
    size[dim] = side
    return padded.gather(dim, source.reshape(shape).expand(size))
