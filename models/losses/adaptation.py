"""What an adapted generator G' owes to G, which it comes from, at equal codes.

Sources: Lu and Zhou, pseudo-paired facial stylization, Eq. 1 to 3; Wang et al., 3D cartoon faces, Eq. 2; StyleGAN-NADA
(Gal et al. 2022), Eq. 2 with a direction between two sets of pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from models.checks import check_not_negative, check_positive
from models.features.base import PerceptualDistance
from models.generators.base import Generator
from models.image import at_most
from models.losses.direction import directional_l2, directional_loss, displacement
from models.rendering.output import Rendering

Embedding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SemanticLoss:
    """L_semantic = LPIPS(G(z), G'(z)) + identity (1 - cos) of an identity network (pseudo-paired stylization, Eq. 1).

    Attributes:
        weight: of the whole, for the caller. identity: of the identity term.
        resolution: side at which the networks see larger pictures, pixels.
    """

    weight: float = 1.0
    identity: float = 0.1
    resolution: int = 256

    def __post_init__(self) -> None:
        check_not_negative(self, "weight", "identity", where="semantic.")
        check_positive(self, "resolution", where="semantic.")

    def __call__(
        self, image: Tensor, source: Tensor, perceptual: PerceptualDistance, identity: Embedding | None
    ) -> dict[str, Tensor]:
        """Of pictures (B, 3, H, W) in [-1, 1]: the terms and their sum as ``semantic``, (B,) each."""
        image, source = (at_most(t, self.resolution) for t in (image, source))
        terms = {"semantic_lpips": perceptual(image, source)}
        total = terms["semantic_lpips"]
        if identity is not None and self.identity:
            terms["semantic_id"] = 1 - torch.cosine_similarity(identity(image), identity(source), dim=1)
            total = total + self.identity * terms["semantic_id"]
        return {**terms, "semantic": total}


@dataclass(frozen=True)
class PairedLoss:
    """L_paired = LPIPS(G'(w_k), S) of pseudo pairs (pseudo-paired stylization, Eq. 2).

    Attributes:
        path: artifact of the stage ``pairs``.
        level: k, 1 to 3, which code of each pair: the higher, the nearer to the style and the farther from photographs.
        weight: of the term. batch: pairs a step, on each rank.
        resolution: side at which the network sees larger pictures, pixels.
    """

    path: str
    level: Literal[1, 2, 3] = 2
    weight: float = 1.0
    batch: int = 4
    resolution: int = 256

    def __post_init__(self) -> None:
        check_not_negative(self, "weight", where="paired.")
        check_positive(self, "batch", "resolution", where="paired.")

    def __call__(self, image: Tensor, style: Tensor, perceptual: PerceptualDistance) -> Tensor:
        """(B,) of pictures (B, 3, H, W) by G' and those of the style."""
        return perceptual(*(at_most(t, self.resolution) for t in (image, style)))


@dataclass(frozen=True)
class StructureLoss:
    """L_str = 1/k sum_i mean |G^i(z) - G'^i(z)|^2 over the first k blocks (3D cartoon faces, Eq. 2), with equal noise.

    Attributes:
        weight: of the whole, for the caller. blocks: k.
        of: the blocks' "features", or the "images" so far (the paper's text can be read either way).
    """

    weight: float = 1.0
    blocks: int = 2
    of: Literal["features", "images"] = "features"

    def __post_init__(self) -> None:
        check_not_negative(self, "weight", where="structure.")
        check_positive(self, "blocks", where="structure.")

    def taps(self, generator: Generator) -> tuple[str, ...]:
        """Names of the outputs that are compared.

        Raises:
            ValueError: when the generator has fewer blocks.
        """
        kind = "block" if self.of == "features" else "image"
        names = [name for name in generator.tap_names if name.startswith(kind)]
        if len(names) < self.blocks:
            raise ValueError(
                f"structure.blocks is {self.blocks}, {type(generator).__name__} has {len(names)} such outputs"
            )
        return tuple(names[: self.blocks])

    def __call__(self, adapted: Rendering, source: Rendering, taps: Sequence[str]) -> Tensor:
        """(B,) for renderings of B pictures with the same taps."""
        errors = [(adapted.taps[name] - source.taps[name]).square().flatten(1).mean(1) for name in taps]
        return torch.stack(errors).mean(0)


@dataclass(frozen=True)
class ShiftLoss:
    """Asks G' to move a picture's embedding as the style's pictures differ from G's (StyleGAN-NADA).

    Attributes:
        weight: of the whole, for the caller.
        form: "cosine" asks for the direction (Eq. 2), "l2" for the length as well, see :mod:`models.losses.direction`.
            A picture that has not moved at all has no direction yet: it is asked as by "l2".
        pictures: of G whose mean embedding the direction starts from; it ends at the mean of all style pictures.
        normalize_embedding: bring embeddings to unit length before they are subtracted.
    """

    weight: float = 1.0
    form: Literal["cosine", "l2"] = "cosine"
    pictures: int = 256
    normalize_embedding: bool = True

    def __post_init__(self) -> None:
        check_not_negative(self, "weight", where="shift.")
        check_positive(self, "pictures", where="shift.")

    def guide(self, style: Tensor, source: Tensor) -> Tensor:
        """(D,) from the mean of embeddings (M, D) of G's pictures to that of embeddings (N, D) of the style."""
        if self.normalize_embedding:
            style, source = (F.normalize(t, dim=1) for t in (style, source))
        return style.mean(0) - source.mean(0)

    def __call__(self, image: Tensor, source: Tensor, guide: Tensor, embedding: Embedding) -> Tensor:
        """(B,) of pictures (B, 3, H, W) by G' and G."""
        delta = displacement(embedding(image), embedding(source), self.normalize_embedding)
        whole = directional_l2(guide, delta).loss
        if self.form == "l2":
            return whole
        direction = directional_loss(guide, delta)
        return torch.where(direction.valid, direction.loss, whole)
