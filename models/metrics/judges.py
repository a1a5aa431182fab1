"""The networks that scores of pictures and of sets of pictures are told by."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from models.features.base import Frozen, FrozenHolder, frozen_scorers, network_name
from models.metrics.distribution import Distribution
from models.metrics.image import likeness


class Judges(FrozenHolder):
    """What a stage measures by; each may be missing, and what it tells is left out then.

    Args:
        perceptual: of ``lpips`` and ``diversity``.
        identity: of ``id``.
        embedding: of ``cmmd`` and ``style``.
        distribution: of ``fid``, ``kid`` and ``recall``.
        attributes: what scores heads by their pictures (:class:`models.features.base.AttributeScorer`).

    Raises:
        UserError: for attributes of a network that has none.
    """

    def __init__(
        self,
        perceptual: nn.Module | None = None,
        identity: nn.Module | None = None,
        embedding: nn.Module | None = None,
        distribution: Distribution | None = None,
        attributes: Sequence[nn.Module] | None = None,
    ) -> None:
        self.perceptual, self.identity, self.embedding = (
            None if network is None else Frozen(network) for network in (perceptual, identity, embedding)
        )
        self.distribution = None if distribution is None else Frozen(distribution)
        self.attributes = frozen_scorers(attributes)

    def likeness(self, found: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """How like their truth pictures (B, 3, H, W) are, (B,) each, see :func:`models.metrics.image.likeness`."""
        perceptual, identity = (None if n is None else n.module for n in (self.perceptual, self.identity))
        return likeness(found, truth, perceptual, identity, [held.module for held in self.attributes])

    def network(self, metric: str) -> str:
        """The name of what tells a metric, by how that begins: ``lpips``, ``lpips_twin``; "" where none does."""
        told = dict.fromkeys(("lpips", "diversity"), self.perceptual) | {"id": self.identity}
        told |= dict.fromkeys(("cmmd", "style"), self.embedding)
        told |= dict.fromkeys(("fid", "kid", "recall"), self.distribution)
        told |= {f"{name}_error": held for held in self.attributes for name in held.module.names}
        found = next((held for name, held in told.items() if f"{metric}_".startswith(f"{name}_")), None)
        return "" if found is None else network_name(found.module)
